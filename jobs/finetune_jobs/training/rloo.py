"""REINFORCE leave-one-out (Ahmadian et al. 2024, "Back to Basics", arXiv:2402.14740).

No critic and no clipping: a whole answer is one action, and what it is compared with is the mean reward of the other
answers to the same prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from finetune_jobs.training.rollout import Floats, Rollouts


@dataclass(frozen=True)
class RLOO:
    """The algorithm."""

    epochs: int = 1
    critic: bool = False
    metrics: tuple[str, ...] = ()

    def targets(self, rollouts: Rollouts, kl: float) -> dict[str, Floats]:
        """What a token's loss is computed from. ``kl``: price of a nat."""
        return {"advantages": leave_one_out(rollouts, kl)[:, None] * rollouts.mask.astype(np.float64)}

    def weight(self, rollouts: Rollouts) -> float:
        """The loss is a mean over answers."""
        return float(len(rollouts.mask))

    def loss(self, log_probs: Tensor, values: Tensor, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Minus the advantage times the answer's log-probability, the sum of its tokens'."""
        return -(tokens["advantages"] * log_probs).sum(), log_probs.new_zeros(0)

    def next_kl(self, kl: float, measured: float) -> float:
        """It stays."""
        return kl


def leave_one_out(rollouts: Rollouts, kl: float) -> Floats:
    """(answers,) ``R - mean of the others' R``, where R is the reward less the price of the answer's log-ratio."""
    groups = rollouts.by_prompt(rollouts.rewards - kl * rollouts.kl)
    others = (groups.sum(1, keepdims=True) - groups) / (rollouts.per_prompt - 1)
    advantages: Floats = (groups - others).reshape(-1)
    return advantages
