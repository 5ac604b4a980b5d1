"""What is watched while pairs are learned, whichever loss learns them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from finetune_jobs.training.collators import Example

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""Names as in TRL. What a reward is, each loss says; a tie is no success."""


class Pairs:
    """Losses that are means over pairs: the same metrics, and each pair counts once."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """``METRICS``."""
        return METRICS

    def weight(self, example: Example) -> float:
        """A pair counts once, however long it is."""
        return 1.0

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """As they are."""
        return dict(means)


def watched(rewards: Tensor, answers: Tensor) -> Tensor:
    """The sums of ``METRICS`` over a micro-batch, from the reward and the log-probability of each answer."""
    chosen, rejected = rewards[0::2], rewards[1::2]
    margins = chosen - rejected
    figures = (chosen, rejected, (margins > 0).float(), margins, answers[0::2], answers[1::2])
    return torch.stack([figure.detach().sum() for figure in figures])
