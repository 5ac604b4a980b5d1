"""Single answers with a label, desirable or not: how they are read, and how they and pairs are encoded for kto.

Such a row is a training row (a conversation that ends with the answer, or ``prompt`` and ``completion``) and ``label``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_jobs.data.cells import kind_of
from finetune_jobs.data.encode import Dropped, Encoded, Overlong, encode_pairs, encode_rows
from finetune_jobs.data.rows import DroppedRowError, Row, RowError

_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
"""JSON has truth values and numbers (which equal them), CSV texts only."""


@dataclass(frozen=True)
class EncodedAnswer:
    """One answer, which ends with its stop token, and whether it is desirable."""

    prompt_ids: list[int]
    answer_ids: list[int]
    desirable: bool


def read_label(columns: Mapping[str, Any]) -> bool:
    """Whether the row's answer is desirable."""
    value = columns.get("label")
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, str | int | float) or key not in _LABELS:
        raise RowError(f"column label: must be true (a desirable answer) or false, got {kind_of(value)}")
    return _LABELS[key]


def sft_on_desirable(row: Mapping[str, Any]) -> dict[str, Any]:
    """The training row that a labelled row of the role ``train`` stands for. DroppedRowError if it stands for none."""
    if not row["label"]:
        raise DroppedRowError("the answer is labelled undesirable")
    return {name: value for name, value in row.items() if name != "label"}


def encode_answers(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, overlong: Overlong = "drop"
) -> Iterator[EncodedAnswer | Dropped]:
    """Every answer of labelled rows and pairs, in order. A pair is two, the chosen one desirable; both are dropped if
    one is.
    """
    for labelled, group in groupby(rows, key=lambda row: "label" in row):
        some = list(group)
        if labelled:
            encoded = encode_rows(some, tokenizer, loss_on="completion", max_length=max_length, overlong=overlong)
            for row, answer in zip(some, encoded, strict=True):
                yield answer if isinstance(answer, Dropped) else _split(answer, row["label"])
            continue
        for pair in encode_pairs(some, tokenizer, max_length=max_length, overlong=overlong):
            if isinstance(pair, Dropped):
                yield from (pair, pair)
            else:
                yield EncodedAnswer(pair.prompt_ids, pair.chosen_ids, True)
                yield EncodedAnswer(pair.prompt_ids, pair.rejected_ids, False)


def _split(encoded: Encoded, desirable: bool) -> EncodedAnswer:
    at = encoded.supervised.index(True)
    return EncodedAnswer(encoded.input_ids[:at], encoded.input_ids[at:], desirable)
