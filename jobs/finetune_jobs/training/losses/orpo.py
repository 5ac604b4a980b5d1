"""Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691, equations 2 to 7), the mean over pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from finetune_jobs.training.collators import MicroBatch
from finetune_jobs.training.losses import answer_log_probs, mean_log_probs
from finetune_jobs.training.losses.pairs import Pairs, watched

_SUREST = -1e-6
"""Of a mean log-probability: at 0 the odds are infinite, and their gradient no number."""


@dataclass(frozen=True)
class ORPO(Pairs):
    """No reference, and no supervised stage before: the chosen answers are learned as in one.

    Rewards are ``beta`` times the log-odds of an answer, whose probability is the geometric mean over its tokens
    (equation 2); ``beta`` is the paper's lambda.
    """

    beta: float

    def loss(self, log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The chosen answer's mean negative log-probability a token, plus ``beta`` times the odds ratio's loss."""
        answers = answer_log_probs(log_probs, batch)
        means = mean_log_probs(answers, batch)
        odds = log_odds(means)
        losses = -means[0::2] - self.beta * logsigmoid(odds[0::2] - odds[1::2])
        return losses.sum(), watched(self.beta * odds, answers)


def log_odds(log_probs: Tensor) -> Tensor:
    """``log(p / (1 - p))``."""
    sure = log_probs.clamp(max=_SUREST)
    return sure - torch.log(-torch.expm1(sure))
