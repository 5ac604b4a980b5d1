"""Read a PEFT LoRA adapter: for every module that it changes, ``scale``, A and B.

What we cannot merge exactly is refused with words; no key of the file is ever passed over.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune_jobs.run.errors import DataError, InputMissingError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# A setting outside this list changes what the adapter computes, or may do so in a later PEFT: refused unless it is off.
_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),  # honoured below
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "init_lora_weights"),  # judged below
    *("inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),  # without effect unless another setting is on
}
# These start from A and B alone; PiSSA, OLoRA, LoftQ and the like also change the base weights.
_PLAIN_INIT = (True, False, "gaussian", "orthogonal", "eva")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True)
class LoraUpdate:
    """``W' = W + scale * b @ a``, W as the file has it; a and b in float32."""

    a: torch.Tensor
    """(r, columns of W)"""
    b: torch.Tensor
    """(rows of W, r)"""
    scale: float


def read_adapter(directory: Path) -> dict[str, LoraUpdate]:
    """The update of every module, by the module's name in the model (``model.layers.0.mlp.up_proj``).

    Raises:
        InputMissingError: not a PEFT adapter directory.
        DataError: a feature that does not merge, a key that is not LoRA's, shapes that do not fit, NaN or infinity.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise InputMissingError(f"{directory}: no {name}, so this is not a PEFT adapter")
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    _refuse_unsupported(config)

    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(directory / WEIGHTS).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise DataError(f"{WEIGHTS}: tensor {key!r} is not LoRA of a linear layer; it cannot be merged")
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{WEIGHTS}: tensor {key!r} is not finite: the training diverged; lower learningRate")
        parts.setdefault(match["module"], {})[match["part"]] = tensor.float()
    if not parts:
        raise DataError(f"{WEIGHTS}: the adapter is empty, there is nothing to merge")
    return {module: _update(config, module, pair) for module, pair in sorted(parts.items())}


def is_unchanged(updates: Iterable[LoraUpdate]) -> bool:
    """Every update is exactly zero: nothing was learned."""
    return not any(bool(update.b.any()) and bool(update.a.any()) for update in updates)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise DataError(f"{CONFIG}: peft_type is {kind or 'missing'}; merge folds in LORA adapters only")
    if config.get("bias", "none") != "none":
        raise DataError(f"{CONFIG}: bias is {config['bias']!r}; trained biases are not merged, train with bias none")
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INIT:
        raise DataError(f"{CONFIG}: init_lora_weights is {init!r}, which also changes the base; it is not merged")
    for name, value in config.items():
        if name not in _HARMLESS and value:
            raise DataError(f"{CONFIG}: {name} is {value!r}; an adapter with it is not merged, train without {name}")


def _update(config: dict[str, Any], module: str, pair: dict[str, torch.Tensor]) -> LoraUpdate:
    if len(pair) != 2:
        missing = "B" if "A" in pair else "A"
        raise DataError(f"{WEIGHTS}: module {module} has no lora_{missing}")
    if module.split(".")[-1] == "lm_head":
        raise DataError(f"{WEIGHTS}: LoRA on {module} is not merged; leave the output head out of lora.targetModules")
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if rank is None or alpha is None or rank <= 0:
        raise DataError(f"{CONFIG}: r and lora_alpha must be there, r above 0")
    if pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
        raise DataError(
            f"{WEIGHTS}: module {module} has lora_A {tuple(pair['A'].shape)} and lora_B {tuple(pair['B'].shape)}, "
            f"which is not the rank {rank:g} of {CONFIG}"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if config.get("fan_in_fan_out"):  # GPT-2's layers keep their weight as (in, out): the update is turned round too
        return LoraUpdate(pair["B"].T.contiguous(), pair["A"].T.contiguous(), scale)
    return LoraUpdate(pair["A"], pair["B"], scale)


def _pattern(patterns: dict[str, float] | None, module: str, default: float | None) -> float | None:
    """PEFT's rule: the first pattern that matches the end of the module's name at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
