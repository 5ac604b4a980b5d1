"""Trained weights on disk: PEFT's own format for an adapter, safetensors for a whole model."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from finetune_jobs.merging.files import copy_all_but_weights, set_chat_template, set_dtype
from finetune_jobs.merging.weights import Weights
from finetune_jobs.training import tensors
from finetune_jobs.training.adapters import INITIAL
from finetune_jobs.training.model import Policy, is_adapter, virtual_tokens

_ADAPTER = "adapter"
_ALL = "weights"
_HEAD = "head.safetensors"
_SCORE = "base_model.model.score.weight"
"""What PEFT calls a sequence classifier's head in an adapter's file."""
_LARGEST_FILE = "4GB"


def save_trained(policy: Policy, directory: Path | None) -> None:
    """What was trained, in float32, for a checkpoint. None: only help the process that writes (``Policy.divided``)."""
    if directory is not None and _is_layered(policy.model):
        save_adapter(policy, directory / _ADAPTER, base="")
    else:
        with policy.own_weights():
            trained = {name: p for name, p in policy.parameters().items() if p.requires_grad}
            tensors.save(trained, directory / _ALL if directory else None)
    if directory is not None and policy.head is not None:
        save_file({name: p.detach().contiguous() for name, p in policy.head.named_parameters()}, directory / _HEAD)


def load_trained(directory: Path, policy: Policy) -> None:
    """Put what ``save_trained`` wrote into the model, bit for bit."""
    if _is_layered(policy.model):
        _put_back(load_file(directory / _ADAPTER / "adapter_model.safetensors"), policy.model)
    else:
        saved = Weights(directory / _ALL)
        with policy.own_weights():
            for name, parameter in policy.parameters().items():
                if parameter.requires_grad:
                    tensors.fill(parameter, saved, name)
    if policy.head is not None:
        policy.head.load_state_dict(load_file(directory / _HEAD))
    policy.changed()


def save_reward_model(
    policy: Policy, directory: Path, gathered: Path, *, base: str, source: Path, chat_template: str
) -> None:
    """A reward model that transformers, with PEFT for an adapter, loads as a sequence classifier of one label."""
    assert policy.head is not None
    if is_adapter(policy.model):
        save_adapter(policy, directory, base=base)
        file = directory / "adapter_model.safetensors"
        score = {_SCORE: policy.head.weight.detach().contiguous()}
        save_file({**load_file(file), **score}, file, metadata={"format": "pt"})
        config = directory / "adapter_config.json"
        whole = json.loads(config.read_text())["modules_to_save"] or []
        _rewrite(config, task_type="SEQ_CLS", modules_to_save=[*whole, "score"])
        return
    save_model(policy, directory, gathered, source=source, chat_template=chat_template)
    one = {"architectures": [type(policy.base).__name__], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    _rewrite(directory / "config.json", **one)


def read_score_head(adapter: Path) -> torch.Tensor:
    """The head of a reward model that is an adapter."""
    return load_file(adapter / "adapter_model.safetensors")[_SCORE]


def _rewrite(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}, indent=2, sort_keys=True) + "\n")


def save_adapter(policy: Policy, directory: Path, *, base: str) -> None:
    """An adapter that plain PEFT loads; ``base`` is how the world calls the model it belongs to."""
    directory.mkdir(parents=True)
    trained = _as_saved(policy.model)
    assert all(tensor.dtype is torch.float32 for tensor in trained.values())
    save_file(trained, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = policy.model.peft_config
    config["default"].save_pretrained(str(directory))
    path = directory / "adapter_config.json"
    content = json.loads(path.read_text())
    # PEFT puts the local path here, which means nothing elsewhere, and the modules in an order that changes by process.
    _rewrite(path, base_model_name_or_path=base, target_modules=sorted(content["target_modules"]))
    if content.get("feedforward_modules"):
        _rewrite(path, feedforward_modules=sorted(content["feedforward_modules"]))
    if INITIAL in config:
        scale = content["lora_alpha"] / (math.sqrt(content["r"]) if content["use_rslora"] else content["r"])
        _rewrite(path, r=2 * content["r"], lora_alpha=2 * content["r"] * scale, use_rslora=False)


def gather(policy: Policy, directory: Path | None) -> None:
    """Write the whole model in bf16, for ``save_model``. All processes that share it must call this; None: only help
    the one that writes.
    """
    model: Any = policy.base
    if isinstance(getattr(model, "score", None), nn.Identity):  # a reward model's head is in its place again
        model.score = policy.head
    policy.parameters()  # puts away what a pass has left whole
    with policy.own_weights():
        kept, tied = model.state_dict(keep_vars=True), model.all_tied_weights_keys
        tensors.save({name: t for name, t in kept.items() if name not in tied}, directory, torch.bfloat16)


def save_model(policy: Policy, directory: Path, gathered: Path, *, source: Path, chat_template: str) -> None:
    """The model that was ``gathered``, with everything else of ``source``; a ``chat_template`` replaces its own."""
    model: PreTrainedModel = policy.base
    model.config.distributed_config = None  # or transformers would gather it once more, from processes that are gone
    mapped = Weights(gathered)
    stored = {name: mapped[name] for name in mapped.specs}
    model.save_pretrained(directory, state_dict=stored, max_shard_size=_LARGEST_FILE)
    shutil.rmtree(gathered)
    # Configuration and tokenizer have not changed: theirs, rather than what transformers would write for them.
    copy_all_but_weights(source, directory)
    set_dtype(directory, torch.bfloat16)
    if chat_template:
        set_chat_template(directory, chat_template)


def _is_layered(model: nn.Module) -> bool:
    """PEFT's adapters in layers, whose file holds all that is trained."""
    return hasattr(model, "peft_config") and not virtual_tokens(model)


def _adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names of PEFT's files, which leave out the adapter's own. A matrix that is
    embedding and head at once stands under both.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {_file_name(name): p for name, p in named if p.requires_grad}


def _file_name(name: str) -> str:
    name = name.replace(".modules_to_save.default.", ".")
    if name.endswith(".lora_magnitude_vector.default.weight"):
        return name.removesuffix(".default.weight")
    return name.removesuffix(".default").replace(".default.", ".")


def _initial(model: nn.Module) -> dict[str, nn.Parameter]:
    """What PiSSA's adapter began as, under the names of what it has become."""
    return {name.replace(f".{INITIAL}.", "."): p for name, p in model.named_parameters() if f".{INITIAL}." in name}


def _as_saved(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors as the file has them. PiSSA's is saved as what it adds to the untouched base, with twice
    the rank: ``[B, -B0] [A; A0]``.
    """
    saved = {name: p.detach().clone() for name, p in _adapter_parameters(model).items()}
    for name, p in _initial(model).items():
        own, first = saved[name], p.detach()
        saved[name] = torch.cat([own, first]) if ".lora_A." in name else torch.cat([own, -first], dim=1)
    return {name: tensor.contiguous() for name, tensor in saved.items()}


def _put_back(saved: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """The opposite."""
    initial = _initial(model)
    for name, p in _adapter_parameters(model).items():
        if name in initial:
            side, sign = (0, 1) if ".lora_A." in name else (1, -1)
            own, first = saved[name].chunk(2, dim=side)
            p.data.copy_(own)
            initial[name].data.copy_(sign * first)
        else:
            p.data.copy_(saved[name])
