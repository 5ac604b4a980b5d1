"""Several adapters of one base as one change of its weights, tensor by tensor."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from finetune_jobs.merging.adapter import CONFIG, WEIGHTS, read_adapter
from finetune_jobs.merging.combine import (
    Change,
    Combination,
    combine,
    delta_of,
    smallest_of_largest,
)
from finetune_jobs.merging.fold import HEAD, in_blocks, match
from finetune_jobs.merging.updates import LoraUpdate, Update
from finetune_jobs.merging.weights import Weights
from finetune_jobs.run.errors import DataError


@dataclass(frozen=True)
class Blend:
    """Adapters with their weights, and how they become one."""

    adapters: Sequence[tuple[str, Path, float]]
    """What messages call it, its directory, its weight."""
    combination: Combination


@dataclass(frozen=True)
class Blended:
    """What comes of a blend."""

    changes: dict[str, Change]
    """By the name of the base's tensor."""
    lost: dict[str, float]
    """Of svd: the share of each change's L2 norm that its low rank leaves out."""


def blended(blend: Blend, base: Weights, tied: bool, on_tensor: Callable[[int, int], None]) -> Blended:
    """The one change of each tensor. ``on_tensor`` is told how many are done, of how many, and may raise to stop.

    Memory: the adapters, and for ties the largest tensor in float32.

    Raises:
        DataError: an adapter that does not fit the base, or cannot be combined so; the message names it.
    """
    found: list[Mapping[str, Update]] = []
    for name, directory, _ in blend.adapters:
        try:
            found.append(match(read_adapter(directory), base.specs, tied))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        if HEAD in found[-1] and HEAD not in base.specs:
            raise DataError(
                f"{name}: it trained an output head that is no longer the embedding, and has nothing in common with "
                "the others' there; leave modulesToSave out"
            )
    names = [name for name in base.specs if any(name in updates for updates in found)]
    changes: dict[str, Change] = {}
    lost: dict[str, float] = {}
    for done, name in enumerate(names):
        tick = partial(on_tensor, done, len(names))
        smallest_kept = partial(_smallest_kept, base, name, blend.combination.density, tick)
        changes[name], lost[name] = _combined(blend, found, name, smallest_kept)
        on_tensor(done + 1, len(names))
    return Blended(changes, lost if blend.combination.how == "svd" else {})


def _combined(
    blend: Blend, found: Sequence[Mapping[str, Update]], name: str, smallest_kept: Callable[[Update], float]
) -> tuple[Change, float]:
    updates = {place: updates[name] for place, updates in enumerate(found) if name in updates}
    weights = [weight for _, _, weight in blend.adapters]
    return combine(name, updates, weights, replace(blend.combination, rank=_rank(blend, found)), smallest_kept)


def _rank(blend: Blend, found: Sequence[Mapping[str, Update]]) -> int:
    """Of svd's result: as it is asked for, else the highest of all adapters."""
    ranks = (update.a.shape[0] for updates in found for update in updates.values() if isinstance(update, LoraUpdate))
    return blend.combination.rank or max(ranks, default=1)


def _smallest_kept(base: Weights, name: str, density: float, tick: Callable[[], None], update: Update) -> float:
    """From which magnitude on the ``density`` largest numbers of the delta are: of the very numbers that are folded."""
    spec = base.specs[name]
    width = math.prod(spec.shape[1:])
    magnitudes = np.empty(math.prod(spec.shape), np.float32)

    def block(name: str, start: int, stop: int) -> None:
        delta = delta_of(update, base[name][start:stop], start, stop)
        magnitudes[start * width : stop * width] = delta.abs().reshape(-1).numpy()

    in_blocks({name: spec}, block, lambda _: tick())
    return smallest_of_largest(magnitudes, density)


def write_adapter(blend: Blend, directory: Path) -> None:
    """The change of low rank that svd gives, as an adapter that PEFT loads on the same base."""
    found = [read_adapter(path) for _, path, _ in blend.adapters]
    rank = _rank(blend, found)
    configs = [json.loads((path / CONFIG).read_text(encoding="utf-8")) for _, path, _ in blend.adapters]
    turned = bool(configs[0].get("fan_in_fan_out"))  # a property of the model, so all agree
    tensors: dict[str, torch.Tensor] = {}
    modules = list(dict.fromkeys(name for updates in found for name in updates))
    for name in modules:
        change, _ = _combined(blend, found, name, lambda _: 0.0)
        assert isinstance(change, LoraUpdate)
        a, b = (change.b.T, change.a.T) if turned else (change.a, change.b)
        missing = rank - a.shape[0]  # a small layer has fewer dimensions than the rank
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    directory.mkdir(parents=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = configs[0] | {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config["target_modules"] = sorted(name.removesuffix(".weight") for name in modules)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
