"""A role of the data, read from all its sources: rows in order, and every mistake that can be found in one pass."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from finetune_api.columns import COLUMNS
from finetune_api.types import DataFormat, DataSource
from finetune_jobs.data import sources
from finetune_jobs.data.cells import detect, fits, listed, rename
from finetune_jobs.data.formats import Broken
from finetune_jobs.data.labels import sft_on_desirable
from finetune_jobs.data.normalise import Shape, normalise, question
from finetune_jobs.data.pairs import sft_on_chosen
from finetune_jobs.data.prompts import read_prompt
from finetune_jobs.data.rows import DroppedRowError, Row, RowError
from finetune_jobs.data.sources import Opened, Part
from finetune_jobs.run.errors import DataError

_log = logging.getLogger("finetune.data")
MOST_MISTAKES = 20
"""Listed in one message; more would not be read."""


class Mistakes:
    """Collects what is wrong with rows, so that it can be mended in one go."""

    def __init__(self) -> None:
        """None yet."""
        self._words: list[str] = []

    def add(self, words: str) -> None:
        """``file:line: what is wrong; the mend``."""
        self._words.append(words)

    @property
    def full(self) -> bool:
        """No more are needed."""
        return len(self._words) >= MOST_MISTAKES

    def refuse(self) -> None:
        """DataError with all of them, one a line, if there are any."""
        if self._words:
            more = ["there may be more; these were found first"] if self.full else []
            raise DataError("\n".join([*self._words[:MOST_MISTAKES], *more]))


@dataclass
class SourceRows:
    """What one source gave."""

    weight: float
    rows: list[Row]
    facts: dict[str, Any]
    """Source, revision, files, formats, counts: for the data card."""


@dataclass
class RoleRows:
    """What all sources of a role gave."""

    sources: list[SourceRows] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """All rows, in order of sources and lines, each once."""
        return [row for source in self.sources for row in source.rows]


def load_role(
    role: str,
    opened: Sequence[tuple[DataSource, str, Opened]],
    *,
    chat: bool,
    chat_pairs: bool,
    mistakes: Mistakes,
    report: Callable[[int], None],
) -> RoleRows:
    """Read a role; mistakes in rows go to ``mistakes``, and so do files that cannot be read on. ``report`` gets rows
    read.
    """
    loaded = RoleRows()
    ids: Counter[str] = Counter()
    for source, where, content in opened:
        result = SourceRows(source.weight, [], {**content.facts, "weight": source.weight})
        dropped: Counter[str] = Counter()
        formats: list[str] = []
        read = 0
        for part in content.parts:
            if mistakes.full or (source.max_rows is not None and read >= source.max_rows):
                break
            reader = _Reader(part, source, role, chat, chat_pairs)
            try:
                for item in sources.read(part):
                    if source.max_rows is not None and read >= source.max_rows:
                        break
                    read += 1
                    report(read)
                    try:
                        row = reader.row(item)
                    except RowError as error:
                        mistakes.add(f"{part.name}:{item.line}: {error} ({where})")
                        if mistakes.full or reader.format is None:
                            break
                    except DroppedRowError as error:
                        dropped[str(error)] += 1
                    else:
                        ids[row["id"]] += 1
                        if ids[row["id"]] > 1:
                            row["id"] += f"-{ids[row['id']]}"
                        result.rows.append(row)
            except DataError as error:
                mistakes.add(f"{error} ({where})")
            if reader.format is not None:
                formats.append(str(reader.format))
        result.facts |= {
            "formats": sorted(set(formats)),
            "read": read,
            "kept": len(result.rows),
            "dropped": dict(dropped),
        }
        if read and not result.rows and dropped:
            name = content.parts[0].name if len(content.parts) == 1 else f"{len(content.parts)} files"
            mistakes.add(f"{name}: no row is left: {_counted(dropped)}; give rows that can be learned from ({where})")
        loaded.sources.append(result)
        _log.info("%s: %s: %d rows", role, source.source, len(result.rows))
    return loaded


def _counted(dropped: Counter[str]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common())


class _Reader:
    """The rows of one part; its format is told from the first of them."""

    def __init__(self, part: Part, source: DataSource, role: str, chat: bool, chat_pairs: bool) -> None:
        self.format: DataFormat | None = None
        self._part, self._source, self._role = part, source, role
        self._chat, self._chat_pairs = chat, chat_pairs

    def row(self, item: Any) -> Row:
        if isinstance(item, Broken):
            self.format = self.format or self._source.format
            raise RowError(item.words)
        columns = rename(item.columns, self._source.columns)
        content = self._content(columns)
        try:
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        except TypeError as error:  # parquet holds dates and bytes in lists, JSON cannot
            kind = str(error).removeprefix("Object of type ").partition(" ")[0]
            raise RowError(f"holds a value of type {kind}, which no conversation can; write it as text") from error
        return cast(Row, {"id": digest[:16], "source": self._part.name, "line": item.line, **content})

    def _content(self, columns: dict[str, Any]) -> dict[str, Any]:
        if self._role in ("general", "refusals"):
            self.format = self._source.format
            return question(columns, self._role, chat=self._chat)
        if self._role == "prompts":
            self.format = self._source.format
            return read_prompt(columns, chat=self._chat, chat_prompts=self._chat_pairs)
        pairs = self._role == "preference"
        if self.format in (None, DataFormat.AUTO):
            self.format = detect(columns, self._source.format, preference=pairs)
        elif self._source.format is DataFormat.AUTO and not fits(columns, self.format):
            first = f"{self.format} ({' + '.join(COLUMNS[self.format])})"
            raise RowError(f"has the columns {listed(columns)}, but the file began as {first}; give one file a format")
        assert self.format is not None
        if pairs and self.format not in (DataFormat.PREFERENCE, DataFormat.LABELS):
            self.format = None
            raise RowError(
                f"format {self._source.format} does not fit the role preference, which needs pairs, or labels; use "
                "preference, labels or auto"
            )
        content = normalise(columns, Shape(self.format, self._chat, self._chat_pairs))
        if pairs:
            return content
        learned = {DataFormat.PREFERENCE: sft_on_chosen, DataFormat.LABELS: sft_on_desirable}
        return learned[self.format](content) if self.format in learned else content
