"""What answers are worth: reward models and simple programs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune_api.types import BuiltinReward
from finetune_jobs.evaluation import metrics
from finetune_jobs.run.preemption import Stop
from finetune_jobs.training.collators import Example, Layout, Tokens, collate
from finetune_jobs.training.model import Policy
from finetune_jobs.training.reward import pad_token, sequence_rewards, without_padding

_JUDGED_TOKENS = 8_192


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked."""

    ids: list[int]
    reference: str = ""


@dataclass(frozen=True)
class Answer:
    """What it said."""

    prompt: Prompt
    ids: list[int]
    """Its stop token included."""
    text: str
    longest: int
    """Tokens that it might have had."""


def exact_match(answer: Answer) -> float:
    """1 for the reference."""
    return metrics.exact_match(answer.text, answer.prompt.reference)


def json_valid(answer: Answer) -> float:
    """1 for one JSON value."""
    return metrics.json_valid(answer.text)


def length(answer: Answer) -> float:
    """Tokens, as a share of the most there may be."""
    return len(answer.ids) / answer.longest


BUILTIN: Mapping[BuiltinReward, Callable[[Answer], float]] = {
    BuiltinReward.EXACT_MATCH: exact_match,
    BuiltinReward.JSON_VALID: json_valid,
    BuiltinReward.LENGTH: length,
}
"""Each from 0 to 1."""


@dataclass(frozen=True)
class Reward:
    """One reward, and what it counts for in the sum."""

    name: str
    weight: float
    score: Callable[[Sequence[Answer], Stop], list[float]]
    """Told to stop, it may leave answers at 0."""


def builtin(which: BuiltinReward, weight: float) -> Reward:
    """A simple program's."""
    return Reward(str(which), weight, lambda answers, _: [BUILTIN[which](answer) for answer in answers])


def judged(name: str, weight: float, judge: Policy) -> Reward:
    """A reward model's, of prompt and answer together; an answer that was cut off is scored as it stands."""
    pad, layout = pad_token(judge), Layout(packed=False, tokens=_JUDGED_TOKENS)

    @torch.no_grad()
    def score(answers: Sequence[Answer], stop: Stop) -> list[float]:
        examples = [without_padding(_whole(answer), pad) for answer in answers]
        scores = [0.0] * len(answers)
        for group in layout.split(examples):
            if stop.requested:
                break
            batch = collate([examples[i] for i in group], packed=False).to(judge.device)
            for i, found in zip(group, sequence_rewards(judge, batch).tolist(), strict=True):
                scores[i] = found
        return scores

    return Reward(name, weight, score)


def _whole(answer: Answer) -> Example:
    ids = np.asarray([*answer.prompt.ids, *answer.ids], np.int32)
    return Example((Tokens(ids, np.ones(len(ids), np.bool_)),))
