"""Identity preference optimization (Azar et al. 2023, arXiv:2310.12036, equation 17), the mean over pairs."""

from dataclasses import dataclass

from torch import Tensor

from finetune_jobs.training.collators import MicroBatch
from finetune_jobs.training.losses import answer_log_probs
from finetune_jobs.training.losses.pairs import Pairs, watched


@dataclass(frozen=True)
class IPO(Pairs):
    """The log-ratio of a pair is drawn to ``1 / (2 beta)`` and no further; ``beta`` is the paper's tau.

    Log-probabilities are of whole answers, as in the paper; TRL divides them by the answers' lengths. The first loss is
    ``1 / (4 beta^2)``. Rewards are ``beta * (log pi - log reference)``, so the margin is drawn to 1/2.
    """

    beta: float

    def loss(self, log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The squared distance of each pair's log-ratio from where it should be."""
        answers = answer_log_probs(log_probs, batch)
        ratios = answers - batch.reference
        losses = (ratios[0::2] - ratios[1::2] - 1 / (2 * self.beta)) ** 2
        return losses.sum(), watched(self.beta * ratios, answers)
