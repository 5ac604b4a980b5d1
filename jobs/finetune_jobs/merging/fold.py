"""The update of every tensor, in float32, in blocks of rows, and the proof on random activations.

A block is small enough for the processor's cache, so memory does not grow with the model: the base is mapped, the
result is written where it belongs as soon as a block is done.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from finetune_jobs.merging.combine import Change
from finetune_jobs.merging.updates import Scaling, Update, Whole, fits
from finetune_jobs.merging.weights import ShardWriter, TensorSpec, Weights
from finetune_jobs.run.errors import ConfigurationError, DataError

MODULE_BOUND = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 1e-5}
"""Largest relative L2 distance of a merged module's output: about twice what rounding its weights to the type costs."""
_BLOCK_ELEMENTS = 1 << 20
_MAX_THREADS = 8
_PROBES = 8
HEAD = "lm_head.weight"

OnTensor = Callable[[int, int], None]
"""Told after every tensor: how many are done, of how many. May raise to stop."""


def is_tied(config: Mapping[str, Any], base: Weights) -> bool:
    """By the model's configuration its output head is the embedding."""
    return bool(config.get("tie_word_embeddings", HEAD not in base.specs))


def match(updates: Mapping[str, Update], specs: Mapping[str, TensorSpec], tied: bool) -> dict[str, Update]:
    """The updates by the name of the base tensor that each changes.

    ``tied``: the config says that the output head is the embedding. A head that was trained with it, and is the same,
    is left out; another one stays, though the base has no such tensor.

    Raises:
        DataError: an update without its tensor, or one of another shape; the message names it.
    """
    matched: dict[str, Update] = {}
    for wanted, update in updates.items():
        # A checkpoint saved from the bare model lacks the first part of the name (`model.`).
        name = next((n for n in (wanted, wanted.partition(".")[2]) if n in specs), None)
        if tied and wanted == HEAD and isinstance(update, Whole):
            twins = [u.tensor for n, u in updates.items() if isinstance(u, Whole) and n != HEAD]
            if any(torch.equal(twin, update.tensor) for twin in twins):
                continue
            name = HEAD
        if name is None and isinstance(update, Scaling) and update.optional:
            continue
        if name is None:
            raise DataError(
                f"adapter module {wanted.rpartition('.')[0]}: the base has no tensor {wanted}: another model"
            )
        shape = specs[name].shape if name in specs else update.shape
        if not fits(update, shape):
            raise DataError(
                f"tensor {name} has the shape {shape}, the adapter was trained on {update.shape}: another model"
            )
        if name in matched:
            raise DataError(f"tensor {name} is changed by two adapter modules, {wanted} and another")
        matched[name] = update
    return matched


def target_specs(base: Weights, updates: Mapping[str, Change], dtype: torch.dtype, tied: bool) -> dict[str, TensorSpec]:
    """What the merged model holds: the base's tensors with floating types cast.

    ``tied``: the config says that the output head is the embedding; a copy of it under the name ``lm_head.weight`` is
    left out. One that differs stays, since transformers then uses it in spite of the config. So does one of the
    adapter's own.
    """
    specs = {
        name: TensorSpec(dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)
        for name, spec in base.specs.items()
    }
    if HEAD in updates:
        return specs | {HEAD: TensorSpec(dtype, updates[HEAD].shape)}
    head = base.specs.get(HEAD)
    twins = [name for name, spec in base.specs.items() if spec == head and name != HEAD]
    if tied and any(torch.equal(base[name], base[HEAD]) for name in twins):
        del specs[HEAD]
    return specs


def fold(
    base: Weights,
    updates: Mapping[str, Change],
    specs: Mapping[str, TensorSpec],
    directory: Path,
    max_shard_bytes: int,
    on_tensor: Callable[[int], None],
) -> None:
    """Write the merged tensors of ``specs`` into ``directory``. ``updates`` go by tensor name (``match``).

    Raises:
        ConfigurationError: a weight is too large for float16.
    """

    def block(name: str, start: int, stop: int) -> None:
        update, target = updates.get(name), specs[name].dtype
        rows = _rows(_base(base, name, update))[start:stop]
        if update is not None:
            rows = update.rows(rows, start, stop)
        cast = rows.to(target)
        if target == torch.float16 and not bool(torch.isfinite(cast).all()):
            raise ConfigurationError(f"spec.pipeline: merge.dtype float16 cannot hold tensor {name}; use bfloat16")
        writer.write(name, start, cast)

    with ShardWriter(directory, specs, max_shard_bytes) as writer:
        in_blocks(specs, block, on_tensor)


def module_errors(
    base: Weights, merged: Weights, updates: Mapping[str, Change], on_tensor: Callable[[int], None]
) -> dict[str, float]:
    """Relative L2 distance of every merged module's output from what base and adapter give, by tensor name.

    On 8 random activations, in float32, with the weights as they lie on the disk.
    """
    generator = torch.Generator().manual_seed(0)
    widths = {_width(merged.specs[name].shape) for name in updates}
    probes = {width: torch.randn(width, _PROBES, generator=generator) for width in sorted(widths)}
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in updates}

    def block(name: str, start: int, stop: int) -> None:
        update = updates[name]
        x = probes[_width(merged.specs[name].shape)]
        wanted = update.outputs(_base(base, name, update)[start:stop], x, start, stop)
        got = merged[name][start:stop].float().reshape(stop - start, -1) @ x
        sums[name].append((float((got - wanted).square().sum()), float(wanted.square().sum())))

    in_blocks({name: merged.specs[name] for name in updates}, block, on_tensor)
    # A module whose output is exactly 0 both ways has no error; NaN must come through, so no max() here.
    return {
        name: math.sqrt(sum(e for e, _ in parts) / (sum(s for _, s in parts) or 1.0)) for name, parts in sums.items()
    }


def _base(base: Weights, name: str, update: Change | None) -> torch.Tensor:
    """The base's tensor; of one that only the adapter has, its own."""
    return update.tensor if isinstance(update, Whole) and name not in base.specs else base[name]


def _width(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() else tensor.reshape(1)


def in_blocks(
    specs: Mapping[str, TensorSpec], block: Callable[[str, int, int], None], on_tensor: Callable[[int], None]
) -> None:
    """Call ``block(name, first row, end row)`` for all rows of all tensors, on several threads."""
    with _one_torch_thread() as threads, ThreadPoolExecutor(threads, initializer=_single) as pool:
        tensors: list[list[Future[None]]] = []
        for name, spec in specs.items():
            tensors.append([pool.submit(block, name, *rows) for rows in ranges(spec.shape)])
        try:
            for done, futures in enumerate(tensors, start=1):
                for future in futures:
                    future.result()
                on_tensor(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The first and the end row of each block of a tensor."""
    rows = shape[0] if shape else 1
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@contextmanager
def _one_torch_thread() -> Iterator[int]:
    """Blocks run side by side, each on one thread; gives how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(before, len(os.sched_getaffinity(0)), _MAX_THREADS)
    finally:
        torch.set_num_threads(before)


def _single() -> None:
    torch.set_num_threads(1)
