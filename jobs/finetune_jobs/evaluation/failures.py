"""Which answers of a tuned model to look at first, and what is wrong with them. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune_jobs.evaluation import metrics
from finetune_jobs.evaluation.answers import Answer
from finetune_jobs.evaluation.diffs import change, pairs

LEAST = 3
MOST_REGRESSIONS = 10
Kind = Literal["regression", "lowestScore", "highestLoss"]


@dataclass(frozen=True)
class Failure:
    """One row worth a look."""

    kind: Kind
    symptom: str
    """What can be said of the answer without understanding it."""
    base: Answer
    tuned: Answer


def analyse(base: Sequence[Answer], tuned: Sequence[Answer]) -> list[Failure]:
    """Rows that fell behind the base model, worst first (at most 10); then, up to 3 rows in all, those of the lowest
    score below 1 (test rows before spot checks), those of the highest loss, whether the answer is right or not, and
    where no loss was taken those of the lowest score, right as they are.
    """
    both = list(pairs(base, tuned))
    found = [
        Failure("regression", symptom(after), before, after)
        for before, after in both
        if change(before, after) == "worse"
    ]
    found.sort(key=lambda f: _fall(f.base, f.tuned), reverse=True)
    found = found[:MOST_REGRESSIONS]
    scored = sorted((p for p in both if p[1].score is not None), key=lambda p: (p[1].role != "test", p[1].score))
    weak = [p for p in scored if p[1].score is not None and p[1].score < 1.0]
    unsure = sorted((p for p in both if p[1].loss is not None), key=lambda p: p[1].loss or 0.0, reverse=True)
    kinds: tuple[tuple[Kind, list[tuple[Answer, Answer]]], ...] = (
        ("lowestScore", weak),
        ("highestLoss", unsure),
        ("lowestScore", scored),
    )
    for kind, candidates in kinds:
        for before, after in candidates:
            if len(found) >= LEAST:
                return found
            if all((after.role, after.id) != (f.tuned.role, f.tuned.id) for f in found):
                found.append(Failure(kind, symptom(after), before, after))
    return found


def _fall(base: Answer, tuned: Answer) -> float:
    if base.score is not None and tuned.score is not None:
        return base.score - tuned.score
    return (tuned.loss or 0.0) - (base.loss or 0.0)


def symptom(answer: Answer) -> str:
    """What is wrong with an answer, in a few words."""
    text = answer.answer
    if text is None:
        return "plain text: only its loss is known"
    if answer.role == "refusals":
        return "refused" if metrics.refused(text) else "answered" if text.strip() else "said nothing"
    if not text.strip():
        return "said nothing"
    if answer.finished is False and answer.role == "test":
        return f"did not end within {answer.tokens} tokens"
    if answer.role == "general":
        return "right" if answer.score else "does not contain the reference"
    if metrics.exact_match(text, answer.reference or ""):
        return "right"
    return (
        _json_symptom(text, answer.reference or "") or f"word F1 {metrics.token_f1(text, answer.reference or ''):.2f}"
    )


def _json_symptom(text: str, reference: str) -> str | None:
    """For references that are JSON objects: which fields differ."""
    wanted = _object(reference)
    if wanted is None:
        return None
    if not metrics.json_valid(text):
        return "not valid JSON"
    got = _object(text)
    if got is None:
        return "JSON, but no object"
    missing = [key for key in wanted if key not in got]
    extra = [key for key in got if key not in wanted]
    wrong = [key for key in wanted if key in got and got[key] != wanted[key]]
    parts = [
        f"{word} {', '.join(keys)}" for word, keys in (("wrong", wrong), ("missing", missing), ("extra", extra)) if keys
    ]
    return "fields: " + "; ".join(parts) if parts else "same fields and values, written otherwise"


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
