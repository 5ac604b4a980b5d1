"""The life of a training run: steps, evaluations, checkpoints, and being told to stop, whatever a step is.

Not transformers' Trainer, nor TRL's: see docs/adr/005-training.md. The rules that everything here serves:

- All that a step depends on is its number and the state at its start: the examples, the rate and the random numbers are
  functions of the number. So a run that was interrupted ends with the same weights, bit for bit, as one that was not.
- Work is done when ``step == total_steps``, or early stopping says so; never because this function returned.
"""

import logging
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune_api.types import Checkpoint, Training, Validation
from finetune_jobs.run.context import Context
from finetune_jobs.run.errors import PreemptedError, StageError
from finetune_jobs.training import snapshots, weights
from finetune_jobs.training.collators import Layout
from finetune_jobs.training.distributed import Peers
from finetune_jobs.training.model import Policy
from finetune_jobs.training.optimizer import Optimizer
from finetune_jobs.training.schedule import Schedule, checkpoint_interval, learning_rate

_log = logging.getLogger("finetune.training")
Point = dict[str, float]
Extras = Mapping[str, npt.NDArray[np.float32]]


@dataclass
class State:
    """How far the run is, but for weights and optimizer: saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Read in training, padding not counted."""
    seconds: float = 0.0
    """Spent in steps and evaluations, over all attempts."""
    best_step: int = 0
    best_loss: float | None = None
    """Lowest evaluation loss so far."""
    without_progress: int = 0
    """Evaluations since the loss fell by more than the threshold of early stopping."""
    stopped_early: bool = False
    curve: list[Point] = field(default_factory=list)
    """Means over the steps since the point before."""
    evaluations: list[Point] = field(default_factory=list)
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last point of the curve."""
    carried: dict[str, float] = field(default_factory=dict)
    """What else an algorithm takes from one step to the next."""
    resumed_from: list[int] = field(default_factory=list)
    resume_setting: int | str = "auto"
    """``checkpoint.resumeFrom`` of the run that this is a state of."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for, resolved."""

    path: str
    """``spec.pipeline[1].sft``, for messages."""
    training: Training
    checkpoint: Checkpoint
    validation: Validation
    seed: int


class Trainer(ABC):
    """One run over one model. ``fit`` is the only entry; what a step and an evaluation are, the children say."""

    def __init__(
        self,
        ctx: Context,
        settings: Settings,
        policy: Policy,
        schedule: Schedule,
        layout: Layout,
        peers: Peers,
        counts: Mapping[str, int],
        extras: Extras,
    ) -> None:
        """``counts``: examples of ``train`` and ``eval``; ``extras``: computed once, kept with every checkpoint."""
        self.ctx, self.settings, self.policy, self.schedule = ctx, settings, policy, schedule
        self.layout, self.peers, self.counts, self.extras = layout, peers, counts, extras
        self.optimizer = Optimizer(policy, settings.training)
        self.state = State(resume_setting=settings.checkpoint.resume_from)
        self.interval = checkpoint_interval(settings.checkpoint, schedule.total_steps)
        self.told_to_stop = False
        self._saved_step = 0
        self._restored_step = 0
        self._saved_time = time.monotonic()

    @abstractmethod
    def step(self) -> None:
        """Take one step and ``note`` it. Told to stop meanwhile: set ``told_to_stop``, and leave the state as it was
        or finish the step.
        """

    @abstractmethod
    def evaluate(self) -> None:
        """Call ``judge`` with the figures on the evaluation set; told to stop meanwhile: set ``told_to_stop``."""

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """What is shown of a step's figures, or of their means over several steps."""
        return dict(means)

    def fit(self, start: Path | None) -> State:
        """Train to the end, from ``start`` (a fetched checkpoint) or the beginning, and leave the best weights.

        Raises PreemptedError once told to stop and saved, StageError when the loss is no number.
        """
        if start is not None:
            self._restore(start)
        while True:
            if self._evaluation_due():
                self.evaluate()
            if self.told_to_stop:
                self._leave()
            if self._save_due():
                self._save()
            if self._finished():
                break
            self.step()
        self._take_best()
        return self.state

    def _finished(self) -> bool:
        return self.state.stopped_early or self.state.step >= self.schedule.total_steps

    @property
    def rate(self) -> float:
        """The learning rate of the step to come."""
        return learning_rate(self.settings.training, self.state.step, self.schedule.total_steps)

    def update(self) -> float:
        """Add up the gradients of all processes and change the weights; the gradients' norm."""
        if not self.policy.divided:  # there they are added up on the way back
            self.peers.sum_gradients(self.policy.trainable)
        norm = self.optimizer.step(self.rate)
        if norm is None:
            raise self.not_a_number("gradient", math.nan)
        return norm

    def note(self, figures: Point, weight: float, norm: float, tokens: int, seconds: float, told: Point) -> None:
        """The step is done. Add it to the loss curve: a point for the first step, for each ``loggingSteps`` and for the
        last. ``weight``: of its figures in means over steps; ``told``: what progress shows.
        """
        state, rate, total = self.state, self.rate, self.schedule.total_steps
        state.step += 1
        state.tokens += tokens
        state.seconds += seconds
        window = state.window
        for name, value in figures.items():
            window[name] = window.get(name, 0.0) + value * weight
        window["weight"] = window.get("weight", 0.0) + weight
        every = self.settings.training.logging_steps
        if state.step == 1 or state.step % every == 0 or state.step == total:
            point = self.figures({name: window[name] / window["weight"] for name in figures})
            epoch = state.step / self.schedule.steps_per_epoch
            where = {"step": state.step, "epoch": round(epoch, 4), "tokens": state.tokens}
            finite = {"gradNorm": norm} if math.isfinite(norm) else {}  # fp16: the scaler skipped this step
            state.curve.append({**where, **point, "learningRate": rate, **finite})
            state.window = {}
            if self.peers.first:
                _log.info("step %d of %d: loss %.4f", state.step, total, point["loss"])
        if self.peers.first:
            latest = {"evalLoss": state.evaluations[-1]["evalLoss"]} if state.evaluations else {}
            shown = {"loss": figures["loss"], **latest, **told, "learningRate": rate, "gradNorm": norm}
            self.ctx.progress.report(state.step, total, shown, tokens / seconds)

    def _evaluation_due(self) -> bool:
        step, done = self.state.step, [int(e["step"]) for e in self.state.evaluations]
        on_time = step % self.interval == 0 or step == self.schedule.total_steps
        return self.counts["eval"] > 0 and step > 0 and on_time and step not in done and not self.told_to_stop

    def judge(self, figures: Mapping[str, float], seconds: float) -> None:
        """Add an evaluation to the state, ``evalLoss`` and what else was seen, and draw the consequences."""
        loss = figures["evalLoss"]
        if not math.isfinite(loss):
            raise self.not_a_number("evaluation loss", loss)
        self.state.seconds += seconds
        self.state.evaluations.append({"step": self.state.step, **figures})
        if self.peers.first:
            _log.info("step %d: evaluation loss %.4f", self.state.step, loss)
        self._judge(loss)

    def _judge(self, loss: float) -> None:
        """Best checkpoint and early stopping."""
        state, early = self.state, self.settings.validation.early_stopping
        threshold = early.threshold if early else 0.0
        progress = state.best_loss is None or loss < state.best_loss - threshold
        state.without_progress = 0 if progress else state.without_progress + 1
        if state.best_loss is None or loss < state.best_loss:
            state.best_step, state.best_loss = state.step, loss
        if early is not None and state.without_progress >= early.patience and state.step < self.schedule.total_steps:
            state.stopped_early = True
            if self.peers.first:
                _log.info("step %d: stopping early, %d evaluations without progress", state.step, early.patience)

    def _save_due(self) -> bool:
        step = self.state.step
        late = time.monotonic() - self._saved_time >= 60 * self.settings.checkpoint.minutes
        if self.policy.divided:  # all save together, and their clocks differ
            late = self.peers.any(late)
        return step > self._saved_step and (step % self.interval == 0 or self._finished() or late)

    def _save(self) -> None:
        """Write the state down and hand it to the store, which uploads it while the training goes on."""
        self._saved_step = self.state.step
        self._saved_time = time.monotonic()
        if self.peers.first:
            replace = self.state.step == self._restored_step
            snapshots.save(self.ctx, self.policy, self.optimizer, asdict(self.state), self.extras, replace=replace)
        elif self.policy.divided:
            snapshots.help_save(self.policy, self.optimizer)

    def _leave(self) -> None:
        step, total = self.state.step, self.schedule.total_steps
        if step > self._saved_step:
            self._save()
        if self.peers.first:
            snapshots.wait(self.ctx)
        raise PreemptedError(f"told to stop: saved at step {step} of {total}, the next attempt goes on from there")

    def _restore(self, start: Path) -> None:
        saved: dict[str, Any] = snapshots.restore(start, self.policy, self.optimizer)
        self.state = State(**saved)
        self.state.resumed_from.append(self.state.step)
        self.state.resume_setting = self.settings.checkpoint.resume_from
        # A checkpoint that was saved in a hurry lacks its evaluation; with it, it is saved again.
        self._restored_step = self.state.step
        self._saved_step = self.state.step - 1 if self._evaluation_due() else self.state.step
        if self.peers.first:
            _log.info("going on from step %d of %d", self.state.step, self.schedule.total_steps)

    def result_step(self) -> int:
        """The step whose weights are the result: the best evaluated one if that is wished, else the last."""
        return (self.settings.checkpoint.best and self.state.best_step) or self.state.step

    def _take_best(self) -> None:
        best = self.result_step()
        if best == self.state.step:
            return
        if self.peers.first:
            _log.info("the result is the checkpoint of step %d: evaluation loss %.4f", best, self.state.best_loss)
        directory = snapshots.fetch(self.ctx, best, self.peers)
        weights.load_trained(directory, self.policy)

    def not_a_number(self, what: str, value: float) -> StageError:
        """The training diverged."""
        training = self.settings.training
        return StageError(
            f"the {what} is {value} at step {self.state.step + 1}: the training diverged. Lower "
            f"{self.settings.path}.training.learningRate (now {training.learning_rate:g}), or raise warmupRatio "
            f"(now {training.warmup_ratio:g})"
        )


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Draw all randomness (dropout, noise) from the step's number: then no generator's state need be saved."""
    number = int.from_bytes(random.Random(f"{seed}/{step}/{rank}").randbytes(4))
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
