"""The model that is trained: the base in the right precision, the adapter on it, and how many parameters that is."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from finetune_api.defaults import PROMPTED
from finetune_api.types import IA3, Bottleneck, Lora, Method, PrefixTuning, PromptTuning, Quantization
from finetune_jobs import bnb
from finetune_jobs.run.environment import cpu_flags
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.training import bottleneck, liger, unsloth
from finetune_jobs.training.adapters import INITIAL, add_ia3, add_lora, keep_precision
from finetune_jobs.training.distributed import Peers
from finetune_jobs.training.qat import Rounding
from finetune_jobs.training.sharding import Sharding, add_up_gradients, held, loader, put_away
from finetune_jobs.tuned import load_whole_modules

_log = logging.getLogger("finetune.training")
Backend = Literal["transformers", "unsloth"]


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters as the architecture defines them, however they are stored."""

    trainable: int
    total: int
    """Adapter included; tied weights once."""


@dataclass(frozen=True)
class Policy:
    """A model ready to be trained."""

    model: nn.Module
    device: torch.device
    compute: torch.dtype
    """What matrix products are computed in; trainable weights are float32 whatever this is."""
    shards: int = 1
    """Processes that hold the model together: what lora leaves frozen, or all of it."""
    held: int = 0
    """Numbers of the model in this process's memory once it is loaded."""
    head: nn.Linear | None = None
    """Hidden state to one number, float32: a reward model's score, or the values of ppo. Trained beside the model."""
    rounding: Rounding | None = None
    """The weights are kept as a GGUF would have them (``qat``)."""
    backend: Backend = "transformers"
    """Whose functions compute the layers."""
    liger: bool = False
    """Liger's kernels compute some of them."""

    @property
    def sharded(self) -> bool:
        """Every pass needs all processes."""
        return self.shards > 1

    @property
    def divided(self) -> bool:
        """What is trained is shared too, and with it gradients and optimizer: saving it needs all processes."""
        return self.sharded and not hasattr(self.model, "peft_config")

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's, by name, as this process keeps them between passes."""
        if self.sharded:
            put_away(self.model)
        return dict(self.model.named_parameters())

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that are learned, in a fixed order."""
        head = self.head.parameters() if self.head is not None else ()
        return [p for p in (*self.parameters().values(), *head) if p.requires_grad]

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without PEFT's wrapping."""
        wrapped = hasattr(self.model, "peft_config")
        unwrapped = self.model.get_base_model() if wrapped else self.model  # type: ignore[operator]
        assert isinstance(unwrapped, PreTrainedModel)
        return unwrapped

    def own_weights(self) -> AbstractContextManager[None]:
        """Within, the weights are those that are learned, not what a GGUF would keep of them."""
        return self.rounding.lifted() if self.rounding is not None else nullcontext()

    def changed(self) -> None:
        """What is learned has changed."""
        if self.rounding is not None:
            self.rounding.refresh()

    def autocast(self) -> torch.autocast:
        """Computes in ``compute`` whatever the weights are stored in."""
        lower = self.compute is not torch.float32
        # A cache of copies would keep all weights in 16 bits until the end of the pass: more than a share of them.
        return torch.autocast(self.device.type, dtype=self.compute, enabled=lower, cache_enabled=not self.divided)


def device_of(peers: Peers) -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", peers.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def compute_type(precision: Literal["auto", "bf16", "fp16", "fp32"], device: torch.device) -> torch.dtype:
    """``auto``: bf16 on GPUs from compute capability 8.0, else fp16; on CPUs bf16 where it is faster than fp32."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    # Without these instructions bf16 products are 2.6 to 2.9 times slower than fp32's.
    return torch.bfloat16 if cpu_flags() & {"avx512_bf16", "amx_bf16"} else torch.float32


def load(
    directory: Path,
    *,
    method: Method,
    lora: Lora | None,
    quantization: Quantization | None,
    adapter: Path | None,
    compute: torch.dtype,
    device: torch.device,
    seed: int,
    sharding: Sharding | None = None,
    trust_remote_code: bool = False,
    scores: bool = False,
    added: PrefixTuning | PromptTuning | IA3 | Bottleneck | None = None,
    backend: Backend = "transformers",
) -> Policy:
    """The 16-bit model in ``directory`` with what is to be trained on it.

    ``adapter``: the one that came in, which is trained on. Without it a fresh one starts from ``seed``: ``lora``, or
    what is ``added``.
    ``scores``: made a reward model, whose ``head`` is still to be set.
    With ``sharding``, which is for lora and full, all processes must call this together.
    ``backend``: unsloth, which has been started, is for lora and qlora.
    """
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    settings: dict[str, Any] = {"dtype": torch.float32 if method is Method.FULL else compute}
    if quantization is not None:
        settings["quantization_config"] = bnb.settings(quantization, compute)
    if sharding is not None:
        kind, told = loader(sharding, directory, trust_remote_code=trust_remote_code)
        settings |= told
    elif quantization is not None or device.type == "cuda":
        settings["device_map"] = {"": device}
    if scores:
        settings["num_labels"] = 1
    if backend == "unsloth":
        model = unsloth.load(directory, settings.get("quantization_config"), compute, device)
    else:
        model = kind.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code, **settings)
    fast = backend == "transformers" and device.type == "cuda" and _with_liger(model)
    head = take_head(model, device) if scores else None
    bnb.keep_scales(model)
    for module in model.modules():
        # On these CPUs bitsandbytes repacks a layer for inference when it is first evaluated. From then on no gradient
        # passes it: training goes on, and learns next to nothing.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - torch's modules have no such attribute
    if method is Method.FULL:
        if sharding is not None:
            add_up_gradients(model)
        shards = sharding.shards if sharding else 1
        return Policy(model.requires_grad_(), device, compute, shards, held(model), head, liger=fast)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    if method is Method.BOTTLENECK:
        assert isinstance(added, Bottleneck)
        if adapter is None:
            bottleneck.add(model, added)
        else:
            bottleneck.load(model, adapter)
        return Policy(model, device, compute, held=held(model), head=head, liger=fast)
    # PEFT is imported where it is used: its import takes seconds, and the other methods need none of it.
    from peft import PeftModel

    if method in PROMPTED:
        from finetune_jobs.training import prompts

        assert isinstance(added, PrefixTuning | PromptTuning)
        adapted: nn.Module = prompts.add(model, added, directory)
    elif adapter is not None:
        own = {"config": _without_task(adapter)} if scores else {}
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=True, **own)
        load_whole_modules(adapted, adapter)
    elif isinstance(added, IA3):
        adapted = add_ia3(model, added, task=None if scores else "CAUSAL_LM")
    else:
        assert lora is not None
        adapted = add_lora(model, lora, task=None if scores else "CAUSAL_LM")
    if quantization is not None and uses_dora(adapted):
        keep_precision(adapted, compute)
    if backend == "unsloth":
        adapted = unsloth.patch(adapted)
    # Rounded to bf16, small updates would be lost: at DPO's rates nine tenths of them.
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    shards = sharding.shards if sharding else 1
    return Policy(adapted, device, compute, shards, held(adapted), head, backend=backend, liger=fast)


def _with_liger(model: PreTrainedModel) -> bool:
    reason = liger.use(model)
    if reason is not None:
        _log.info("without Liger's kernels: %s", reason)
    return reason is None


def new_head(model: PreTrainedModel, device: torch.device, *, bias: bool = False) -> nn.Linear:
    """A linear layer from the model's hidden state to one number, all zeros."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=bias, device=device, dtype=torch.float32)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def take_head(model: PreTrainedModel, device: torch.device) -> nn.Linear:
    """A sequence classifier's own head in float32; in its place the model passes the hidden states on.

    Raises ConfigurationError for an architecture that has none.
    """
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise ConfigurationError(
            f"spec.model.source: transformers gives {type(model).__name__} no head `score` to read a reward from; "
            "let the reward stage start from a model of another architecture"
        )
    head = new_head(model, device)
    if score.weight.shape == head.weight.shape:  # it is packed in a quantized model, whose head is always a new one
        head.weight.data.copy_(score.weight.detach())
    model.score = nn.Identity()
    return head


def _without_task(adapter: Path) -> Any:
    """The adapter's settings for a model of any kind; what it says of a head, the caller knows."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(adapter))
    config.task_type = None
    if getattr(config, "modules_to_save", None):
        config.modules_to_save = [name for name in config.modules_to_save if name != "score"] or None
    return config


def count(model: nn.Module) -> Counts:
    """Trainable and all parameters."""
    # PiSSA's initial adapter is a part of the base that is kept apart.
    own = [p for name, p in model.named_parameters() if f".{INITIAL}." not in name]
    sizes = [(_logical_size(p), p.requires_grad) for p in own]
    return Counts(sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes))


def _logical_size(parameter: nn.Parameter) -> int:
    # bitsandbytes packs two 4-bit weights into a byte and keeps the true shape beside them.
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def is_adapter(model: nn.Module) -> bool:
    """Whether only an adapter is trained, in the model or before it."""
    return not all(parameter.requires_grad for parameter in model.parameters())


def virtual_tokens(model: nn.Module) -> int:
    """Learned vectors before every text."""
    return int(getattr(model, "virtual_tokens", 0))


def keeps_cache(policy: Policy) -> bool:
    """Whether the learned vectors are keys and values, handed to the layers as a cache."""
    config: Any = getattr(policy.model, "peft_config", None)
    return config is not None and config["default"].peft_type == "PREFIX_TUNING"


def uses_dora(model: nn.Module) -> bool:
    """Whether magnitudes are learned beside the adapter."""
    config: Any = getattr(model, "peft_config", None)
    return config is not None and bool(getattr(config["default"], "use_dora", False))


def disable_dropout(model: nn.Module) -> None:
    """Every pass over the same tokens gives the same log-probabilities from now on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def save_memory(policy: Policy) -> None:
    """Keep only the layers' inputs on the way forward and compute the rest again on the way back."""
    base: Any = policy.base
    # In the older transformers that Unsloth needs it has another name.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
