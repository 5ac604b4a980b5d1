"""From encoded examples to the tensors of a micro-batch.

How a step's examples are dealt to processes, split into micro-batches and laid out in rows changes speed and memory,
never what is learned: the loss is a sum over answers divided by the whole step's weight (``loop.py``), and packed
sequences do not see each other.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune_jobs.data.encode import Encoded, EncodedPair
from finetune_jobs.data.labels import EncodedAnswer


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sequence: its token ids, and which of them the model learns to say."""

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence, or for a pair two: chosen, rejected."""

    sequences: tuple[Tokens, ...]
    reference: tuple[float, ...] = ()
    """The log-probability of each answer under the model as it came in, for losses that compare with it."""
    desirable: bool | None = None
    """For an answer that is judged for itself."""

    @property
    def tokens(self) -> int:
        """All tokens of all sequences."""
        return sum(len(s.ids) for s in self.sequences)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(s.ids) for s in self.sequences)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest."""
        return min(len(s.ids) for s in self.sequences)

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss. The first of a sequence cannot: nothing precedes it."""
        return sum(int(s.supervised[1:].sum()) for s in self.sequences)

    def with_reference(self, reference: Iterable[float]) -> "Example":
        """The same with its reference log-probabilities."""
        return replace(self, reference=tuple(reference))


def example(encoded: Encoded) -> Example:
    """A row of supervised fine-tuning."""
    return Example((_tokens(encoded.input_ids, encoded.supervised),))


def pair(encoded: EncodedPair) -> Example:
    """A preference pair: the same prompt before the chosen and the rejected answer, only the answers counting."""
    return Example(tuple(_answer(encoded.prompt_ids, ids) for ids in (encoded.chosen_ids, encoded.rejected_ids)))


def judged(encoded: EncodedAnswer) -> Example:
    """An answer that is desirable or not; only the answer counts."""
    return Example((_answer(encoded.prompt_ids, encoded.answer_ids),), desirable=encoded.desirable)


def _answer(prompt: Sequence[int], answer: Sequence[int]) -> Tokens:
    return _tokens([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def _tokens(ids: Sequence[int], supervised: Sequence[bool]) -> Tokens:
    return Tokens(np.asarray(ids, np.int32), np.asarray(supervised, np.bool_))


@dataclass(frozen=True)
class Layout:
    """How much goes into one micro-batch, and how it lies there."""

    packed: bool
    """All sequences in one row without padding, each with positions from 0."""
    tokens: int | None
    """Most tokens of a micro-batch, padding included; one example that is longer has a micro-batch of its own."""
    examples: int | None = None
    """Most examples of a micro-batch."""

    def split(self, examples: Sequence[Example], rank: int = 0, processes: int = 1) -> list[list[int]]:
        """One process's micro-batches as positions in ``examples``; all processes together have each exactly once."""
        # Sorted by length, every process gets about as much work, and a micro-batch needs little padding.
        by_length = sorted(range(len(examples)), key=lambda i: -examples[i].tokens)
        groups: list[list[int]] = []
        for i in by_length[rank::processes]:
            if groups and self._fits([examples[j] for j in groups[-1]], examples[i]):
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def turns(
        self, examples: Sequence[Example], rank: int, processes: int, *, together: bool
    ) -> Iterator[tuple[list[int], bool]]:
        """As ``split``, and whether the micro-batch counts. ``together``: every process has as many, for a pass needs
        them all; one that has fewer repeats the shortest example, which then counts nothing.
        """
        own = self.split(examples, rank, processes)
        most = max(len(self.split(examples, r, processes)) for r in range(processes)) if together else len(own)
        for group in own:
            yield group, True
        for _ in range(most - len(own)):
            yield [min(range(len(examples)), key=lambda i: examples[i].tokens)], False

    def _fits(self, group: Sequence[Example], more: Example) -> bool:
        together = [*group, more]
        if self.examples is not None and len(together) > self.examples:
            return False
        if self.tokens is None:
            return True
        if self.packed:
            return sum(e.tokens for e in together) <= self.tokens
        return max(e.longest for e in together) * sum(len(e.sequences) for e in together) <= self.tokens


@dataclass(frozen=True)
class MicroBatch:
    """What the model reads at once, and where in it the answers are."""

    input_ids: Tensor
    """(rows, length)"""
    position_ids: Tensor
    """(rows, length); from 0 for each sequence, which is also what keeps packed sequences apart."""
    attention_mask: Tensor | None
    """(rows, length), 1 for tokens and 0 for padding; None when packed."""
    predicts: Tensor
    """(rows, length), true where the next token counts in the loss."""
    targets: Tensor
    """(n,) the tokens that count, in the order of ``predicts``."""
    sequence: Tensor
    """(n,) the sequence that each of them belongs to, from 0."""
    sequences: int
    lengths: Tensor
    """(rows, length) the length of the sequence that a token belongs to."""
    reference: Tensor
    """(sequences,) where a loss compares with it, else empty."""
    desirable: Tensor
    """(examples,) for answers that are judged for themselves, else empty."""
    kl: float = 0.0
    """For kto: the mean log-ratio of mismatched prompts and answers over the whole step."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(examples: Sequence[Example], *, packed: bool) -> MicroBatch:
    """Lay the examples out: one row for all when packed, else one row for each sequence, padded at the right."""
    sequences = [s for e in examples for s in e.sequences]
    lengths = [len(s.ids) for s in sequences]
    width = sum(lengths) if packed else max(lengths)
    shape = (1, width) if packed else (len(sequences), width)
    ids = np.zeros(shape, np.int64)  # padding is masked, so any id will do
    positions = np.zeros(shape, np.int64)
    predicts = np.zeros(shape, np.bool_)
    real = np.zeros(shape, np.int64)
    own_length = np.ones(shape, np.int64)
    targets, owners = [], []
    at = 0
    for number, (one, length) in enumerate(zip(sequences, lengths, strict=True)):
        place = (0, slice(at, at + length)) if packed else (number, slice(0, length))
        at += length
        ids[place] = one.ids
        positions[place] = np.arange(length)
        predicts[place] = np.append(one.supervised[1:], False)
        real[place] = 1
        own_length[place] = length
        targets.append(one.ids[1:][one.supervised[1:]])
        owners.append(np.full(len(targets[-1]), number))
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=None if packed else torch.from_numpy(real),
        predicts=torch.from_numpy(predicts),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        sequence=torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        sequences=len(sequences),
        lengths=torch.from_numpy(own_length),
        reference=torch.tensor([value for e in examples for value in e.reference], dtype=torch.float32),
        desirable=torch.tensor([e.desirable for e in examples if e.desirable is not None], dtype=torch.bool),
    )
