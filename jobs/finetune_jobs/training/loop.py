"""Learning from examples, step by step: sft, preference and reward.

A step's loss is the sum over its answers divided by their weight in the whole step, over micro-batches and processes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from finetune_jobs.run.context import Context
from finetune_jobs.training.collators import Example, Layout, MicroBatch, collate
from finetune_jobs.training.distributed import Peers
from finetune_jobs.training.losses import Objective, answer_log_probs, token_log_probs
from finetune_jobs.training.model import Policy
from finetune_jobs.training.noise import Noise
from finetune_jobs.training.schedule import Schedule
from finetune_jobs.training.trainer import Extras, Settings, Trainer, seed_everything

_TOLD = ("rewards/accuracies", "rewards/margins")
"""Metrics that progress shows beside the loss, where a loss has them."""


@dataclass(frozen=True)
class Sets:
    """The examples, with their reference log-probabilities where the loss compares with them."""

    train: Sequence[Example]
    eval: Sequence[Example]
    mismatched: Callable[[int], Sequence[Example]] | None = None
    """For kto: by step, what its KL divergence is estimated from."""
    mismatched_eval: Sequence[Example] = ()
    """The same for the evaluation set."""
    extras: Extras = field(default_factory=dict)
    """Computed once before the first step, kept with every checkpoint."""


class Loop(Trainer):
    """A run over a set of examples."""

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
        counts = {"train": len(sets.train), "eval": len(sets.eval)}
        super().__init__(ctx, settings, policy, schedule, layout, peers, counts, sets.extras)
        self.objective, self.sets, self.read = objective, sets, read
        alpha = settings.training.neftune_noise_alpha
        self.noise = Noise(policy, alpha) if alpha is not None else None

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """As the objective shows them."""
        return self.objective.figures(means)

    def step(self) -> None:
        """On the examples that the schedule has for it; a stop drops it while micro-batches are left."""
        started = time.monotonic()
        state = self.state
        examples = [self.sets.train[i] for i in self.schedule.batch(state.step)]
        weight = sum(self.objective.weight(e) for e in examples)
        seed_everything(self.settings.seed, state.step, self.peers.rank)
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
        added = self.peers.sum(np.array([dropped, self.ctx.stop.requested, *sums.double().tolist()]))
        self.told_to_stop = bool(added[1])
        if added[0]:  # some process left the step half done: all forget it, the next attempt does it again
            self.optimizer.zero_grad()
            return
        means = added[2:] / weight
        if not math.isfinite(means[0]):
            raise self.not_a_number("loss", means[0])
        norm = self.update()
        figures = dict(zip(("loss", *self.objective.metrics), map(float, means), strict=True))
        told = {name: value for name, value in self.figures(figures).items() if name in _TOLD}
        tokens = sum(e.tokens for e in examples)
        self.note(figures, weight, norm, tokens, time.monotonic() - started, told)

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
            self.told_to_stop = True
            return None
        return float(added[1]) / max(1, len(examples))

    def _sums(self, examples: Sequence[Example], kl: float) -> tuple[torch.Tensor, torch.Tensor]:
        batch = replace(collate(examples, packed=self.layout.packed).to(self.policy.device), kl=kl)
        if self.noise is not None:
            self.noise.expect(batch)
        return self.objective.loss(self.read(self.policy, batch), batch)

    def evaluate(self) -> None:
        """The mean loss over the evaluation set."""
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
        self.told_to_stop = bool(added[0])
        if self.told_to_stop:
            return
        means = added[1:] / sum(self.objective.weight(e) for e in self.sets.eval)
        figures = self.figures(dict(zip(self.objective.metrics, map(float, means[1:]), strict=True)))
        watched = {f"eval/{name}": value for name, value in figures.items()}
        self.judge({"evalLoss": float(means[0]), **watched}, time.monotonic() - started)
