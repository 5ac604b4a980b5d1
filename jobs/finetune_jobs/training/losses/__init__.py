"""What is minimised. Each loss is a sum over a micro-batch; ``loop.py`` divides by the weight of the whole step.

Here is what losses have in common, and supervised fine-tuning's; each preference loss has a file of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import modeling_utils

from finetune_jobs.run.preemption import Stop
from finetune_jobs.training.collators import Example, Layout, MicroBatch, collate
from finetune_jobs.training.distributed import Peers
from finetune_jobs.training.model import Policy

_SELECTS = hasattr(modeling_utils, "slice_logits_to_keep")
"""Models take a mask of positions; in the older transformers that Unsloth needs they give the logits of all."""


def answer_logits(policy: Policy, batch: MicroBatch) -> Tensor:
    """(n, vocabulary) at the positions from which the tokens that count are predicted."""
    theirs = policy.backend == "unsloth"
    given: dict[str, Any] = {}
    if batch.attention_mask is None:
        given["position_ids"] = batch.position_ids
        if theirs:  # for some architectures it does not see from the positions where sequences begin
            given["packed_seq_lengths"] = batch.lengths[batch.position_ids == 0]
    if _SELECTS and not theirs:
        given["logits_to_keep"] = batch.predicts
    with policy.autocast():
        # Only the positions that count go through the output head: the logits are the largest tensor of all.
        logits: Tensor = policy.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **given
        ).logits
        if theirs:  # it was told to give hidden states
            head: torch.nn.Module = policy.base.get_output_embeddings()  # type: ignore[no-untyped-call]
            logits = head(logits[batch.predicts])
    if logits.dim() == 3:  # an architecture that knows no `logits_to_keep`
        logits = logits[batch.predicts]
    return logits


def token_log_probs(policy: Policy, batch: MicroBatch) -> Tensor:
    """(n,) the natural log-probability, in float32, of each token that counts."""
    return -functional.cross_entropy(answer_logits(policy, batch).float(), batch.targets, reduction="none")


def answer_log_probs(log_probs: Tensor, batch: MicroBatch) -> Tensor:
    """(sequences,) the log-probability of each whole answer."""
    sums = torch.zeros(batch.sequences, dtype=log_probs.dtype, device=log_probs.device)
    return sums.index_add(0, batch.sequence, log_probs)


def mean_log_probs(answers: Tensor, batch: MicroBatch) -> Tensor:
    """(sequences,) the same a token: ``answers`` divided by their lengths, each its stop token included."""
    return answers / torch.bincount(batch.sequence, minlength=batch.sequences).clamp(min=1)


class Objective(Protocol):
    """A loss and what is worth watching beside it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the figures that ``loss`` returns."""

    def weight(self, example: Example) -> float:
        """What the example counts for in the mean."""

    def loss(self, log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The sum of the loss over the micro-batch, and the sums of the ``metrics``, (m,)."""

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """What is shown, of the means of the loss and the ``metrics``; means over a part of the examples, say."""


@dataclass(frozen=True)
class Supervised:
    """Cross entropy, the mean over the supervised tokens of the whole step."""

    metrics: tuple[str, ...] = ()

    def weight(self, example: Example) -> float:
        """Its supervised tokens."""
        return float(example.supervised)

    def loss(self, log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The negative log-probability of all supervised tokens."""
        return -log_probs.sum(), log_probs.new_zeros(0)

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """As they are."""
        return dict(means)


def reference_log_probs(
    policy: Policy,
    examples: Sequence[Example],
    steps: Iterable[Sequence[int]],
    layout: Layout,
    peers: Peers,
    stop: Stop,
) -> npt.NDArray[np.float32]:
    """(examples, sequences of each) log-probabilities of the answers under the model as it is now.

    ``steps`` are the examples' indices by optimizer step. They are laid out exactly as training will lay them out, so
    that the first step finds the very same numbers, in bf16 too, and its DPO loss is ln 2. Others stay 0, unused.
    Dropout must be off.
    """
    # As in training, gradients included though nobody asks for them: without, 4-bit layers take another kernel.
    policy.model.train()
    found = np.zeros((len(examples), len(examples[0].sequences) if examples else 0))
    for step in steps:
        chosen = [examples[i] for i in step]
        for group, counts in layout.turns(chosen, peers.rank, peers.size, together=policy.sharded):
            if policy.sharded:
                peers.check(stop)
            else:
                stop.check()
            batch = collate([chosen[j] for j in group], packed=layout.packed).to(policy.device)
            answers = answer_log_probs(token_log_probs(policy, batch), batch).detach()
            if counts:
                found[[step[j] for j in group]] = answers.view(len(group), -1).double().cpu().numpy()
    return peers.sum(found).astype(np.float32)
