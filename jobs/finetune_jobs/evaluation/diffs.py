"""Base and tuned answers side by side: one JSONL for programs, one text for people, for each target."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_jobs.evaluation.answers import Answer

_WIDTH = 60
_EPSILON = 1e-9


def pairs(base: Sequence[Answer], tuned: Sequence[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """The answers to the same row, in the order of the tuned model's."""
    by_row = {(a.role, a.id): a for a in base}
    for answer in tuned:
        if (before := by_row.get((answer.role, answer.id))) is not None:
            yield before, answer


def change(base: Answer, tuned: Answer) -> str:
    """``better``, ``worse`` or ``same``: by the row's score, for plain text by its loss."""
    if base.score is not None and tuned.score is not None:
        gain = tuned.score - base.score
    else:
        gain = (base.loss or 0.0) - (tuned.loss or 0.0)
    return "same" if abs(gain) < _EPSILON else "better" if gain > 0 else "worse"


def write(base: Sequence[Answer], tuned: Sequence[Answer], path: Path, target: str) -> dict[str, int]:
    """``<path>.jsonl`` and ``<path>.txt``; how many rows became better, worse or stayed the same."""
    rows = [_row(before, after) for before, after in pairs(base, tuned)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    path.with_name(f"{path.name}.jsonl").write_text(lines, encoding="utf-8")
    counts = {word: sum(row["change"] == word for row in rows) for word in ("better", "worse", "same")}
    head = f"base -> {target}: {', '.join(f'{n} {word}' for word, n in counts.items())}\n\n"
    path.with_name(f"{path.name}.txt").write_text(head + "\n".join(map(_text, rows)), encoding="utf-8")
    return counts


def _row(base: Answer, tuned: Answer) -> dict[str, Any]:
    row = {
        "role": tuned.role,
        "id": tuned.id,
        "change": change(base, tuned),
        "prompt": tuned.prompt,
        "reference": tuned.reference,
        "expect": tuned.expect,
        "base": base.answer,
        "tuned": tuned.answer,
        "baseScores": base.scores,
        "tunedScores": tuned.scores,
        "baseLoss": base.loss,
        "tunedLoss": tuned.loss,
    }
    return {key: value for key, value in row.items() if value is not None}


def _text(row: Mapping[str, Any]) -> str:
    out = [f"== {row['role']} {row['id']}: {row['change']}"]
    for name in ("prompt", "reference", "expect"):
        if row.get(name):
            out += [f"-- {name}", row[name].rstrip()]
    left, right = _wrapped("base", row.get("base", "")), _wrapped("tuned", row.get("tuned", ""))
    for i in range(max(len(left), len(right))):
        a, b = (side[i] if i < len(side) else "" for side in (left, right))
        out.append(f"{a:<{_WIDTH}} | {b}".rstrip())
    figures = [_figures(row, side) for side in ("base", "tuned")]
    return "\n".join([*out, f"{figures[0]:<{_WIDTH}} | {figures[1]}".rstrip(), ""])


def _figures(row: Mapping[str, Any], side: str) -> str:
    scores = {**row[f"{side}Scores"], **({"loss": row[f"{side}Loss"]} if f"{side}Loss" in row else {})}
    return "  ".join(f"{name} {value:.3g}" for name, value in scores.items())


def _wrapped(title: str, text: str) -> list[str]:
    lines = [part for line in text.splitlines() or [""] for part in (textwrap.wrap(line, _WIDTH) or [""])]
    return [f"[{title}]", *lines]
