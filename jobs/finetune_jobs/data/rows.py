"""What a row is.

Formats differ in columns only. Once read there are four kinds of content: a conversation (``messages``), text to
complete (``prompt``, ``completion``), plain ``text``, and a pair (``prompt``, ``chosen``, ``rejected``). The first two
with a ``label`` are answers that are desirable or not; without their answer they are rows of ``prompts``.
"""

from typing import Any, Literal, NotRequired, Required, TypedDict


class Message(TypedDict, total=False):
    """One turn of a conversation."""

    role: Required[str]
    content: Required[str]
    tool_calls: list[Any]
    tool_call_id: str
    name: str
    reasoning_content: str


class Row(TypedDict, total=False):
    """A frozen row: where it comes from, and one of the four kinds of content."""

    id: Required[str]
    """From the content alone; unique within a role."""
    source: Required[str]
    """Name of the file, or ``org/name/split`` of a hub data set."""
    line: Required[int]
    messages: list[Message]
    tools: NotRequired[list[Any]]
    prompt: str | list[Message]
    completion: str
    text: str
    chosen: str | list[Message]
    rejected: str | list[Message]
    label: bool
    """Rows of labels: whether the answer is desirable."""
    reference: str
    """``general`` and ``prompts`` rows: the answer to compare with."""
    expect: Literal["refuse", "answer"]
    """``refusals`` rows: what the model should do."""


class RowError(Exception):
    """A row that cannot be used; the words say why and what to do, the caller adds file and line."""


class DroppedRowError(Exception):
    """A row that is left out and counted under these words."""
