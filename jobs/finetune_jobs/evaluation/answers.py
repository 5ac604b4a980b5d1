"""Questions to a model, its answers with their scores, and the figures over all of them.

``Answer`` is a line of ``answers/<target>/<role>.jsonl``: everything that a score is computed from stands beside it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from finetune_api.stage import Record
from finetune_api.types import BASE, Metric
from finetune_jobs.data.encode import Dropped, Encoded, LossOn, encode, prompt_ids, prompt_text, reference
from finetune_jobs.evaluation import metrics
from finetune_jobs.run.context import Context

ROLES = ("test", "general", "refusals")
SPOT_CHECK_TOKENS = 32
"""Longest answer to ``general`` and ``refusals`` rows: a fact or a refusal stands at the beginning."""
_NO_LIMIT = 2**31
Scores = dict[str, float]
"""Figures of one target by name; docs/stages/evaluate.md defines each."""


@dataclass(frozen=True)
class Question:
    """A locked row as a model gets it."""

    role: str
    id: str
    prompt: str
    """Rendered; empty for plain text, which can only have a loss."""
    prompt_ids: list[int]
    reference: str | None = None
    expect: str | None = None
    encoded: Encoded | None = None
    """The whole row, for its loss; test rows only."""


class Answer(Record):
    """What a model said to one row, and how good that is. Figures that the row cannot have are left out."""

    id: str
    role: str
    prompt: str
    reference: str | None = None
    expect: str | None = None
    answer: str | None = None
    finished: bool | None = None
    """False: cut off at the limit."""
    tokens: int | None = None
    """Of the answer, without the stop token."""
    scores: dict[str, float] = Field(default_factory=dict)
    loss: float | None = None
    """Mean over the row's supervised tokens, nats."""
    loss_tokens: int | None = None

    @property
    def score(self) -> float | None:
        """One figure to order answers by: the mean of its scores; None for plain text."""
        return metrics.mean(list(self.scores.values())) if self.scores else None


def questions(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The locked rows of the job: the first ``maxRows`` test rows, then every general and refusals row."""
    found: list[Question] = []
    for role in ROLES:
        rows = ctx.rows(role, of=BASE)
        for row in rows[: ctx.spec.evaluation.max_rows] if role == "test" else rows:
            encoded = None
            if role == "test" and Metric.LOSS in ctx.spec.evaluation.metrics:
                # The last answer, whatever the stages learn from: one measure for every target.
                learned: LossOn = "auto" if "text" in row else "completion"
                kept = encode(row, tokenizer, loss_on=learned, max_length=_NO_LIMIT, overlong="drop")
                encoded = None if isinstance(kept, Dropped) else kept
            if "text" in row:
                found.append(Question(role, row["id"], "", [], encoded=encoded))
                continue
            found.append(
                Question(
                    role,
                    row["id"],
                    prompt_text(row, tokenizer),
                    prompt_ids(row, tokenizer),
                    reference=row["reference"] if role == "general" else reference(row) if role == "test" else None,
                    expect=row["expect"] if role == "refusals" else None,
                    encoded=encoded,
                )
            )
    return found


def grade(question: Question, answer: str, names: Sequence[str]) -> dict[str, float]:
    """The scores of an answer: the named metrics of a test row, the one figure of a spot check."""
    match question.role:
        case "general":
            return {"containsReference": metrics.contains_reference(answer, question.reference or "")}
        case "refusals":
            return {"asExpected": metrics.refusal_score(answer, question.expect or "answer")}
        case _:
            asked = {name: score for name, score in metrics.TEXT_METRICS.items() if name in names}
            return {name: score(answer, question.reference or "") for name, score in asked.items()}


def summarise(answers: Iterable[Answer]) -> Scores:
    """The figures of one target. A figure that no row has is left out."""
    answers = list(answers)
    by_role = {role: [a for a in answers if a.role == role] for role in ROLES}
    scores: Scores = {}
    test = by_role["test"]
    names = list(dict.fromkeys(name for answer in test for name in answer.scores))
    if measured := [a for a in test if a.loss is not None and a.loss_tokens]:
        tokens = sum(a.loss_tokens or 0 for a in measured)
        scores["loss"] = sum((a.loss or 0.0) * (a.loss_tokens or 0) for a in measured) / tokens
        scores["lossTokens"] = tokens
        scores["lossRows"] = len(measured)
    scores |= {name: metrics.mean([a.scores[name] for a in test if name in a.scores]) for name in names}
    for role, name in (("general", "containsReference"), ("refusals", "asExpected")):
        if rows := by_role[role]:
            scores[role] = metrics.mean([a.scores[name] for a in rows])
    for expect, name in (("refuse", "refusedWhenAsked"), ("answer", "answeredWhenHarmless")):
        if rows := [a for a in by_role["refusals"] if a.expect == expect]:
            scores[name] = metrics.mean([a.scores["asExpected"] for a in rows])
    scores |= {f"{role}Rows": len(rows) for role, rows in by_role.items()}
    scores["unfinished"] = sum(a.finished is False for a in test)
    return scores


def write(answers: Iterable[Answer], directory: Path) -> None:
    """One JSONL file a role, in the order of the rows."""
    directory.mkdir(parents=True, exist_ok=True)
    by_role: dict[str, list[Answer]] = {}
    for answer in answers:
        by_role.setdefault(answer.role, []).append(answer)
    for role, rows in by_role.items():
        lines = (_line(a) for a in rows)
        (directory / f"{role}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _line(answer: Answer) -> str:
    return json.dumps(answer.model_dump(by_alias=True, exclude_none=True), ensure_ascii=False, allow_nan=False)


def read(directory: Path) -> list[Answer]:
    """What ``write`` left there, in its order."""
    files = [path for role in ROLES if (path := directory / f"{role}.jsonl").exists()]
    # Not splitlines(): an answer may hold U+2028, which JSON leaves as it is.
    return [Answer.model_validate_json(line) for path in files for line in path.open(encoding="utf-8")]
