"""Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) of answers, as in InstructGPT
(arXiv:2203.02155) and with the details that arXiv:2403.17031 found to matter.

A token is an action. Its reward is minus the price of its log-ratio to the reference; the last one's has the answer's
reward on top. Advantages follow from rewards and values; then the same answers are learned from several times, and a
token or value that has moved too far is left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune_jobs.training.rollout import Floats, Rollouts

VALUE_COEFFICIENT = 0.1
"""Of the value loss beside the policy loss (arXiv:2403.17031, table 6)."""
_KL_GAIN = 0.1
_KL_LARGEST_ERROR = 0.2


@dataclass(frozen=True)
class PPO:
    """The algorithm with its constants."""

    clip_range: float = 0.2
    value_clip_range: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    epochs: int = 4
    reward_clip: float = 10.0
    kl_target: float | None = None
    critic: bool = True
    metrics: tuple[str, ...] = ("policyLoss", "valueLoss", "clipped")

    def targets(self, rollouts: Rollouts, kl: float) -> dict[str, Floats]:
        """What a token's loss is computed from. ``kl``: price of a nat."""
        rewards = token_rewards(rollouts, kl, self.reward_clip)
        advantages = estimate_advantages(rewards, rollouts.values, rollouts.mask, self.gamma, self.lam)
        return {
            "log_probs": rollouts.log_probs,
            "values": rollouts.values,
            "advantages": whiten(advantages, rollouts.mask),
            "returns": advantages + rollouts.values,
        }

    def weight(self, rollouts: Rollouts) -> float:
        """Losses are means over tokens."""
        return float(rollouts.mask.sum())

    def loss(self, log_probs: Tensor, values: Tensor, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sums of loss and ``metrics`` over some tokens, from what policy and critic say of them now."""
        ratio = (log_probs - tokens["log_probs"]).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        policy = torch.maximum(-tokens["advantages"] * ratio, -tokens["advantages"] * clipped)
        near = tokens["values"] + (values - tokens["values"]).clamp(-self.value_clip_range, self.value_clip_range)
        value = 0.5 * torch.maximum((values - tokens["returns"]) ** 2, (near - tokens["returns"]) ** 2)
        left_alone = (-tokens["advantages"] * clipped > -tokens["advantages"] * ratio).float()
        watched = torch.stack([figure.detach().sum() for figure in (policy, value, left_alone)])
        return (policy + VALUE_COEFFICIENT * value).sum(), watched

    def next_kl(self, kl: float, measured: float) -> float:
        """The price of a nat in the next step: proportional control in logarithms (Ziegler et al. 2019, arXiv:
        1909.08593). ``measured``: nats an answer.
        """
        if self.kl_target is None:
            return kl
        error = float(np.clip(measured / self.kl_target - 1, -_KL_LARGEST_ERROR, _KL_LARGEST_ERROR))
        return kl * (1 + _KL_GAIN * error)


def token_rewards(rollouts: Rollouts, kl: float, clip: float) -> Floats:
    """(answers, tokens) ``-kl * (log pi - log reference)``; at the last token also the answer's reward, cut to
    ``clip`` either way.
    """
    rewards: Floats = -kl * (rollouts.log_probs - rollouts.reference) * rollouts.mask
    last = rollouts.mask.sum(1) - 1
    rewards[np.arange(len(rewards)), last] += np.clip(rollouts.rewards, -clip, clip)
    return rewards


def estimate_advantages(
    rewards: Floats, values: Floats, mask: npt.NDArray[np.bool_], gamma: float, lam: float
) -> Floats:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438): ``sum (gamma lam)^l
    delta_(t+l)`` with ``delta_t = r_t + gamma V_(t+1) - V_t``; after the last token there is no value.
    """
    advantages = np.zeros_like(rewards)
    following, next_value = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = np.where(mask[:, t], delta + gamma * lam * following, 0.0)
        next_value = np.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = following
    return advantages


def whiten(values: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    """Shifted and scaled to mean 0 and variance 1 over all tokens of the step (arXiv:2403.17031)."""
    chosen = values[mask]
    whitened: Floats = np.where(mask, (values - chosen.mean()) / np.sqrt(chosen.var() + 1e-8), 0.0)
    return whitened
