"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, section 4), the mean over answers.

Single answers, each desirable or not. An answer's value is measured from ``z0``, an estimate of the KL divergence of
the policy from the reference: the mean log-ratio over prompts with answers to other prompts (``mismatched``). It is
made anew for every step, from all examples of the step before their first pass, so neither micro-batches nor processes
change it; and it is a plain number, which no gradient passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune_jobs.training.collators import Example, MicroBatch, Tokens
from finetune_jobs.training.losses import answer_log_probs

_DESIRABLE = "desirable"


@dataclass(frozen=True)
class KTO:
    """Rewards are ``beta * (log pi - log reference)``. The first loss is half the mean weight."""

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    metrics: tuple[str, ...] = (
        "kl",
        "rewards/accuracies",
        "rewards/desirable",
        "rewards/undesirable",
        "logps/desirable",
        "logps/undesirable",
        _DESIRABLE,
    )
    """``rewards/accuracies``: how often a reward lies on its label's side of ``beta * z0``; a tie is no success."""

    def weight(self, example: Example) -> float:
        """An answer counts once, however long it is."""
        return 1.0

    def loss(self, log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Each answer's weight less its value."""
        answers = answer_log_probs(log_probs, batch)
        rewards = self.beta * (answers - batch.reference)
        z0 = max(0.0, batch.kl)  # a divergence is never negative, its estimate may be
        good = batch.desirable
        margins = torch.where(good, rewards - self.beta * z0, self.beta * z0 - rewards)
        weights = torch.where(good, self.desirable_weight, self.undesirable_weight)
        losses = weights * (1 - torch.sigmoid(margins))
        watched = (
            torch.full_like(rewards, z0),
            (margins > 0).float(),
            rewards * good,
            rewards * ~good,
            answers * good,
            answers * ~good,
            good.float(),
        )
        return losses.sum(), torch.stack([w.detach().sum() for w in watched])

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """Rewards and log-probabilities as means over the answers of their kind, where there are any."""
        share = {"desirable": means[_DESIRABLE], "undesirable": 1 - means[_DESIRABLE]}
        found = {}
        for name, value in means.items():
            part = share.get(name.partition("/")[2], 1.0)
            if name != _DESIRABLE and part > 0:
                found[name] = value / part
        if min(share.values()) > 0:
            found["rewards/margins"] = found["rewards/desirable"] - found["rewards/undesirable"]
        return found


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """The prompt of each example before the answer of the next one that has another prompt, the first following the
    last. None for a single example: its own answer tells nothing.

    No longer than the longest example, so that they fit where those do.
    """
    if len(examples) < 2:
        return []
    split = [_split(example) for example in examples]
    prompts = [prompt.tobytes() for prompt, _ in split]
    count, longest = len(examples), max(example.longest for example in examples)
    other = [(i + 1) % count for i in range(count)]
    if len(set(prompts)) > 1:
        for i in [*reversed(range(count)), *reversed(range(count))]:  # twice, for the last ones look past the first
            following = (i + 1) % count
            other[i] = following if prompts[following] != prompts[i] else other[following]
    found = []
    for i, j in enumerate(other):
        prompt, answer = split[i][0], split[j][1]
        ids = np.concatenate([prompt, answer])[:longest]
        found.append(Example((Tokens(ids, np.arange(len(ids)) >= len(prompt)),)))
    return found


def _split(example: Example) -> tuple[np.ndarray, np.ndarray]:
    (tokens,) = example.sequences
    at = int(tokens.supervised.argmax())
    return tokens.ids[:at], tokens.ids[at:]
