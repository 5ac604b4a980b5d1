"""The training loop: optimizer steps, evaluation, checkpoints, and being told to stop.

Not transformers' Trainer, nor TRL's: see docs/adr/005-training.md. The rules that everything here serves:

- A step's loss is the sum over its answers divided by their weight in the whole step, over micro-batches and processes.
- All that a step depends on is its number and the state at its start: the examples, the rate and the random numbers are
  functions of the number. So a run that was interrupted ends with the same weights, bit for bit, as one that was not.
- Work is done when ``step == total_steps``, or early stopping says so; never because this function returned.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune_api.types import Checkpoint, Training, Validation
from finetune_jobs.run.context import Context
from finetune_jobs.run.errors import PreemptedError, StageError
from finetune_jobs.training import snapshots, weights
from finetune_jobs.training.collators import Example, Layout, MicroBatch, collate
from finetune_jobs.training.distributed import Peers
from finetune_jobs.training.losses import Objective, answer_log_probs, token_log_probs
from finetune_jobs.training.model import Policy
from finetune_jobs.training.noise import Noise
from finetune_jobs.training.optimizer import Optimizer
from finetune_jobs.training.schedule import Schedule, checkpoint_interval, learning_rate

_log = logging.getLogger("finetune.training")
Point = dict[str, float]
_TOLD = ("rewards/accuracies", "rewards/margins")
"""Metrics that progress shows beside the loss, where a loss has them."""


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


@dataclass(frozen=True)
class Sets:
    """The examples, with their reference log-probabilities where the loss compares with them."""

    train: Sequence[Example]
    eval: Sequence[Example]
    mismatched: Callable[[int], Sequence[Example]] | None = None
    """For kto: by step, what its KL divergence is estimated from."""
    mismatched_eval: Sequence[Example] = ()
    """The same for the evaluation set."""
    extras: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """Computed once before the first step, kept with every checkpoint."""


class Loop:
    """One run over one model. ``fit`` is the only entry; everything else is one part of it."""

    def __init__(
        self,
        ctx: Context,
        settings: Settings,
        policy: Policy,
        objective: Objective,
        sets: Sets,
        schedule: Schedule,
        layout: Layout,
        peers: Peers,
        read: Callable[[Policy, MicroBatch], torch.Tensor] = token_log_probs,
    ) -> None:
        """``read``: what of the model's answer the objective looks at."""
        self.read = read
        self.ctx, self.settings, self.policy, self.objective = ctx, settings, policy, objective
        self.sets, self.schedule, self.layout, self.peers = sets, schedule, layout, peers
        alpha = settings.training.neftune_noise_alpha
        self.noise = Noise(policy, alpha) if alpha is not None else None
        self.optimizer = Optimizer(policy, settings.training)
        self.state = State(resume_setting=settings.checkpoint.resume_from)
        self.interval = checkpoint_interval(settings.checkpoint, schedule.total_steps)
        self._told_to_stop = False
        self._saved_step = 0
        self._restored_step = 0
        self._saved_time = time.monotonic()

    def fit(self, start: Path | None) -> State:
        """Train to the end, from ``start`` (a fetched checkpoint) or the beginning, and leave the best weights.

        Raises PreemptedError once told to stop and saved, StageError when the loss is no number.
        """
        if start is not None:
            self._restore(start)
        while True:
            if self._evaluation_due():
                self._evaluate()
            if self._told_to_stop:
                self._leave()
            if self._save_due():
                self._save()
            if self._finished():
                break
            self._step()
        self._take_best()
        return self.state

    def _finished(self) -> bool:
        return self.state.stopped_early or self.state.step >= self.schedule.total_steps

    def _step(self) -> None:
        started = time.monotonic()
        state, total = self.state, self.schedule.total_steps
        examples = [self.sets.train[i] for i in self.schedule.batch(state.step)]
        weight = sum(self.objective.weight(e) for e in examples)
        _seed_everything(self.settings.seed, state.step, self.peers.rank)
        self.policy.model.train()
        kl = self._divergence(self.sets.mismatched(state.step)) if self.sets.mismatched else 0.0
        if kl is None:
            return
        sums = torch.zeros(1 + len(self.objective.metrics), device=self.policy.device)
        dropped = False
        for group, counts in self._turns(examples):
            if self._stopping():
                dropped = True
                break
            loss, metrics = self._sums([examples[i] for i in group], kl)
            self.optimizer.backward(loss / weight if counts else 0 * loss)
            if counts:
                sums += torch.cat([loss.detach().reshape(1), metrics])
        told = self.ctx.stop.requested
        added = self.peers.sum(np.array([dropped, told, *sums.double().tolist()]))
        self._told_to_stop = bool(added[1])
        if added[0]:  # some process left the step half done: all forget it, the next attempt does it again
            self.optimizer.zero_grad()
            return
        means = added[2:] / weight
        if not math.isfinite(means[0]):
            raise self._not_a_number("loss", means[0])
        rate = learning_rate(self.settings.training, state.step, total)
        self.peers.sum_gradients(self.policy.trainable)
        norm = self.optimizer.step(rate)
        if norm is None:
            raise self._not_a_number("gradient", math.nan)
        state.step += 1
        seconds = time.monotonic() - started
        tokens = sum(e.tokens for e in examples)
        state.tokens += tokens
        state.seconds += seconds
        figures = dict(zip(("loss", *self.objective.metrics), map(float, means), strict=True))
        self._note(figures, weight, rate, norm)
        if self.peers.first:
            latest = {"evalLoss": state.evaluations[-1]["evalLoss"]} if state.evaluations else {}
            step_figures = self.objective.figures(figures)
            watched = {name: step_figures[name] for name in _TOLD if name in step_figures}
            shown = {"loss": figures["loss"], **latest, **watched, "learningRate": rate, "gradNorm": norm}
            self.ctx.progress.report(state.step, total, shown, tokens / seconds)

    def _turns(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], bool]]:
        return self.layout.turns(examples, self.peers.rank, self.peers.size, together=self.policy.sharded)

    def _stopping(self) -> bool:
        """Each process by itself, but where a pass needs them all: those must leave together."""
        requested = self.ctx.stop.requested
        return self.peers.any(requested) if self.policy.sharded else requested

    def _divergence(self, examples: Sequence[Example]) -> float | None:
        """The mean log-ratio of all examples' answers between policy and reference; None when told to stop meanwhile.

        Gradients are on where they are on in training, though none is taken: it must be the very same arithmetic.
        """
        total, dropped = 0.0, False
        for group, counts in self._turns(examples):
            if self._stopping():
                dropped = True
                break
            batch = collate([examples[i] for i in group], packed=self.layout.packed).to(self.policy.device)
            answers = answer_log_probs(token_log_probs(self.policy, batch), batch).detach()
            if counts:
                total += float((answers - batch.reference).double().sum())
        added = self.peers.sum(np.array([dropped, total]))
        if added[0]:
            self._told_to_stop = True
            return None
        return float(added[1]) / max(1, len(examples))

    def _sums(self, examples: Sequence[Example], kl: float) -> tuple[torch.Tensor, torch.Tensor]:
        batch = replace(collate(examples, packed=self.layout.packed).to(self.policy.device), kl=kl)
        if self.noise is not None:
            self.noise.expect(batch)
        return self.objective.loss(self.read(self.policy, batch), batch)

    def _note(self, figures: dict[str, float], weight: float, rate: float, norm: float) -> None:
        """Add the step to the loss curve: a point for the first step, for each ``loggingSteps`` and for the last."""
        state = self.state
        window = state.window
        for name, value in figures.items():
            window[name] = window.get(name, 0.0) + value * weight
        window["weight"] = window.get("weight", 0.0) + weight
        every = self.settings.training.logging_steps
        if state.step == 1 or state.step % every == 0 or state.step == self.schedule.total_steps:
            point = self.objective.figures({name: window[name] / window["weight"] for name in figures})
            epoch = state.step / self.schedule.steps_per_epoch
            where = {"step": state.step, "epoch": round(epoch, 4), "tokens": state.tokens}
            finite = {"gradNorm": norm} if math.isfinite(norm) else {}  # fp16: the scaler skipped this step
            state.curve.append({**where, **point, "learningRate": rate, **finite})
            state.window = {}
            if self.peers.first:
                _log.info("step %d of %d: loss %.4f", state.step, self.schedule.total_steps, point["loss"])

    def _evaluation_due(self) -> bool:
        step, done = self.state.step, [int(e["step"]) for e in self.state.evaluations]
        on_time = step % self.interval == 0 or step == self.schedule.total_steps
        return bool(self.sets.eval) and step > 0 and on_time and step not in done and not self._told_to_stop

    def _evaluate(self) -> None:
        """Add the mean loss over the evaluation set to the state, unless told to stop meanwhile."""
        started = time.monotonic()
        self.policy.model.eval()
        sums = torch.zeros(1 + len(self.objective.metrics), dtype=torch.float64, device=self.policy.device)
        with torch.no_grad():
            kl = self._divergence(self.sets.mismatched_eval) if self.sets.mismatched_eval else 0.0
            if kl is None:
                return
            for group, counts in self._turns(self.sets.eval):
                if self._stopping():
                    break
                loss, metrics = self._sums([self.sets.eval[i] for i in group], kl)
                if counts:
                    sums += torch.cat([loss.reshape(1), metrics])
        added = self.peers.sum(np.array([self.ctx.stop.requested, *sums.tolist()]))
        self._told_to_stop = bool(added[0])
        if self._told_to_stop:
            return
        means = added[1:] / sum(self.objective.weight(e) for e in self.sets.eval)
        state = self.state
        loss_now = float(means[0])
        if not math.isfinite(loss_now):
            raise self._not_a_number("evaluation loss", loss_now)
        state.seconds += time.monotonic() - started
        figures = self.objective.figures(dict(zip(self.objective.metrics, map(float, means[1:]), strict=True)))
        watched = {f"eval/{name}": value for name, value in figures.items()}
        state.evaluations.append({"step": state.step, "evalLoss": loss_now, **watched})
        if self.peers.first:
            _log.info("step %d: evaluation loss %.4f", state.step, loss_now)
        self._judge(loss_now)

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
        return step > self._saved_step and (step % self.interval == 0 or self._finished() or late)

    def _save(self) -> None:
        """Write the state down and hand it to the store, which uploads it while the training goes on."""
        self._saved_step = self.state.step
        self._saved_time = time.monotonic()
        if self.peers.first:
            replace = self.state.step == self._restored_step
            snapshots.save(self.ctx, self.policy, self.optimizer, asdict(self.state), self.sets.extras, replace=replace)

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

    def _not_a_number(self, what: str, value: float) -> StageError:
        training = self.settings.training
        return StageError(
            f"the {what} is {value} at step {self.state.step + 1}: the training diverged. Lower "
            f"{self.settings.path}.training.learningRate (now {training.learning_rate:g}), or raise warmupRatio "
            f"(now {training.warmup_ratio:g})"
        )


def _seed_everything(seed: int, step: int, rank: int) -> None:
    """Draw all randomness (dropout, noise) from the step's number: then no generator's state need be saved."""
    number = int.from_bytes(random.Random(f"{seed}/{step}/{rank}").randbytes(4))
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
