"""How long rows are, and what a stage's ``maxLength`` makes of them: every row is encoded once, as training will."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_api.pipeline import block, kind
from finetune_api.types import BuiltinReward, FineTuneJobSpec, Preference, Rl, Stage, TrainingBlock
from finetune_jobs.data.encode import (
    NOTHING_LEFT,
    OVERLONG,
    Dropped,
    Encoded,
    LossOn,
    encode_pairs,
    encode_rows,
    prompt_ids,
)
from finetune_jobs.data.load import Mistakes
from finetune_jobs.data.rows import Row
from finetune_jobs.data.sets import Sets
from finetune_jobs.run.digest import data_set
from finetune_jobs.run.errors import ConfigurationError, DataError

ROLES = {
    "sft": ("train", "eval"),
    "preference": ("preference", "preferenceEval"),
    "reward": ("preference", "preferenceEval"),
    "rl": ("prompts", "promptsEval"),
}
"""What a training stage reads of its set, what it learns from first."""

Stretch = tuple[int, int]
"""Learned tokens that stand together: the place of the first, and the one after the last."""
Measured = tuple[int, list[Stretch], int]
"""A row's tokens, ``learned`` and ``first``."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row of a role, as a stage with no limit on length would see them."""

    tokens: list[int]
    learned: list[list[Stretch]]
    """Of a pair's two answers one after the other. The first token of a row is never learned: nothing predicts it."""
    first: list[int]
    """The place that must stay for anything to be learned: the first token learned; of a pair, where answers differ."""

    @property
    def supervised(self) -> list[int]:
        """Tokens learned of each row."""
        return [sum(end - start for start, end in row) for row in self.learned]


class Counted:
    """How long the rows are, counted once for each set, role and choice of supervised tokens."""

    def __init__(
        self, sets: Sets, tokenizer: PreTrainedTokenizerBase, mistakes: Mistakes, beat: Callable[[], None]
    ) -> None:
        self._sets, self._tokenizer, self._mistakes, self._beat = sets, tokenizer, mistakes, beat
        self._known: dict[tuple[str, str, LossOn], Lengths] = {}

    def of(self, name: str, role: str, loss_on: LossOn = "auto") -> Lengths:
        """Of all rows of that role; mistakes in rows go to the collector."""
        key = (name, role, loss_on)
        if key not in self._known:
            rows = self._sets.sets[name][role].rows
            if role in ROLES["rl"]:
                measured = self._prompts(rows)
            elif role in ROLES["preference"]:
                measured = self._preferences(rows)
            else:
                measured = self._rows(rows, loss_on)
            self._known[key] = _by_column(measured)
        return self._known[key]

    def roles(self, name: str) -> set[str]:
        """That have rows."""
        return set(self._sets.sets[name])

    def any_of(self, name: str, role: str) -> Lengths:
        """As some stage counts them; as ``auto`` does if none has."""
        return next((found for key, found in self._known.items() if key[:2] == (name, role)), None) or self.of(
            name, role
        )

    def _refused(self, error: DataError) -> None:
        self._mistakes.add(str(error))

    def _rows(self, rows: Iterable[Row], loss_on: LossOn) -> Iterator[Measured]:
        for encoded in encode_rows(rows, self._tokenizer, loss_on=loss_on, max_length=None, refused=self._refused):
            self._beat()
            if isinstance(encoded, Encoded):
                learned = _stretches(encoded.supervised)
                yield len(encoded.input_ids), learned, learned[0][0]

    def labelled(self, name: str, role: str) -> int:
        """Rows of single answers with a label."""
        return sum("label" in row for row in self._sets.sets[name][role].rows)

    def _preferences(self, rows: Sequence[Row]) -> Iterator[Measured]:
        yield from self._pairs(row for row in rows if "label" not in row)
        yield from self._rows((row for row in rows if "label" in row), "completion")

    def unanswered(self, name: str, role: str) -> list[Row]:
        """Rows without a reference."""
        return [row for row in self._sets.sets[name][role].rows if "reference" not in row]

    def _prompts(self, rows: Iterable[Row]) -> Iterator[Measured]:
        """Nothing of a prompt is learned, and none is cut."""
        for row in rows:
            self._beat()
            try:
                ids = prompt_ids(row, self._tokenizer)
            except DataError as error:
                self._refused(error)
            else:
                yield len(ids), [], 0

    def _pairs(self, rows: Iterable[Row]) -> Iterator[Measured]:
        for pair in encode_pairs(rows, self._tokenizer, max_length=None, refused=self._refused):
            self._beat()
            if not isinstance(pair, Dropped):
                answers = (pair.chosen_ids, pair.rejected_ids)
                differ = next(
                    i
                    for i in range(max(map(len, answers)))
                    if pair.chosen_ids[i : i + 1] != pair.rejected_ids[i : i + 1]
                )
                prompt = len(pair.prompt_ids)
                learned = [(max(1, prompt), prompt + len(answer)) for answer in answers]
                yield prompt + max(map(len, answers)), learned, prompt + differ


def _stretches(supervised: Sequence[bool]) -> list[Stretch]:
    found: list[Stretch] = []
    at = 0
    for learned, run in groupby([False, *supervised[1:]]):
        end = at + len(list(run))
        if learned:
            found.append((at, end))
        at = end
    return found


def _within(learned: Iterable[Stretch], length: int) -> int:
    """How many of the tokens learned are among the first ``length``."""
    return sum(max(0, min(end, length) - start) for start, end in learned)


def usage(lengths: Lengths, max_length: int, overlong: str) -> dict[str, Any]:
    """What a training stage uses of a role: rows, tokens, and what its ``maxLength`` costs."""
    dropped: dict[str, int] = {}
    cut = used = tokens = supervised = 0
    for length, learned, first in zip(lengths.tokens, lengths.learned, lengths.first, strict=True):
        if length <= max_length:
            used, tokens, supervised = used + 1, tokens + length, supervised + _within(learned, length)
        elif overlong == "drop" or first >= max_length:
            reason = OVERLONG if overlong == "drop" else NOTHING_LEFT
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            cut, used, tokens = cut + 1, used + 1, tokens + max_length
            supervised += _within(learned, max_length)
    return {"rows": used, "tokens": tokens, "supervisedTokens": supervised, "cut": cut, "dropped": dropped}


def stage_card(spec: FineTuneJobSpec, stage: Stage, counted: Counted) -> dict[str, Any]:
    """What the stage will use of its rows. DataError if nothing is left of what it learns from."""
    training = block(stage)
    assert isinstance(training, TrainingBlock)
    which, name = kind(spec, stage.name), data_set(spec, stage.name)
    settings = training.training
    where = f"spec.pipeline[{spec.pipeline.index(stage)}]"
    loss_on: LossOn = settings.loss_on if which == "sft" else "auto"
    answer = training.generation.max_new_tokens if isinstance(training, Rl) else 0
    roles: dict[str, Any] = {}
    for role in ROLES[which]:
        if role not in counted.roles(name):
            continue
        if role in ROLES["preference"] and (labelled := counted.labelled(name, role)) and not _takes_labels(training):
            raise ConfigurationError(
                f"{where}.{which}: learns from pairs, but {labelled} rows of {role} are single answers with a label; "
                "write `preference: {loss: kto}`, or give pairs"
            )
        try:
            found = counted.of(name, role, loss_on)
        except ConfigurationError as error:
            path = f"{where}.{which}." if str(error).startswith("training.") else ""
            raise ConfigurationError(f"{path}{error}") from error
        if isinstance(training, Rl):
            _check_references(training, f"{where}.rl", counted.unanswered(name, role))
        roles[role] = usage(found, settings.max_length - answer, settings.overlong)
        if role == ROLES[which][0] and found.tokens and not roles[role]["rows"]:
            raise DataError(
                f"{where}.{which}.training.maxLength: none of the {len(found.tokens)} rows of {role} can be used with "
                f"{settings.max_length} tokens"
                + (f", {answer} of them for the answer" if answer else "")
                + f" (the shortest has {min(found.tokens)}); raise it, or give shorter rows"
            )
    if ROLES[which][0] not in roles:
        raise ConfigurationError(
            f"spec.data.{ROLES[which][0]}: stage {stage.name} learns from these rows, but there are none"
        )
    longest = max(
        (min(n + answer, settings.max_length) for role in roles for n in counted.of(name, role, loss_on).tokens),
        default=0,
    )
    return {
        "set": name,
        "longest": longest,
        "maxLength": settings.max_length,
        "overlong": settings.overlong,
        "roles": roles,
    }


def _check_references(block: Rl, where: str, unanswered: list[Row]) -> None:
    compared = [n for n, reward in enumerate(block.rewards) if reward.builtin is BuiltinReward.EXACT_MATCH]
    if compared and unanswered:
        row = unanswered[0]
        raise DataError(
            f"{where}.rewards[{compared[0]}]: exactMatch compares with the column reference, which {len(unanswered)} "
            f"prompts lack (first {row['source']}:{row['line']}); add it, or name yours with `columns: {{reference: "
            "<yours>}`"
        )


def _takes_labels(block: TrainingBlock) -> bool:
    return isinstance(block, Preference) and block.loss == "kto"


def _by_column(measured: Iterable[Measured]) -> Lengths:
    lengths = Lengths([], [], [])
    for tokens, learned, first in measured:
        lengths.tokens.append(tokens)
        lengths.learned.append(learned)
        lengths.first.append(first)
    return lengths
