"""Which examples each optimizer step sees, at which learning rate, and when a checkpoint is due.

Pure functions of the step's number, so that a resumed run needs no state to go on with the same data at the same rate.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from finetune_api.types import Checkpoint, Training

LONGEST_INTERVAL = 200
"""Steps between checkpoints are never more unless the user says so."""


@dataclass(frozen=True)
class Schedule:
    """The whole run, laid out in advance."""

    examples: int
    batch_size: int
    total_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The last of them sees fewer examples where the batch size does not divide their number."""
        return math.ceil(self.examples / self.batch_size)

    def batch(self, step: int) -> Sequence[int]:
        """Indices of the examples of the step after ``step`` finished ones; each epoch has its own order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.examples, self.seed, epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size]


def plan(examples: int, training: Training, seed: int) -> Schedule:
    """The schedule of resolved hyper-parameters (``finetune_api.defaults``) over so many examples."""
    per_epoch = math.ceil(examples / training.batch_size)
    epochs = training.epochs or 1.0
    total = training.max_steps or max(1, math.ceil(epochs * per_epoch - 1e-9))
    return Schedule(examples, training.batch_size, total, seed)


def learning_rate(training: Training, step: int, total_steps: int) -> float:
    """The rate of the step after ``step`` finished ones: transformers' formulas, linear warm-up from 0 first.

    The warm-up is rounded down to whole steps: its first step has rate 0, which a short run cannot afford.
    """
    peak = training.learning_rate or 0.0
    warmup = 0 if training.scheduler == "constant" else int(training.warmup_ratio * total_steps)
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    match training.scheduler:
        case "linear":
            return peak * (1 - done)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
        case _:
            return peak


def checkpoint_interval(checkpoint: Checkpoint, total_steps: int) -> int:
    """Steps between checkpoints, and evaluations: a tenth of the run, at most 200, unless written."""
    if checkpoint.steps == "auto":
        return min(LONGEST_INTERVAL, math.ceil(total_steps / 10))
    return checkpoint.steps


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # the same in every process and Python version
    return order
