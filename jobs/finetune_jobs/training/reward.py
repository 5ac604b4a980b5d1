"""Reward models: a number for a whole answer, learned from which of two was chosen, and read by ``rl``.

The number is a linear function of the hidden state of the last token, as transformers' sequence classifiers have it.
They take for the last token the last one that is not the configuration's ``pad_token_id``, which in many models is the
stop token too; so do we, or whoever loads the result with transformers would get other scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from finetune_api.defaults import resolve_quantization
from finetune_api.types import Reward
from finetune_jobs.training import weights
from finetune_jobs.training.collators import Example, MicroBatch, Tokens
from finetune_jobs.training.losses.pairs import METRICS
from finetune_jobs.training.model import Policy, load, take_head


@dataclass(frozen=True)
class BradleyTerry:
    """The chosen answer wins with probability ``sigmoid(r_chosen - r_rejected)`` (Bradley and Terry 1952; arXiv:
    2203.02155, equation 1). Only differences matter to that, so a second term keeps the sum near 0 (arXiv:2312.09244,
    section 4; as in TRL).
    """

    center: float
    """Weight of the square of the sum of a pair's rewards."""
    metrics: tuple[str, ...] = METRICS[:4]

    def weight(self, example: Example) -> float:
        """A pair counts once."""
        return 1.0

    def loss(self, rewards: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Minus the log-probability of the choice; ``rewards``: (sequences,), chosen and rejected in turn."""
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = chosen - rejected
        losses = -logsigmoid(margins) + self.center * (chosen + rejected) ** 2
        watched = (chosen, rejected, (margins > 0).float(), margins)
        return losses.sum(), torch.stack([figure.detach().sum() for figure in watched])

    def figures(self, means: Mapping[str, float]) -> dict[str, float]:
        """As they are."""
        return dict(means)


def sequence_rewards(policy: Policy, batch: MicroBatch) -> Tensor:
    """(sequences,) rewards in float32, of a batch with one sequence a row."""
    assert policy.head is not None
    assert batch.attention_mask is not None
    body = policy.base.base_model
    with policy.autocast():
        hidden = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
    rows = torch.arange(batch.sequences, device=hidden.device)
    rewards: Tensor = policy.head(hidden[rows, batch.lengths[:, 0] - 1].float()).squeeze(-1)
    return rewards


def without_padding(example: Example, pad: int | None) -> Example:
    """The same up to the tokens that transformers will read the rewards at."""
    return Example(tuple(_cut(tokens, pad) for tokens in example.sequences))


def _cut(tokens: Tokens, pad: int | None) -> Tokens:
    real = np.flatnonzero(tokens.ids != pad)
    end = int(real[-1]) + 1 if pad is not None and len(real) else len(tokens.ids)
    return Tokens(tokens.ids[:end], tokens.supervised[:end])


def pad_token(policy: Policy) -> int | None:
    """What transformers takes for padding."""
    found = getattr(policy.base.config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) else None


def begin_head(policy: Policy, seed: int) -> None:
    """Small random weights, so that rewards begin with a variance of about 1 (arXiv:2403.17031)."""
    assert policy.head is not None
    weight = policy.head.weight
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5
    weight.data.copy_(drawn)


def load_judge(
    block: Reward,
    source: Path,
    reward: Path,
    *,
    compute: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Policy:
    """A trained reward model to be read only. ``source``: the model that the adapter in ``reward`` belongs to, or
    ``reward`` itself.
    """
    if source == reward:
        settings = {"device_map": {"": device}} if device.type == "cuda" else {}
        model = AutoModelForSequenceClassification.from_pretrained(
            reward, local_files_only=True, trust_remote_code=trust_remote_code, dtype=compute, **settings
        )
        judge = Policy(model, device, compute, head=take_head(model, device))
    else:
        judge = load(
            source,
            method=block.method,
            lora=None,
            quantization=resolve_quantization(block),
            adapter=reward,
            compute=compute,
            device=device,
            seed=0,
            trust_remote_code=trust_remote_code,
            scores=True,
        )
        assert judge.head is not None
        judge.head.weight.data.copy_(weights.read_score_head(reward))
    for parameter in judge.trainable:
        parameter.requires_grad_(False)
    judge.model.eval()
    return judge
