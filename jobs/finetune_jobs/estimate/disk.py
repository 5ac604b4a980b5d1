"""Disk: the model in every form that the pipeline makes of it. GGUF sizes follow llama.cpp's choice tensor by tensor.

Source: ``llama_tensor_get_type`` and ``tensor_type_fallback`` of llama.cpp's ``src/llama-quant.cpp``, for dense models.
Types that mix (Q4_K_M and the like) give more bits to values, down projections and the head; rows that are no multiple
of 256 cannot be stored in K-quants and fall back to larger types.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_api.types import GGUFType
from finetune_jobs.estimate.architecture import Architecture

TOLERANCE = 0.02
"""Files lie within this share: the tokenizer's size differs."""

_BITS = {
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.5625,
    "Q5_K": 5.5,
    "Q5_1": 6.0,
    "Q5_0": 5.5,
    "Q4_K": 4.5,
    "Q4_0": 4.5,
    "Q3_K": 3.4375,
    "Q2_K": 2.625,
}
"""A weight, with its share of the block's scales."""
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_BLOCK = 256
_TOKENIZER = 48
"""Bytes a token: text, type, merges. 36 in SmolLM2's file, 61 in Llama 3's."""


@dataclass(frozen=True)
class Disk:
    """Bytes."""

    base: int
    """16-bit safetensors."""
    merged: int
    converted: int
    """The 16-bit GGUF that the others are made from."""
    quants: dict[GGUFType, int]
    """Each GGUF that stays; the 16-bit one is counted here too where it was asked for."""

    @property
    def total(self) -> int:
        """All at once."""
        kept = sum(size for name, size in self.quants.items() if name is not GGUFType.F16)
        return self.base + self.merged + self.converted + kept


def disk(model: Architecture, types: Iterable[GGUFType], *, merges: bool = True) -> Disk:
    """What the pipeline keeps on disk if one machine does it all."""
    weights = 2 * model.parameters
    quants = {name: gguf_bytes(model, name) for name in types}
    converted = gguf_bytes(model, GGUFType.F16) if quants else 0
    return Disk(base=weights, merged=weights if merges else 0, converted=converted, quants=quants)


def gguf_bytes(model: Architecture, name: GGUFType) -> int:
    """Size of the file."""
    bits = 32.0 * (model.vectors + model.biases)
    for layer in range(model.layers):
        for linear in model.linears:
            tensor = _stored(name, linear.name, layer, model)
            bits += linear.inputs * linear.outputs * _BITS[_fitting(tensor, linear.inputs)]
    table = model.vocabulary * model.hidden
    head = _head(name, model.hidden)
    bits += table * _BITS[head]
    if not model.tied:
        bits += table * _BITS[_fitting(_main(name), model.hidden)]
    return int(bits / 8) + _TOKENIZER * model.vocabulary


def _main(name: GGUFType) -> str:
    return str(name).removesuffix("_M")


def _fitting(tensor: str, row: int) -> str:
    return _FALLBACK.get(tensor, tensor) if row % _BLOCK else tensor


def _head(name: GGUFType, row: int) -> str:
    """The output head, which is the embedding too where they are tied."""
    if name in (GGUFType.F16, GGUFType.BF16, GGUFType.Q8_0):
        return str(name)
    return "Q8_0" if row % _BLOCK else "Q6_K"


def _stored(name: GGUFType, linear: str, layer: int, model: Architecture) -> str:
    layers, main = model.layers, _main(name)
    # The first and last eighth of the blocks, and every third one between.
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    match name, linear:
        case GGUFType.Q4_K_M | GGUFType.Q5_K_M, "v_proj" | "down_proj":
            return "Q6_K" if more else main
        case GGUFType.Q4_K_M, "qkv_proj":
            return "Q5_K"
        case GGUFType.Q5_K_M, "qkv_proj":
            return "Q6_K"
        case GGUFType.Q3_K_M, "v_proj":
            return "Q5_K" if layer < 2 else "Q4_K"
        case GGUFType.Q3_K_M, "down_proj":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case GGUFType.Q3_K_M, "o_proj" | "qkv_proj":
            return "Q4_K"
        case GGUFType.Q2_K, "v_proj":
            return "Q4_K" if model.queries >= 4 * model.keys else "Q3_K"
        case GGUFType.Q2_K, "down_proj" | "o_proj":
            return "Q3_K"
        case _:
            return main
