"""The standard names of columns in rows, by format."""

from collections.abc import Mapping

from finetune_api.types import DataFormat

COLUMNS: Mapping[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.LABELS: ("prompt", "completion", "label"),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.INSTRUCTION: ("instruction", "output"),
    DataFormat.PREFERENCE: ("chosen", "rejected"),
    DataFormat.TEXT: ("text",),
}
"""The columns that a format needs, in the order in which ``auto`` tries them. ``conversations`` (ShareGPT) stands for
``messages``.
"""
OPTIONAL = ("conversations", "tools", "input", "system", "history", "prompt", "reference", "expect")
STANDARD = frozenset(OPTIONAL).union(*COLUMNS.values())
"""Every column name that ``columns`` may rename to."""
