"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7), the mean over pairs."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from finetune_jobs.training.collators import MicroBatch
from finetune_jobs.training.losses import answer_log_probs
from finetune_jobs.training.losses.pairs import Pairs, watched


@dataclass(frozen=True)
class DPO(Pairs):
    """Rewards are ``beta * (log pi - log reference)``. The first loss is ln 2."""

    beta: float
    label_smoothing: float = 0.0
    """The share of pairs that are taken to be labelled the wrong way round: conservative DPO (Mitchell 2023, "A note on
    DPO with noisy preferences & relationship to IPO", equation 3)."""

    def loss(self, log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """``-log sigmoid`` of the margin between the rewards, and as often as labels are wrong, of its negative."""
        answers = answer_log_probs(log_probs, batch)
        rewards = self.beta * (answers - batch.reference)
        margins = rewards[0::2] - rewards[1::2]
        losses = -(1 - self.label_smoothing) * logsigmoid(margins) - self.label_smoothing * logsigmoid(-margins)
        return losses.sum(), watched(rewards, answers)
