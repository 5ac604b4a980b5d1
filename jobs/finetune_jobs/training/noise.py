"""NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform noise on the embeddings while training."""

from typing import Any

import torch
from torch import Tensor, nn

from finetune_jobs.training.collators import MicroBatch
from finetune_jobs.training.model import Policy


class Noise:
    """Adds ``alpha / sqrt(length * width)`` times uniform noise, ``length`` being that of the token's own sequence."""

    def __init__(self, policy: Policy, alpha: float) -> None:
        self._alpha = alpha
        self._lengths: Tensor | None = None
        embeddings: Any = policy.base.get_input_embeddings()
        embeddings.register_forward_hook(self._add)

    def expect(self, batch: MicroBatch) -> None:
        """Say which micro-batch the model reads next."""
        self._lengths = batch.lengths

    def _add(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if not module.training or self._lengths is None:
            return output
        size = self._alpha / (self._lengths.unsqueeze(-1) * output.shape[-1]).to(output.dtype).sqrt()
        return output + size * torch.empty_like(output).uniform_(-1, 1)
