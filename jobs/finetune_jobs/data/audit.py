"""What the rows look like: duplicates, overlap, lengths. Figures about the data, no judgement of single rows.

Near duplicates: texts whose sets of 8-character pieces overlap by at least 0.8 (Jaccard), found by MinHash in bands
(Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3) and confirmed by counting. Characters,
not words: not every language has spaces.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from finetune_jobs.data.rows import Row
from finetune_jobs.data.split import normalised, row_key, texts

SAMPLE_ROWS = 50_000
"""Near duplicates are sought among so many rows; of more, in a sample."""
NEAR = 0.8
_PIECE = 8
_TEXT_CHARACTERS = 8_000
_BANDS, _BAND_ROWS = 12, 4
"""A pair at 0.8 is found with probability 1 - (1 - 0.8^4)^12 = 0.998."""
_COMPARED = 4
"""Each band compares a row with the first few that look alike, so that a set of equal rows does not take n^2."""
Hashes: TypeAlias = NDArray[np.uint64]
Report = Callable[[int], None]
MARKERS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "[INST]",
    "<start_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|eot_id|>",
    "<|im_end|>",
)


def exact_duplicates(rows: Sequence[Row]) -> int:
    """How many rows say what an earlier one says."""
    return len(rows) - len({row_key(row) for row in rows})


def exact_overlap(train: Iterable[Row], test: Iterable[Row]) -> list[Row]:
    """The test rows that are also trained on."""
    trained = {row_key(row) for row in train}
    return [row for row in test if row_key(row) in trained]


class NearIndex:
    """Rows in which near duplicates of others can be found; keeps 100 bytes a row, not its text."""

    def __init__(self, rows: Sequence[Row], report: Report = lambda rows: None) -> None:
        """Rows beyond SAMPLE_ROWS are left out, at random but always the same."""
        if len(rows) > SAMPLE_ROWS:
            rows = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:SAMPLE_ROWS]
        self.rows = rows
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(_BANDS)]
        self.duplicates = 0
        """Rows that nearly repeat an earlier one and do not repeat it exactly."""
        for number, row in enumerate(rows):
            pieces = _pieces(row)
            signature = _signature(pieces)
            if self._nearest(pieces, signature, unlike=row_key(row)):
                self.duplicates += 1
            for band, key in zip(self._bands, _band_keys(signature), strict=True):
                members = band.setdefault(key, [])
                if len(members) < _COMPARED:
                    members.append(number)
            report(number + 1)

    def near(self, row: Row) -> bool:
        """A row of the index nearly, but not exactly, says what this one says."""
        pieces = _pieces(row)
        return self._nearest(pieces, _signature(pieces), unlike=row_key(row))

    def _nearest(self, pieces: Hashes, signature: Hashes, *, unlike: str) -> bool:
        candidates = {
            i for band, key in zip(self._bands, _band_keys(signature), strict=True) for i in band.get(key, [])
        }
        return any(
            _jaccard(pieces, _pieces(self.rows[i])) >= NEAR and row_key(self.rows[i]) != unlike
            for i in sorted(candidates)
        )


def _pieces(row: Row) -> Hashes:
    """Hashes of all runs of 8 characters; the rest of a very long text is not looked at."""
    text = normalised(" ".join(texts(row)))[:_TEXT_CHARACTERS]
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if len(codes) < _PIECE:
        codes = np.concatenate([codes, np.zeros(_PIECE - len(codes), dtype=np.uint64)])
    rolled = np.zeros(len(codes) - _PIECE + 1, dtype=np.uint64)
    for offset in range(_PIECE):
        rolled = rolled * _BASE + codes[offset : offset + len(rolled)]
    return _mixed(rolled)


_BASE = np.uint64(0x100000001B3)
_SALTS = np.random.default_rng(0).integers(1, 2**63, size=_BANDS * _BAND_ROWS, dtype=np.uint64)


def _mixed(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64: every bit depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _signature(pieces: Hashes) -> Hashes:
    # An odd multiplier and the high bits make a permutation good enough for minima.
    scrambled = (pieces[None, :] * (_SALTS | np.uint64(1))[:, None]) ^ _SALTS[:, None]
    smallest: Hashes = scrambled.min(axis=1)
    return smallest


def _band_keys(signature: Hashes) -> list[bytes]:
    return [signature[i * _BAND_ROWS : (i + 1) * _BAND_ROWS].tobytes() for i in range(_BANDS)]


def _jaccard(a: Hashes, b: Hashes) -> float:
    a, b = np.unique(a), np.unique(b)
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def summary(values: Sequence[int]) -> dict[str, Any]:
    """Smallest, mean, percentiles, and a histogram whose bounds are powers of two."""
    if not values:
        return {}
    ordered = np.sort(np.asarray(values))
    percentiles = {f"p{p}": int(ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))]) for p in (50, 90, 99)}
    bounds = Counter(1 << int(v - 1).bit_length() if v > 1 else 1 for v in values)
    return {
        "total": int(ordered.sum()),
        "min": int(ordered[0]),
        "mean": round(float(ordered.mean()), 1),
        **percentiles,
        "max": int(ordered[-1]),
        "histogram": [{"upTo": bound, "rows": bounds[bound]} for bound in sorted(bounds)],
    }


def labels(rows: Iterable[Row]) -> dict[str, int]:
    """Answers by label, and how many answers are labelled both ways; empty where no row has one."""
    judged = [row for row in rows if "label" in row]
    if not judged:
        return {}
    desirable = sum(row["label"] for row in judged)
    sides = [{row_key(row) for row in judged if row["label"] is side} for side in (True, False)]
    return {
        "desirable": desirable,
        "undesirable": len(judged) - desirable,
        "contradictions": len(sides[0] & sides[1]),
    }


def roles(rows: Iterable[Row]) -> dict[str, int]:
    """Turns by role, over all conversations."""
    counted = Counter(m["role"] for row in rows for m in row.get("messages", []))
    return dict(sorted(counted.items()))


def foreign_markers(rows: Iterable[Row], own_template: str) -> dict[str, int]:
    """Plain text rows with another model's chat markers, by marker: the template was probably applied already."""
    found: Counter[str] = Counter()
    for row in rows:
        if "text" in row or isinstance(row.get("prompt"), str):
            text = "\n".join(texts(row))
            found.update(marker for marker in MARKERS if marker in text and marker not in own_template)
    return dict(found)
