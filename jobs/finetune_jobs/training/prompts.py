"""Learned vectors before every text: prefix tuning (Li and Liang 2021, arXiv:2101.00190) and prompt tuning (Lester et
al. 2021, arXiv:2104.08691).

The encoder and the files are PEFT's. Its forward pass is not: it drops the positions that keep padding on the left from
mattering, and puts the vectors before every new token of an answer again.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig, PromptTuningInit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune_api.types import PrefixTuning, PromptTuning
from finetune_jobs.run.errors import ConfigurationError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VECTORS = "prompt_embeddings"
"""PEFT's name of the one tensor in its file: the vectors themselves, whatever they were computed from."""


class Prompted(PeftModelForCausalLM):
    """A causal language model with learned vectors before every text. A text is a row of its own, never packed."""

    @property
    def virtual_tokens(self) -> int:
        """How many."""
        return int(self.active_peft_config.num_virtual_tokens)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model, of the texts alone: masks, positions and logits do not count the vectors.

        ``past_key_values`` of an earlier pass hold them already; then ``position_ids`` must be given.
        """
        rows, width = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones(rows, self.virtual_tokens), mask], dim=1)
        if position_ids is None:
            position_ids = torch.arange(width, device=input_ids.device).expand(rows, width)
        given = {"attention_mask": mask, "position_ids": position_ids + self.virtual_tokens, **kwargs}
        before_text = past_key_values is None
        if before_text and self.active_peft_config.peft_type == "PROMPT_TUNING":
            return self._after_prompt(input_ids, given, logits_to_keep)
        if before_text:
            past_key_values = self.get_prompt(rows)
        keep = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
        return self.base_model(input_ids=input_ids, past_key_values=past_key_values, **keep, **given)

    def _after_prompt(self, input_ids: Tensor, given: dict[str, Any], logits_to_keep: Any) -> Any:
        rows, n = len(input_ids), self.virtual_tokens
        base: Any = self.base_model
        texts = base.get_input_embeddings()(input_ids)
        embeddings = torch.cat([self.get_prompt(rows).to(texts.dtype), texts], dim=1)
        first = torch.arange(n, device=input_ids.device).expand(rows, n)
        given["position_ids"] = torch.cat([first, given["position_ids"]], dim=1)
        if isinstance(logits_to_keep, Tensor):  # a mask of the texts
            logits_to_keep = torch.cat([logits_to_keep.new_zeros(rows, n), logits_to_keep], dim=1)
        elif isinstance(logits_to_keep, list):
            logits_to_keep = [n + place for place in logits_to_keep]
        if logits_to_keep is not None:
            return base(inputs_embeds=embeddings, logits_to_keep=logits_to_keep, **given)
        output = base(inputs_embeds=embeddings, **given)
        output.logits = output.logits[:, n:]
        return output


def add(model: PreTrainedModel, settings: PrefixTuning | PromptTuning, directory: Path) -> Prompted:
    """Fresh vectors, drawn with torch's random numbers; ``directory`` has the model's tokenizer.

    A prompt begins as the embeddings of its ``initText`` or of random words, a prefix as the keys and values that
    random words leave (arXiv:2101.00190, section 7.4), unless it is projected.
    """
    n = settings.virtual_tokens
    if isinstance(settings, PromptTuning):
        text = settings.init_text
        return Prompted(
            model,
            PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=n,
                prompt_tuning_init=PromptTuningInit.TEXT if text else PromptTuningInit.SAMPLE_VOCAB,
                prompt_tuning_init_text=text or None,
                tokenizer_name_or_path=str(directory) if text else None,
            ),
        )
    cached = _cached_words(model, n)
    layers, heads, width = len(cached) // 2, cached[0].shape[0], cached[0].shape[-1]
    prefixed = Prompted(
        model,
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=n,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * width,
            prefix_projection=settings.projection,
        ),
    )
    if not settings.projection:
        # PEFT reads a row as (layer, key or value, head, place in the head).
        rows = torch.stack([tensor.transpose(0, 1) for tensor in cached], dim=1).reshape(n, -1)
        _vectors(prefixed).data.copy_(rows)
    return prefixed


def _vectors(model: Prompted) -> nn.Parameter:
    """As they are themselves, not projected."""
    encoder: Any = model.prompt_encoder
    weight: nn.Parameter = encoder["default"].embedding.weight
    return weight


@torch.no_grad()
def _cached_words(model: Any, n: int) -> list[Tensor]:
    """By layer the keys and the values of ``n`` random words, each (heads, n, width)."""
    weight = next(model.get_input_embeddings().parameters())
    words = torch.randint(0, weight.shape[0], (1, n)).to(weight.device)
    training = model.training
    cache = model.eval()(input_ids=words, use_cache=True).past_key_values
    model.train(training)
    layers = getattr(cache, "layers", [])
    found: list[Any] = [getattr(layer, kind, None) for layer in layers for kind in ("keys", "values")]
    shapes = {tuple(tensor.shape) if isinstance(tensor, Tensor) else () for tensor in found}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4 or found[0].shape[2] != n:
        raise ConfigurationError(
            f"prefixTuning: layers of {type(model).__name__} do not all keep keys and values of one size, "
            "so they can have no prefix; write `method: promptTuning` or lora"
        )
    return [tensor[0].float() for tensor in found]


def save(model: Prompted, directory: Path, *, base: str) -> None:
    """The vectors in float32, as plain PEFT loads them; ``base`` is how the world calls the model they belong to."""
    directory.mkdir(parents=True)
    vectors = model.get_prompt_embedding_to_save("default").float().contiguous()
    save_file({_VECTORS: vectors}, directory / _WEIGHTS, metadata={"format": "pt"})
    configs: Any = model.peft_config
    configs["default"].save_pretrained(str(directory))
    content = json.loads((directory / _CONFIG).read_text())
    content |= {"base_model_name_or_path": base, "inference_mode": True}
    if content.get("tokenizer_name_or_path"):  # a path here means nothing elsewhere
        content["tokenizer_name_or_path"] = base
    (directory / _CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def load(model: PreTrainedModel, directory: Path) -> Prompted:
    """What ``save`` left, to be asked."""
    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = True
    prompted = Prompted(model, config)
    _vectors(prompted).data.copy_(load_file(directory / _WEIGHTS)[_VECTORS])
    return prompted
