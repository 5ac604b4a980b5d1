"""Group relative policy optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section 4.1.2).

No critic: an answer is compared with the others to the same prompt. The divergence from the reference is no part of
the reward but of the loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune_jobs.training.rollout import Floats, Rollouts

_EPSILON = 1e-4
"""Where all answers to a prompt are worth the same, nothing is learned from them."""


@dataclass(frozen=True)
class GRPO:
    """The algorithm with its constants."""

    kl: float
    """Price of a nat."""
    clip_range: float = 0.2
    epochs: int = 1
    critic: bool = False
    metrics: tuple[str, ...] = ("policyLoss", "clipped")

    def targets(self, rollouts: Rollouts, kl: float) -> dict[str, Floats]:
        """What a token's loss is computed from; ``share``: of the answer's mean."""
        tokens = rollouts.mask.astype(np.float64)
        return {
            "log_probs": rollouts.log_probs,
            "reference": rollouts.reference,
            "advantages": group_advantages(rollouts)[:, None] * tokens,
            "share": tokens / tokens.sum(1, keepdims=True),
        }

    def weight(self, rollouts: Rollouts) -> float:
        """The loss is the mean over answers of their means over tokens."""
        return float(len(rollouts.mask))

    def loss(self, log_probs: Tensor, values: Tensor, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sums of loss and ``metrics`` over some tokens, from what the policy says of them now (equation 3, with
        the divergence's unbiased estimate of equation 4).
        """
        ratio = (log_probs - tokens["log_probs"]).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        policy = torch.maximum(-tokens["advantages"] * ratio, -tokens["advantages"] * clipped)
        difference = tokens["reference"] - log_probs
        divergence = difference.exp() - difference - 1
        left_alone = (-tokens["advantages"] * clipped > -tokens["advantages"] * ratio).float()
        watched = torch.stack([(tokens["share"] * figure).detach().sum() for figure in (policy, left_alone)])
        return (tokens["share"] * (policy + self.kl * divergence)).sum(), watched

    def next_kl(self, kl: float, measured: float) -> float:
        """It stays."""
        return kl


def group_advantages(rollouts: Rollouts) -> Floats:
    """(answers,) rewards as deviations from the mean of the prompt's answers, in their standard deviation (that of a
    sample, as in TRL).
    """
    groups = rollouts.by_prompt(rollouts.rewards)
    spread = groups.std(1, ddof=1, keepdims=True)
    advantages: Floats = ((groups - groups.mean(1, keepdims=True)) / (spread + _EPSILON)).reshape(-1)
    return advantages
