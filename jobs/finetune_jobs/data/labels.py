"""Single answers with a label, desirable or not: how they are read, and how they and pairs are encoded for kto.

Such a row is a training row (a conversation that ends with the answer, or ``prompt`` and ``completion``) and ``label``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_api.types import KTO
from finetune_jobs.data.cells import kind_of
from finetune_jobs.data.encode import Dropped, Encoded, Overlong, encode_pairs, encode_rows
from finetune_jobs.data.rows import DroppedRowError, Row, RowError

MOST = 4 / 3
"""Weight times number of the desirable answers over that of the others should lie between 1 and this."""
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


def unbalanced(rows: Iterable[Row], weights: KTO) -> str | None:
    """What to weigh otherwise where one kind of answer outweighs the other by far (arXiv:2402.01306, section 4)."""
    desirable = undesirable = 0
    for row in rows:
        desirable += row.get("label", True)
        undesirable += not row.get("label", False)
    if not desirable or not undesirable:
        kind = "desirable" if desirable else "undesirable"
        return f"all answers are {kind}: there is nothing to prefer; give some of the other kind"
    ratio = weights.desirable_weight * desirable / (weights.undesirable_weight * undesirable)
    if 1 - 1e-9 <= ratio <= MOST + 1e-9:
        return None
    balanced = weights.undesirable_weight * undesirable / desirable
    return (
        f"{desirable} answers are desirable and {undesirable} are not; with these weights that is {ratio:.2f} to 1, "
        f"where 1 to {MOST:.2f} is usual: kto.desirableWeight {balanced:.3g} to {MOST * balanced:.3g} would be"
    )


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
