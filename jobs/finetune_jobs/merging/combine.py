"""What several adapters add to one tensor, as one change: sums, TIES, DARE, and the nearest change of a low rank.

The deltas are combined, each times its weight, never the factors A and B: a sum of factors is no sum of their products.
Everything is reckoned again for each block of rows, so that no delta is ever held whole.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune_jobs.merging.updates import LoraUpdate, Update
from finetune_jobs.run.errors import DataError


@dataclass(frozen=True)
class Combination:
    """How deltas become one."""

    how: Literal["linear", "ties", "dareTies", "svd"] = "linear"
    density: float = 1.0
    """For ties and dareTies: the share of each delta's numbers that is kept."""
    rank: int | None = None
    """For svd; None: the highest of the adapters."""
    seed: int = 0
    """For dareTies."""


@dataclass(frozen=True)
class Drop:
    """DARE (arXiv:2311.03099): numbers are dropped at random, and the others divided by the share that stays."""

    key: int
    """128 bits, of the counter-based generator: a number's fate depends on its place in the tensor alone, whatever the
    blocks, the threads, and the run."""
    density: float

    def kept(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of the numbers from ``first`` on stay."""
        skipped, counter = first % 8, first // 8  # Philox gives eight 32-bit words for each value of its counter
        words = np.random.Philox(key=self.key, counter=counter).random_raw((skipped + count + 7) // 8 * 4)
        drawn = words.astype("<u8").view("<u4")[skipped : skipped + count]
        return drawn < np.uint64(round(self.density * 2**32))


@dataclass(frozen=True)
class Part:
    """One adapter's share of a combination."""

    update: Update
    weight: float
    least: float = 0.0
    """TIES: numbers of the delta that are smaller than this are left out."""
    drop: Drop | None = None

    def delta(self, base: Tensor, start: int, stop: int) -> Tensor:
        """These rows of what it adds to the weights, in float32; ``base`` has the same rows."""
        delta = delta_of(self.update, base, start, stop)
        if self.least:
            delta = torch.where(delta.abs() >= self.least, delta, 0.0)
        if self.drop is not None:
            width = math.prod(delta.shape[1:])
            kept = torch.from_numpy(self.drop.kept(start * width, delta.numel())).reshape(delta.shape)
            delta = torch.where(kept, delta / self.drop.density, 0.0)
        return delta * self.weight


def delta_of(update: Update, base: Tensor, start: int, stop: int) -> Tensor:
    """These rows of what an adapter adds to the weights, in float32; ``base`` has the same rows."""
    if isinstance(update, LoraUpdate) and update.magnitude is None:
        return (update.b[start:stop] * update.scale) @ update.a
    return update.rows(base, start, stop) - base.float()


@dataclass(frozen=True)
class _Parts:
    """What several adapters add to one tensor."""

    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first update, for messages."""
        return self.parts[0].update.shape

    @property
    def unchanged(self) -> bool:
        """Nothing was learned, as far as can be told."""
        return all(part.update.unchanged for part in self.parts)


@dataclass(frozen=True)
class Sum(_Parts):
    """``W + sum of w_i Delta_i`` (task arithmetic, arXiv:2212.04089), where A and B are not all that there is."""

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The merged rows, in float32."""
        merged = base.float()
        for part in self.parts:
            merged = merged + part.delta(base, start, stop)
        return merged

    def outputs(self, base: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
        """What base and adapters give side by side."""
        given = base.float().reshape(stop - start, -1) @ x
        return given + sum(part.weight * (part.update.outputs(base, x, start, stop) - given) for part in self.parts)


@dataclass(frozen=True)
class Elected(_Parts):
    """TIES (arXiv:2306.01708, section 3): each number's sign is that of the sum; the mean of those that agree is added.

    Of equal masses the positive one is elected. What is 0 has no sign and does not count.
    """

    def rows(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The merged rows, in float32."""
        deltas = [part.delta(base, start, stop) for part in self.parts]
        sign = _majority(deltas)
        total, voters = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta in deltas:
            agreeing = delta.mul_(sign).clamp_(min=0)
            total += agreeing
            voters += agreeing.sign_()
        return base.float() + total.div_(voters.clamp_(min=1)).mul_(sign)

    def outputs(self, base: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
        """What the layer gives, the mean taken of either side and the elected one chosen."""
        deltas = [part.delta(base, start, stop) for part in self.parts]
        ups, downs = ([(delta * side).clamp_(min=0) for delta in deltas] for side in (1, -1))
        up, down = (sum(side[1:], side[0]) / sum((one > 0 for one in side), torch.zeros(1)) for side in (ups, downs))
        chosen = torch.where(_majority(deltas) > 0, up, -down).nan_to_num_(nan=0.0)  # 0 / 0: nobody is for it
        flat = base.float().reshape(stop - start, -1)
        return flat @ x + chosen.reshape(stop - start, -1) @ x


def _majority(deltas: Sequence[Tensor]) -> Tensor:
    """1 where the sum is not negative, else -1."""
    return torch.where(sum(deltas[1:], deltas[0]) >= 0, 1.0, -1.0)


Change = Update | Sum | Elected


def combine(
    name: str,
    updates: Mapping[int, Update],
    weights: Sequence[float],
    combination: Combination,
    smallest_kept: Callable[[Update], float],
) -> tuple[Change, float]:
    """The one change of the tensor ``name``, and the share of it that a low rank leaves out, in its L2 norm.

    ``updates`` goes by the adapter's place in ``weights``; an adapter that leaves the tensor alone has none.
    ``smallest_kept`` tells from which magnitude on the ``density`` largest numbers of a delta are.

    Raises:
        DataError: svd of what is not A and B alone.
    """
    parts = [Part(update, weights[place]) for place, update in updates.items()]
    plain = [part.update for part in parts if isinstance(part.update, LoraUpdate) and part.update.magnitude is None]
    match combination.how:
        case "ties":
            if combination.density < 1:
                parts = [replace(part, least=smallest_kept(part.update)) for part in parts]
            return Elected(tuple(parts)), 0.0
        case "dareTies":
            keys = [_key(combination.seed, place, name) for place in updates]
            drops = [Drop(key, combination.density) for key in keys]
            return Elected(tuple(replace(p, drop=d) for p, d in zip(parts, drops, strict=True))), 0.0
        case how if len(plain) == len(parts):
            joined = LoraUpdate(
                torch.cat([one.a for one in plain]),
                torch.cat([part.weight * one.scale * one.b for part, one in zip(parts, plain, strict=True)], dim=1),
                1.0,
            )
            if how == "linear":
                return joined, 0.0
            return truncated(joined, combination.rank or max(len(one.a) for one in plain))
        case "linear":
            return Sum(tuple(parts)), 0.0
        case _:
            raise DataError(f"tensor {name}: svd is of lora's A and B alone, and one adapter trained it otherwise")


def _key(seed: int, place: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}/{name}".encode()).digest()[:16], "big")


def truncated(update: LoraUpdate, rank: int) -> tuple[LoraUpdate, float]:
    """The update of that rank that is nearest to this one of scale 1 (Eckart and Young 1936), and the share of its norm
    that is lost. By the factors' own small matrices; the product is never made.
    """
    left, upper = torch.linalg.qr(update.b.double())
    right, lower = torch.linalg.qr(update.a.double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T)
    root = s[:rank].sqrt()
    a, b = root[:, None] * (vh[:rank] @ right.T), (left @ u[:, :rank]) * root
    lost = s[rank:].square().sum() / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny)
    return LoraUpdate(a.float().contiguous(), b.float().contiguous(), 1.0), float(lost.sqrt())


def smallest_of_largest(magnitudes: npt.NDArray[np.float32], density: float) -> float:
    """The smallest of the ``density`` largest numbers; puts them into another order."""
    kept = max(1, int(density * magnitudes.size))
    magnitudes.partition(magnitudes.size - kept)
    return float(magnitudes[magnitudes.size - kept])
