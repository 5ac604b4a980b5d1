"""Merge an adapter, or several as one, into a model directory: weights, every other file, the check of every module."""

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune_jobs.merging import files
from finetune_jobs.merging.adapter import is_unchanged, read_adapter
from finetune_jobs.merging.blend import Blend, Blended, blended
from finetune_jobs.merging.combine import Change
from finetune_jobs.merging.fold import (
    HEAD,
    MODULE_BOUND,
    OnTensor,
    fold,
    is_tied,
    match,
    module_errors,
    target_specs,
)
from finetune_jobs.merging.updates import LoraUpdate
from finetune_jobs.merging.weights import Weights
from finetune_jobs.run.errors import ConfigurationError, StageError

_log = logging.getLogger("finetune.merge")
_DISK_MARGIN_BYTES = 64 << 20


def merge(
    base_dir: Path,
    adapter: Path | Blend,
    merged_dir: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    on_tensor: OnTensor = lambda done, total: None,
) -> dict[str, Any]:
    """Write the merged model to ``merged_dir``, which exists; gives what belongs in the log.

    ``on_tensor`` counts every tensor combined, where there are several adapters, then every tensor written and every
    module checked.

    Raises:
        StageError: the disk is too small, or a merged module does not give what base and adapter give.
        DataError: the adapter does not fit the base, or has a feature that does not merge.
        ConfigurationError: the base has no 16-bit weights, or they do not fit the type.
    """
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ConfigurationError(
            "spec.model.source: the base is stored quantized and merge needs 16-bit weights; name the unquantized model"
        )
    base = Weights(base_dir)
    tied = is_tied(config, base)
    started = time.monotonic()
    if isinstance(adapter, Blend):
        blend = blended(adapter, base, tied, lambda done, count: on_tensor(done, 2 * count + len(base.specs)))
    else:
        blend = Blended(dict(match(read_adapter(adapter), base.specs, tied)), {})
    updates = blend.changes
    combined = time.monotonic()
    specs = target_specs(base, updates, dtype, tied)
    size = sum(spec.size_bytes for spec in specs.values())
    _require_disk(merged_dir, size)
    unchanged = is_unchanged(updates.values())
    if unchanged:
        _log.warning("the adapter changes nothing: all its updates are zero, so the merged model is the base")
    before = len(updates) if isinstance(adapter, Blend) else 0
    total = before + len(specs) + len(updates)

    fold(base, updates, specs, merged_dir, max_shard_bytes, lambda done: on_tensor(before + done, total))
    copied = files.copy_all_but_weights(base_dir, merged_dir)
    files.set_dtype(merged_dir, dtype)
    if tied and HEAD in updates:
        files.untie(merged_dir)
    folded = time.monotonic()
    written = before + len(specs)
    errors = module_errors(base, Weights(merged_dir), updates, lambda done: on_tensor(written + done, total))
    worst = _require_close(errors, MODULE_BOUND[dtype])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(specs),
        "sizeBytes": size,
        "shards": sorted(path.name for path in merged_dir.glob("*.safetensors")),
        "otherFiles": copied,
        "unchanged": unchanged,
        "modules": {
            "count": len(errors),
            "scales": sorted({update.scale for update in updates.values() if isinstance(update, LoraUpdate)}),
            "bound": MODULE_BOUND[dtype],
            "largestError": errors[worst],
            "largestErrorAt": worst,
            "errors": errors,
        },
        **({"svd": _loss_of_rank(blend.lost)} if blend.lost else {}),
        **({"secondsCombine": round(combined - started, 3)} if isinstance(adapter, Blend) else {}),
        "secondsFold": round(folded - combined, 3),
        "secondsCheck": round(time.monotonic() - folded, 3),
    }


def changes_of(adapter: Path, base_dir: Path) -> Mapping[str, Change]:
    """What an adapter does to each tensor of the base, by the tensor's name. Raises as ``merge``."""
    config, base = json.loads((base_dir / "config.json").read_text(encoding="utf-8")), Weights(base_dir)
    return match(read_adapter(adapter), base.specs, is_tied(config, base))


def _loss_of_rank(lost: dict[str, float]) -> dict[str, Any]:
    """How much of each change a low rank leaves out."""
    worst = max(lost, key=lost.__getitem__)
    return {"largestLoss": lost[worst], "largestLossAt": worst, "losses": lost}


def _require_close(errors: dict[str, float], bound: float) -> str:
    """The name of the module that is farthest off; raises if that is too far, or not a number."""
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    if not errors[worst] <= bound:  # so written that NaN fails
        raise StageError(
            f"merged tensor {worst} is wrong: its output differs from that of base and adapter by {errors[worst]:.2e} "
            f"(relative L2), at most {bound:.2e} is rounding"
        )
    return worst


def _require_disk(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size + _DISK_MARGIN_BYTES:
        raise StageError(
            f"the merged model takes {size / 2**30:.2f} GiB and {directory} has {free / 2**30:.2f} GiB free; "
            "free space there or give the stage a larger workspace"
        )
