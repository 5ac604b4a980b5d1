"""Columns and cells: standard names, which format they make, and texts and lists out of whatever a file holds."""

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from finetune_api.columns import COLUMNS, STANDARD
from finetune_api.types import DataFormat
from finetune_jobs.data.rows import RowError
from finetune_jobs.run.errors import ConfigurationError


def check_names(names: Mapping[str, str], where: str) -> None:
    """ConfigurationError, beginning with ``where``, for a name under ``columns`` that no format has."""
    for name in names:
        if name not in STANDARD:
            raise ConfigurationError(
                f"{where}.columns: {name!r} is no standard column{nearest(name, STANDARD)}; write `standard: yours`, "
                f"with one of {', '.join(sorted(STANDARD))}"
            )


def rename(columns: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The row under the standard names. Raises RowError for a column that is not there."""
    if not names:
        return dict(columns)
    for standard, own in names.items():
        if own not in columns:
            raise RowError(
                f"`columns` reads {standard} from {own!r}, which is not among the columns "
                f"{listed(columns)}{nearest(own, columns)}"
            )
    renamed = {key: value for key, value in columns.items() if key not in names.values()}
    return renamed | {standard: columns[own] for standard, own in names.items()}


def fits(columns: Collection[str], format: DataFormat) -> bool:
    """The columns (standard names) that the format needs are there."""
    return set(COLUMNS[format]) <= set(columns) or (format is DataFormat.MESSAGES and "conversations" in columns)


def detect(columns: Mapping[str, Any], wanted: DataFormat, *, preference: bool) -> DataFormat:
    """The format that the row's columns (standard names) have; with ``wanted`` other than auto, whether they have that
    one.

    ``preference``: the role needs pairs or labels. Raises RowError with the columns seen and the mend.
    """
    candidates: list[DataFormat]
    if wanted is not DataFormat.AUTO:
        candidates = [wanted]
    elif preference:
        candidates = [DataFormat.PREFERENCE, DataFormat.LABELS]
    else:  # a column `label` of other things than truth values, such as names of classes, is none of ours
        unlabelled = not isinstance(columns.get("label"), bool)
        candidates = [c for c in COLUMNS if not (unlabelled and c is DataFormat.LABELS)]
    for candidate in candidates:
        if fits(columns, candidate):
            return candidate
    needed = " or ".join(" + ".join(COLUMNS[c]) for c in candidates)
    example = ", ".join(f"{c}: <yours>" for c in COLUMNS[candidates[0]])
    kind = f"format {candidates[0]}" if len(candidates) == 1 else "rows"
    raise RowError(
        f"{kind} need the columns {needed}, but the file has {listed(columns)}; name yours with `columns: "
        f"{{{example}}}`"
    )


def text_of(columns: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    """A text; RowError names the column. ``optional``: nothing counts as empty."""
    value = columns.get(column)
    if value is None and optional:
        return ""
    return checked_text(value, f"column {column}")


def filled_text(columns: Mapping[str, Any], column: str, then: str = "") -> str:
    """A text that says something; ``then``: what follows from an empty one."""
    text = text_of(columns, column)
    if not text.strip():
        raise RowError(f"column {column}: is empty{then}; fill it in or remove the row")
    return text


def answer_text(columns: Mapping[str, Any], column: str) -> str:
    """A text to be learned."""
    return filled_text(columns, column, ", so no supervised token")


def checked_text(value: Any, where: str) -> str:
    """The value if it is a text that can be written as UTF-8; RowError names ``where`` otherwise."""
    if not isinstance(value, str):
        raise RowError(f"{where}: must be text, got {kind_of(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                f"{where}: half a surrogate pair at character {error.start + 1}; write the whole character"
            ) from error
    return value


def parsed_turns(value: Any) -> Any:
    """CSV has no lists: a text that is a JSON list of turns is that list. Other JSON stays text: it may be what is to
    be learned.
    """
    parsed = parsed_list(value)
    is_turns = isinstance(parsed, list) and all(isinstance(t, dict) and t.keys() & {"role", "from"} for t in parsed)
    return parsed if is_turns else value


def parsed_list(value: Any) -> Any:
    """A text that is a JSON list, as that list; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def kind_of(value: Any) -> str:
    """The value in words, for messages."""
    if value is None:
        return "nothing"
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    shown = json.dumps(value, ensure_ascii=True, default=str)
    return f"{names.get(type(value), type(value).__name__)} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def listed(columns: Collection[str]) -> str:
    """Column names, for messages."""
    return ", ".join(sorted(columns)[:20]) or "none"


def nearest(name: str, columns: Collection[str]) -> str:
    """A question after the most similar column, for messages; empty if none is similar."""
    close = difflib.get_close_matches(name, list(columns), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
