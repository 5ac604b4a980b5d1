"""A run's state as a directory: all that going on bit for bit needs. The store keeps it (``store/checkpoints.py``).

Weights and optimizer in float32, the position and figures of the run, reference log-probabilities. No random
generator's state: the loop draws every number from the step's.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_jobs.run.context import Context
from finetune_jobs.run.errors import StorageError
from finetune_jobs.store import layout
from finetune_jobs.store.checkpoints import METRIC, CheckpointInfo
from finetune_jobs.training import weights
from finetune_jobs.training.distributed import Peers
from finetune_jobs.training.limits import disk_errors
from finetune_jobs.training.model import Policy
from finetune_jobs.training.optimizer import Optimizer

_log = logging.getLogger("finetune.training")
_STATE = "state.json"
_OPTIMIZER = "optimizer"
_EXTRAS = "extras.npz"


def save(
    ctx: Context,
    policy: Policy,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    extras: Mapping[str, npt.NDArray[np.float32]],
    *,
    replace: bool,
) -> None:
    """Write the state down and give it to the store, which uploads it in the background. For the first process.

    ``replace``: there is a checkpoint of this step, without its evaluation. Raises StageError when the disk is full.
    """
    step = state["step"]
    directory = ctx.workspace / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    with disk_errors(f"saving step {step}", directory):
        weights.save_trained(policy, directory)
        optimizer.save(directory / _OPTIMIZER)
        arrays: dict[str, Any] = dict(extras)
        np.savez(directory / _EXTRAS, **arrays)
        (directory / _STATE).write_text(json.dumps(state))
    evaluated = [e for e in state["evaluations"] if e["step"] == step]
    metrics = {METRIC: evaluated[-1]["evalLoss"]} if evaluated else {}
    if replace and (old := ctx.checkpoints.get(step)) is not None:
        _remove(ctx, old)
    try:
        ctx.checkpoints.save(step, directory, metrics)
    except StorageError as error:
        # The one before could not be stored. That costs safety, not results: go on, and try with this one.
        _log.warning("%s", error)
        for leftover in directory.parent.iterdir():
            if leftover != directory:
                shutil.rmtree(leftover, ignore_errors=True)
        ctx.checkpoints.save(step, directory, metrics)


def help_save(policy: Policy, optimizer: Optimizer) -> None:
    """What the other processes do meanwhile, where each has but a share of it."""
    weights.save_trained(policy, None)
    optimizer.save(None)


def wait(ctx: Context) -> None:
    """Return once all that was saved is committed, or cannot be."""
    try:
        ctx.checkpoints.drain()
    except StorageError as error:
        _log.warning("%s; the next attempt goes on from the checkpoint before", error)


def start(ctx: Context, setting: int | str, peers: Peers) -> Path | None:
    """The checkpoint that this attempt goes on from, on every node's disk; None for the beginning.

    ``setting`` is ``checkpoint.resumeFrom``. One other than ``auto`` is applied once: what was saved since carries it,
    and is gone on from. Raises InputMissingError when there is no checkpoint of the step that is asked for.
    """
    directory = ctx.workspace / "start"
    step = peers.share(lambda: _choose(ctx, setting, directory))
    if step is None:
        return None

    def bring() -> Path:
        if not peers.first:
            ctx.checkpoints.fetch(step, directory)
        return directory

    return peers.share_on_node(bring)


def _choose(ctx: Context, setting: int | str, directory: Path) -> int | None:
    """Bring the checkpoint to go on from into ``directory``, remove those that it undoes, and return its step."""
    newest = ctx.checkpoints.restore(directory)
    if newest is not None and setting in ("auto", read_state(directory)["resume_setting"]):
        return newest.step
    if setting == "auto":
        return None
    shutil.rmtree(directory, ignore_errors=True)
    if isinstance(setting, int):
        ctx.checkpoints.fetch(setting, directory)
    for later in ctx.checkpoints.list():
        if later.step > (setting if isinstance(setting, int) else 0):
            _remove(ctx, later)
    return setting if isinstance(setting, int) else None


def fetch(ctx: Context, step: int, peers: Peers) -> Path:
    """The checkpoint of that step on every node's disk; InputMissingError when it is not there."""
    peers.share(lambda: ctx.checkpoints.drain())
    directory = ctx.workspace / f"fetched-{step:08d}"

    def bring() -> Path:
        ctx.checkpoints.fetch(step, directory)
        return directory

    return peers.share_on_node(bring)


def restore(directory: Path, policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """Put weights and optimizer back and return the rest of the state."""
    weights.load_trained(directory, policy)
    optimizer.load(directory / _OPTIMIZER)
    return read_state(directory)


def read_state(directory: Path) -> dict[str, Any]:
    """The part of the state that is JSON."""
    state: dict[str, Any] = json.loads((directory / _STATE).read_text())
    return state


def read_extras(directory: Path) -> dict[str, npt.NDArray[np.float32]]:
    """What was computed once before the first step."""
    with np.load(directory / _EXTRAS) as saved:
        return dict(saved)


def _remove(ctx: Context, checkpoint: CheckpointInfo) -> None:
    keys = [file.key for file in checkpoint.files]
    directory = keys[0].partition(f"/{checkpoint.writer}/")[0]
    ctx.store.delete([layout.manifest_key(directory)])  # first: without it the files are no checkpoint
    ctx.store.delete(keys)
