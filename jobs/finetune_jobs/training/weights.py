"""Trained weights on disk: PEFT's own format for an adapter, safetensors for a whole model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from finetune_jobs.merging.files import copy_all_but_weights, set_chat_template, set_dtype
from finetune_jobs.training.model import Policy, is_adapter

_ADAPTER = "adapter"
_ALL = "weights.safetensors"
_HEAD = "head.safetensors"
_SCORE = "base_model.model.score.weight"
"""What PEFT calls a sequence classifier's head in an adapter's file."""
_LARGEST_FILE = "4GB"


def save_trained(policy: Policy, directory: Path) -> None:
    """What was trained, in float32, for a checkpoint."""
    if is_adapter(policy.model):
        save_adapter(policy, directory / _ADAPTER, base="")
    else:
        trained = {name: p.detach().contiguous() for name, p in policy.model.named_parameters() if p.requires_grad}
        save_file(trained, directory / _ALL)
    if policy.head is not None:
        save_file({name: p.detach().contiguous() for name, p in policy.head.named_parameters()}, directory / _HEAD)


def load_trained(directory: Path, policy: Policy) -> None:
    """Put what ``save_trained`` wrote into the model, bit for bit."""
    if is_adapter(policy.model):
        saved = load_file(directory / _ADAPTER / "adapter_model.safetensors")
        own = _adapter_parameters(policy.model)
    else:
        saved = load_file(directory / _ALL)
        own = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
    if policy.head is not None:
        policy.head.load_state_dict(load_file(directory / _HEAD))


def save_reward_model(policy: Policy, directory: Path, *, base: str, source: Path, chat_template: str) -> None:
    """A reward model that transformers, with PEFT for an adapter, loads as a sequence classifier of one label."""
    assert policy.head is not None
    if is_adapter(policy.model):
        save_adapter(policy, directory, base=base)
        file = directory / "adapter_model.safetensors"
        score = {_SCORE: policy.head.weight.detach().contiguous()}
        save_file({**load_file(file), **score}, file, metadata={"format": "pt"})
        _rewrite(directory / "adapter_config.json", task_type="SEQ_CLS", modules_to_save=["score"])
        return
    policy.base.score = policy.head
    save_model(policy, directory, source=source, chat_template=chat_template)
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
    trained = {name: p.detach().contiguous() for name, p in _adapter_parameters(policy.model).items()}
    assert all(tensor.dtype is torch.float32 for tensor in trained.values())
    save_file(trained, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = policy.model.peft_config
    config["default"].save_pretrained(str(directory))
    path = directory / "adapter_config.json"
    content = json.loads(path.read_text())
    # PEFT puts the local path here, which means nothing elsewhere, and the modules in an order that changes by process.
    content["base_model_name_or_path"] = base
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def save_model(policy: Policy, directory: Path, *, source: Path, chat_template: str) -> None:
    """The whole model in bf16, with everything else of ``source``; a ``chat_template`` replaces its own."""
    model: PreTrainedModel = policy.base
    stored = {
        name: t.to("cpu", torch.bfloat16 if t.is_floating_point() else t.dtype)
        for name, t in model.state_dict().items()
    }
    model.save_pretrained(directory, state_dict=stored, max_shard_size=_LARGEST_FILE)
    # Configuration and tokenizer have not changed: theirs, rather than what transformers would write for them.
    copy_all_but_weights(source, directory)
    set_dtype(directory, torch.bfloat16)
    if chat_template:
        set_chat_template(directory, chat_template)


def _adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names of PEFT's files, which leave out the adapter's own."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
