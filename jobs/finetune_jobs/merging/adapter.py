"""Read a PEFT adapter: what it does to every tensor that it changes.

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

from finetune_jobs.merging.combine import Change
from finetune_jobs.merging.updates import LoraUpdate, Scaling, Update, Whole
from finetune_jobs.run.errors import DataError, InputMissingError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# A setting outside this list changes what the adapter computes, or may do so in a later PEFT: refused unless it is off.
_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),  # honoured below
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "use_dora", "modules_to_save", "init_lora_weights"),  # honoured or judged below
    *("feedforward_modules", "init_ia3_weights"),
    *("inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),  # without effect unless another setting is on
}
# These start from A and B alone; PiSSA, OLoRA, LoftQ and the like also change the base weights.
_PLAIN_INIT = (True, False, "gaussian", "orthogonal", "eva")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_IA3_KEY = re.compile(r"base_model\.model\.(.+)\.ia3_l")
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}


@dataclass
class _Parts:
    """The tensors of one adapted module, by what they are."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


def read_adapter(directory: Path) -> dict[str, Update]:
    """What is to be done to each tensor, by its name in the model (``model.layers.0.mlp.up_proj.weight``).

    Raises:
        InputMissingError: not a PEFT adapter directory.
        DataError: a feature that does not merge, a key that is not known, shapes that do not fit, NaN or infinity.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise InputMissingError(f"{directory}: no {name}, so this is not a PEFT adapter")
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    _refuse_unsupported(config)

    updates: dict[str, Update] = {}
    adapted: dict[str, _Parts] = {}
    for key, tensor in load_file(directory / WEIGHTS).items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{WEIGHTS}: tensor {key!r} is not finite: the training diverged; lower learningRate")
        if match := _KEY.fullmatch(key):
            setattr(adapted.setdefault(match["module"], _Parts()), _PARTS[match["part"]], tensor.float())
        elif module := _IA3_KEY.fullmatch(key):
            updates |= _scaled(config, module[1], tensor.float())
        elif whole := _trained_whole(config, key):
            updates[whole] = Whole(tensor)
        else:
            raise DataError(f"{WEIGHTS}: tensor {key!r} is not LoRA of a linear layer; it cannot be merged")
    if not adapted and not updates:
        raise DataError(f"{WEIGHTS}: the adapter is empty, there is nothing to merge")
    return updates | {f"{module}.weight": _update(config, module, parts) for module, parts in sorted(adapted.items())}


def _scaled(config: dict[str, Any], module: str, factors: torch.Tensor) -> dict[str, Update]:
    """Factors of a layer's inputs are a row, those of its outputs a column, and its bias is one more output."""
    turned = factors.T.contiguous() if config.get("fan_in_fan_out") else factors
    updates: dict[str, Update] = {f"{module}.weight": Scaling(turned)}
    if factors.shape[1] == 1:
        updates[f"{module}.bias"] = Scaling(factors[:, 0], optional=True)
    return updates


def _trained_whole(config: dict[str, Any], key: str) -> str | None:
    """The tensor's name in the model if it is a bias or of a module that was trained whole."""
    name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    module, _, kind = name.rpartition(".")
    saved = [*(config.get("modules_to_save") or []), *(("lm_head",) if config.get("ensure_weight_tying") else ())]
    parts = module.split(".")
    outer = [".".join(parts[: n + 1]) for n in range(len(parts))]
    whole = any(path.endswith(one) for one in saved for path in outer)  # PEFT's rule
    return name if whole or (kind == "bias" and config.get("bias", "none") != "none") else None


def is_unchanged(updates: Iterable[Change]) -> bool:
    """Nothing was learned, as far as can be told."""
    return all(update.unchanged for update in updates)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    kind = str(config.get("peft_type", "")).upper()
    if kind not in ("LORA", "IA3"):
        raise DataError(f"{CONFIG}: peft_type is {kind or 'missing'}; merge folds in adapters of LORA and IA3 only")
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INIT:
        raise DataError(f"{CONFIG}: init_lora_weights is {init!r}, which also changes the base; it is not merged")
    for name, value in config.items():
        if name not in _HARMLESS and value:
            raise DataError(f"{CONFIG}: {name} is {value!r}; an adapter with it is not merged, train without {name}")


def _update(config: dict[str, Any], module: str, parts: _Parts) -> LoraUpdate:
    a, b = parts.a, parts.b
    if a is None or b is None:
        missing = "A" if a is None else "B"
        raise DataError(f"{WEIGHTS}: module {module} has no lora_{missing}")
    if module.split(".")[-1] == "lm_head":
        raise DataError(f"{WEIGHTS}: LoRA on {module} is not merged; write `modulesToSave: [embed_tokens, lm_head]`")
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if rank is None or alpha is None or rank <= 0:
        raise DataError(f"{CONFIG}: r and lora_alpha must be there, r above 0")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise DataError(
            f"{WEIGHTS}: module {module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, "
            f"which is not the rank {rank:g} of {CONFIG}"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if config.get("fan_in_fan_out"):  # GPT-2's layers keep their weight as (in, out): the update is turned round too
        if parts.magnitude is not None:
            raise DataError(f"{CONFIG}: use_dora with fan_in_fan_out is not merged; train without use_dora")
        return LoraUpdate(b.T.contiguous(), a.T.contiguous(), scale)
    if bool(config.get("use_dora")) != (parts.magnitude is not None):
        raise DataError(f"{WEIGHTS}: module {module} and use_dora in {CONFIG} do not agree")
    return LoraUpdate(a, b, scale, parts.magnitude)


def _pattern(patterns: dict[str, float] | None, module: str, default: float | None) -> float | None:
    """PEFT's rule: the first pattern that matches the end of the module's name at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
