"""What llama.cpp keeps of a weight: quantized without an importance matrix and read back, to the bit.

Source: ``quantize_row_*_ref`` and ``dequantize_row_*`` of ggml/src/ggml-quants.c, in whose float32 arithmetic every sum
and product is rounded by itself (x86-64; where a compiler fuses them, a few ties fall the other way). Hence sums are
taken term by term in C's order, and every divisor is a tensor: GPUs divide by a number by multiplying.
Throughout, the first axis runs over the numbers of a block, the others over blocks.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Numbers at a time: what stays in a processor's cache, and what is worth starting a GPU's kernels for."""
_TINY = 1e-15
_SUPER = 256
"""Numbers that share a K type's scales."""


def rounded(weight: Tensor, kind: str) -> Tensor:
    """The float32 numbers that a tensor of llama.cpp's type ``kind``, made of ``weight``, stands for.

    Rows must be multiples of the type's block. KeyError for a type that is not in ``TYPES``.
    """
    block, keep = TYPES[kind]
    found = torch.empty_like(weight, dtype=torch.float32)
    blocks, into = weight.detach().view(-1, block), found.view(-1, block)
    many = _CHUNK[weight.device.type] // block
    for part, kept in zip(torch.split(blocks, many), torch.split(into, many), strict=True):
        kept.copy_(keep(part.float().T.contiguous()).T)
    return found


def _symmetric(x: Tensor, half: int) -> Tensor:
    """Q4_0, Q5_0: the number farthest from 0 is the lowest level."""
    scale = _farthest(x) / -half  # a power of two, so exact as a product too
    levels = (x * _inverse(scale) + (half + 0.5)).trunc().clamp(max=2 * half - 1)
    return (levels - half) * _fp16(scale)


def _affine(x: Tensor, top: int) -> Tensor:
    """Q4_1, Q5_1: levels from the lowest number to the highest."""
    low = x.amin(0)
    scale = _divide(x.amax(0) - low, top)
    levels = ((x - low) * _inverse(scale) + 0.5).trunc().clamp(max=top)
    return levels * _fp16(scale) + _fp16(low)


def _eight_bits(x: Tensor) -> Tensor:
    """Q8_0."""
    scale = _divide(x.abs().amax(0), 127)
    exact = x * _inverse(scale)
    floor = exact.abs().floor()
    levels = exact.sign() * (floor + (2 * (exact.abs() - floor)).floor())  # C rounds halves away from 0
    return levels * _fp16(scale)


def _two_bits(x: Tensor) -> Tensor:
    """Q2_K: blocks of 16, whose scales and offsets have 4 bits."""
    parts = _parts(x, 16)
    scale, offset = (_shared(v, 15) for v in _search(parts, parts.abs(), 3, _factors(-0.5, 16, 3), squared=False))
    return _with_offset(parts, 3, scale, offset)


def _offset_bits(x: Tensor, top: int, first: float, tries: int) -> Tensor:
    """Q4_K, Q5_K: blocks of 32, whose scales and offsets have 6 bits."""
    parts = _parts(x, 32)
    # torch's float32 root is not always the nearest number.
    weights = _divide(_total(parts * parts), 32).double().sqrt().float() + parts.abs()
    found = _search(parts, weights, top, _factors(first, tries, top), squared=True)
    scale, offset = (_shared(v, 63) for v in found)
    return _with_offset(parts, top, scale, offset)


def _with_offset(parts: Tensor, top: int, scale: Tensor, offset: Tensor) -> Tensor:
    levels = ((parts + offset) / scale).round().clamp(0, top)
    return _whole(torch.where(scale != 0, scale * levels, 0) - offset)


def _three_bits(x: Tensor) -> Tensor:
    """Q3_K: blocks of 16, whose scales have 6 bits with a sign."""
    parts = _parts(x, 16)
    return _signed(parts, _descend(parts, 4), levels=4, top=31, half=32)


def _six_bits(x: Tensor) -> Tensor:
    """Q6_K: blocks of 16, whose scales have 8 bits with a sign."""
    parts = _parts(x, 16)
    return _signed(parts, _scale(parts, 32), levels=32, top=127, half=128)


def _signed(parts: Tensor, scale: Tensor, *, levels: int, top: int, half: int) -> Tensor:
    largest = _farthest(scale)
    inverse = _divide(-half, largest)
    steps = (inverse * scale).round().clamp(-half, top)
    there = largest.abs() >= _TINY
    scale = torch.where(there, _fp16(_divide(1, inverse)) * steps, 0)
    found = (parts / scale).round().clamp(-levels, levels - 1)
    return _whole(torch.where(scale != 0, scale * found, 0))


def _search(x: Tensor, weights: Tensor, top: int, factors: Sequence[float], *, squared: bool) -> tuple[Tensor, Tensor]:
    """``make_qkx2_quants``: scale and offset of the levels 0 to ``top`` with the least weighted error."""

    def levels(inverse: Tensor) -> Tensor:
        return (inverse * (x - low)).round().clamp(0, top)

    def error(found: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        off = scale * found + low - x
        return _total(weights * (off * off if squared else off.abs()))

    low, high = x.amin(0).clamp(max=0), x.amax(0)
    sum_w, sum_x = _total(weights), _total(weights * x)
    flat = high == low
    inverse = _divide(top, high - low)
    scale = _divide(1, inverse)
    best = error(levels(inverse), scale, low)
    for factor in factors:
        found = levels(_divide(factor, high - low))
        weighted = weights * found
        sum_l, sum_l2, sum_xl = _total(weighted), _total(weighted * found), _total(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        own_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        own_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        own_scale = torch.where(own_low > 0, sum_xl / sum_l2, own_scale)
        own_low = own_low.clamp(max=0)
        now = error(found, own_scale, own_low)
        better = (determinant > 0) & (now < best)
        best, scale, low = (torch.where(better, a, b) for a, b in ((now, best), (own_scale, scale), (own_low, low)))
    return torch.where(flat, 0, scale), -low


def _scale(x: Tensor, half: int) -> Tensor:
    """``make_qx_quants``: the scale of the levels -half to half - 1 with the least error, weighted by the squares."""
    largest, weights = _farthest(x), x * x
    best = scale = torch.zeros_like(largest)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = _divide(-float(np.float32(half) + np.float32(0.1) * np.float32(step)), largest)
        levels = (inverse * x).round().clamp(-half, half - 1)
        sum_xl, sum_l2 = _total(weights * x * levels), _total(weights * levels * levels)
        own = torch.where(sum_l2 != 0, sum_xl / sum_l2, 0)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2) if step else torch.ones_like(sum_l2, dtype=torch.bool)
        best, scale = torch.where(better, own * sum_xl, best), torch.where(better, own, scale)
    return torch.where(largest.abs() >= _TINY, scale, 0)


def _descend(x: Tensor, half: int) -> Tensor:
    """``make_q3_quants``: the same for three bits, one level changed at a time."""
    largest, weights = _farthest(x), x * x
    levels = (_divide(-half, largest) * x).round().clamp(-half, half - 1)
    sum_xl, sum_l2 = _total(weights * x * levels), _total(weights * levels * levels)
    for _ in range(5):
        for i in range(len(x)):
            w, v, old = weights[i], x[i], levels[i]
            xl, l2 = sum_xl - w * v * old, sum_l2 - w * old * old
            new = (v * l2 / xl).round().clamp(-half, half - 1)
            own_xl, own_l2 = xl + w * v * new, l2 + w * new * new
            better = (xl > 0) & (new != old) & (own_l2 > 0)
            better &= own_xl * own_xl * sum_l2 > sum_xl * sum_xl * own_l2
            levels[i] = torch.where(better, new, old)
            sum_xl, sum_l2 = torch.where(better, own_xl, sum_xl), torch.where(better, own_l2, sum_l2)
    return torch.where((largest.abs() >= _TINY) & (sum_l2 > 0), sum_xl / sum_l2, 0)


def _factors(first: float, tries: int, top: int) -> list[float]:
    """What ``make_qkx2_quants`` divides by a block's width, in float32."""
    steps = np.float32(0.1) * np.arange(tries, dtype=np.float32)
    return [float(factor) for factor in np.float32(first) + steps + np.float32(top)]


def _shared(values: Tensor, top: int) -> Tensor:
    """A larger block's scales or offsets, none of them negative: whole multiples, up to ``top``, of one number."""
    most = values.amax(0).clamp(min=0)
    inverse = torch.where(most > 0, _divide(top, most), 0)
    return (inverse * values).round().clamp(max=top) * _fp16(_divide(most, top))


def _parts(x: Tensor, size: int) -> Tensor:
    """(256, n) as (size, 256 / size, n)."""
    return x.view(-1, size, x.shape[-1]).transpose(0, 1).contiguous()


def _whole(parts: Tensor) -> Tensor:
    """The opposite."""
    return parts.transpose(0, 1).reshape(_SUPER, -1)


def _total(terms: Tensor) -> Tensor:
    first, *others = terms
    total: Tensor = first.clone()
    for term in others:
        total += term
    return total


def _farthest(x: Tensor) -> Tensor:
    """The number farthest from 0, the first of several."""
    found: Tensor = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    return found


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale != 0, _divide(1, scale), 0)


def _divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """Where one of them is a number."""
    if isinstance(a, Tensor):
        return a / torch.full_like(a, b)  # type: ignore[arg-type]
    return torch.full_like(b, a) / b  # type: ignore[arg-type]


def _fp16(x: Tensor) -> Tensor:
    return x.half().float()


TYPES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "BF16": (1, lambda x: x.bfloat16().float()),
    "F16": (1, _fp16),
    "Q8_0": (32, _eight_bits),
    "Q5_1": (32, partial(_affine, top=31)),
    "Q5_0": (32, partial(_symmetric, half=16)),
    "Q4_1": (32, partial(_affine, top=15)),
    "Q4_0": (32, partial(_symmetric, half=8)),
    "Q6_K": (_SUPER, _six_bits),
    "Q5_K": (_SUPER, partial(_offset_bits, top=31, first=-0.5, tries=16)),
    "Q4_K": (_SUPER, partial(_offset_bits, top=15, first=-1.0, tries=21)),
    "Q3_K": (_SUPER, _three_bits),
    "Q2_K": (_SUPER, _two_bits),
}
"""llama.cpp's tensor types: numbers in a block, and what becomes of blocks."""
