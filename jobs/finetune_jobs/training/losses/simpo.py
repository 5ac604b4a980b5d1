"""Simple preference optimization (Meng et al. 2024, arXiv:2405.14734, equation 6), the mean over pairs."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from finetune_jobs.training.collators import MicroBatch
from finetune_jobs.training.losses import answer_log_probs, mean_log_probs
from finetune_jobs.training.losses.pairs import Pairs, watched


@dataclass(frozen=True)
class SimPO(Pairs):
    """No reference: rewards are ``beta`` times the mean log-probability of an answer's tokens. No supervised part.

    ``gamma`` is the paper's, in units of reward; some write the quotient ``gamma / beta`` instead.
    """

    beta: float
    gamma: float

    def loss(self, log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """``-log sigmoid`` of the margin between the rewards, less the ``gamma`` that it is to reach."""
        answers = answer_log_probs(log_probs, batch)
        rewards = self.beta * mean_log_probs(answers, batch)
        losses = -logsigmoid(rewards[0::2] - rewards[1::2] - self.gamma)
        return losses.sum(), watched(rewards, answers)
