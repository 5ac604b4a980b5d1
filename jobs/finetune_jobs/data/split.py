"""Locked test rows, evaluation rows and mixes: which row goes where.

Every choice follows from the seed and the rows' contents alone, never from their order: a row keeps its place when
others are added, and rows that ask the same question stay together, so that none is trained on and tested on.
"""

import hashlib
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from finetune_jobs.data.rows import Message, Row

Key = Callable[[Row], str]


def locked_size(rows: int) -> int:
    """5 % of the rows, 20 to 200, never more than a fifth, at least 1."""
    return max(1, min(max(20, min(200, round(0.05 * rows))), rows // 5))


def eval_size(rows: int) -> int:
    """5 % of the rows, at most 500, at least 1; none when there would be nothing left to train on."""
    return 0 if rows < 2 else max(1, min(500, round(0.05 * rows)))


def take(rows: Sequence[Row], count: int, seed: int, purpose: str) -> tuple[list[Row], list[Row]]:
    """(taken, left): about ``count`` rows, never more, at least one; the taken in a random order, the left in theirs.

    Rows with the same question go together; where that would take too many (few rows, or one question for all), only
    equal rows do. A row that is taken never stays on the other side, nor does its copy. Nothing is taken when all rows
    are equal.
    """
    if count <= 0:
        return [], list(rows)
    for key in (question_key, row_key):
        taken = _take_groups(rows, count, seed, purpose, key)
        if 0 < len(taken) < len(rows):
            keys = {key(row) for row in taken}
            return taken, [row for row in rows if key(row) not in keys]
    # Every row stands there more often than `count`: one copy is taken and the others are left out.
    groups = _groups(rows, row_key)
    if len(groups) < 2:
        return [], list(rows)
    rarest = min(groups, key=lambda k: (len(groups[k]), _rank(seed, purpose, k)))
    return groups[rarest][:1], [row for row in rows if row_key(row) != rarest]


def _take_groups(rows: Sequence[Row], count: int, seed: int, purpose: str, key: Key) -> list[Row]:
    taken: list[Row] = []
    groups = _groups(rows, key)
    for name in sorted(groups, key=lambda k: _rank(seed, purpose, k)):
        if len(taken) + len(groups[name]) <= count:
            taken += groups[name]
        if len(taken) == count:
            break
    return taken if len(taken) >= max(1, count // 2) else []


def _groups(rows: Iterable[Row], key: Key) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def mix(sources: Sequence[tuple[float, Sequence[Row]]], seed: int) -> list[Row]:
    """The rows of an epoch: a row of weight 2.0 stands there twice, of the rows of weight 0.5 half do."""
    mixed: list[Row] = []
    for weight, rows in sources:
        whole = math.floor(weight)
        more = round((weight - whole) * len(rows))
        ranked = sorted(range(len(rows)), key=lambda i: _rank(seed, "mix", f"{rows[i]['id']}"))
        extra = set(ranked[:more])
        if not whole and not extra and rows:
            extra = {ranked[0]}
        for i, row in enumerate(rows):
            for copy in range(whole + (i in extra)):
                again: Row = {**row, "id": f"{row['id']}+{copy}"} if copy else row
                mixed.append(again)
    return mixed


def row_key(row: Row) -> str:
    """Equal for rows that say the same, whatever their spacing, case and Unicode form."""
    return _key(texts(row))


def question_key(row: Row) -> str:
    """Equal for rows that ask the same; of a text row, the whole text."""
    if "messages" in row:
        messages = row["messages"]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        # A prompt ends with a question, whatever was answered before.
        last = answers[-1] if answers and messages[-1]["role"] == "assistant" else len(messages)
        return _key([m["content"] for m in messages[:last]])
    return _key(_of(row["prompt"])) if "prompt" in row else row_key(row)


def texts(row: Row) -> list[str]:
    """All that the row says, turn by turn."""
    fields: list[Any] = [row.get(name) for name in ("prompt", "messages", "completion", "text", "chosen", "rejected")]
    return [text for field in fields if field is not None for text in _of(field)]


def _of(field: str | list[Message]) -> list[str]:
    return [field] if isinstance(field, str) else [m["content"] for m in field]


def normalised(text: str) -> str:
    """Without what the eye does not see: case, spacing, Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _key(parts: Iterable[str]) -> str:
    return hashlib.sha256("\x00".join(normalised(p) for p in parts).encode()).hexdigest()


def _rank(seed: int, purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}:{purpose}:{key}".encode()).digest()
