"""Disk: the model in every form that the pipeline makes of it. GGUF sizes follow llama.cpp's choice tensor by tensor.

Source: ``llama_tensor_get_type`` and ``tensor_type_fallback`` of llama.cpp's ``src/llama-quant.cpp``, for dense models.
Types that mix (Q4_K_M and the like) give more bits to values, down projections and the head; rows that are no multiple
of 256 cannot be stored in K-quants and fall back to larger types.
"""

from dataclasses import dataclass

from finetune_api.types import FineTuneJobSpec, GGUFType
from finetune_jobs.estimate.architecture import Architecture, Linear
from finetune_jobs.estimate.memory import NF4_BITS

TOLERANCE = 0.02
"""Files lie within this share: the tokenizer's size differs."""

_BITS = {
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.5625,
    "Q5_K": 5.5,
    "Q5_1": 6.0,
    "Q5_0": 5.5,
    "Q4_K": 4.5,
    "Q4_1": 5.0,
    "Q4_0": 4.5,
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.25,
    "Q3_K": 3.4375,
    "IQ3_S": 3.4375,
    "IQ3_XXS": 3.0625,
    "Q2_K": 2.625,
    "IQ2_S": 2.5625,
    "IQ2_XS": 2.3125,
    "IQ2_XXS": 2.0625,
    "Q2_0": 2.25,
    "TQ2_0": 2.0625,
    "IQ1_M": 1.75,
    "TQ1_0": 1.6875,
    "IQ1_S": 1.5625,
    "Q1_0": 1.125,
}
"""A weight, with its share of the block's scales."""
_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_MAIN = {"IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "MXFP4_MOE": "Q8_0"}
"""What a type is mostly made of, where its name does not say. MXFP4 is for experts alone."""
_EMBEDDING = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
}
_TINY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_OUTPUTS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M"), "IQ2_XXS"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("Q3_K_M", "IQ3_M"), "Q4_K"),
    "Q2_K": "Q3_K",
    "Q3_K_L": "Q5_K",
}
_BLOCK, _SMALL_BLOCK = 256, 32
_NO_OTHER = {GGUFType.Q1_0: 128}
"""Types for which llama.cpp has no other to fall back on, and the length of their blocks."""
_PACKED = {"int8": 8.0, "nf4": NF4_BITS[True]}
"""bitsandbytes' bits a weight."""
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
    packed: int
    """What is kept for bitsandbytes."""

    @property
    def total(self) -> int:
        """All at once."""
        kept = sum(size for name, size in self.quants.items() if name is not GGUFType.F16)
        return self.base + self.merged + self.converted + kept + self.packed


def disk(model: Architecture, spec: FineTuneJobSpec) -> Disk:
    """What the pipeline keeps on disk if one machine does it all."""
    weights = 2 * model.parameters
    blocks = [stage.quantize for stage in spec.pipeline if stage.quantize]
    quants = {name: gguf_bytes(model, name) for block in blocks for name in block.gguf}
    # An adapter's GGUF is held against one of its base.
    whole = gguf_bytes(model, GGUFType.F16)
    converted = whole * (bool(quants) + any(block.lora_gguf for block in blocks))
    packed = sum(bitsandbytes_bytes(model, kind) for block in blocks for kind in block.bitsandbytes)
    merged = weights if any(stage.merge for stage in spec.pipeline) else 0
    return Disk(base=weights, merged=merged, converted=converted, quants=quants, packed=packed)


def bitsandbytes_bytes(model: Architecture, kind: str) -> int:
    """Size of the folder's weights: linear layers in few bits, all else in 16."""
    linear = sum(one.inputs * one.outputs for one in model.linears) * model.layers
    rows = sum(one.outputs for one in model.linears) * model.layers
    scales = 4 * rows if kind == "int8" else 0
    return int(linear * _PACKED[kind] / 8) + scales + 2 * (model.parameters - linear)


def unfit(model: Architecture, name: GGUFType) -> str:
    """Why llama.cpp cannot write that type of the model; empty if it can."""
    block = _NO_OTHER.get(name, 1)
    wrong = sorted({row for row in (model.hidden, *(one.inputs for one in model.linears)) if row % block})
    if not wrong:
        return ""
    lengths = " and ".join(map(str, wrong))
    return f"{name} needs rows that are a multiple of {block}, and this model has some of {lengths}: use another type"


def gguf_bytes(model: Architecture, name: GGUFType, *, imatrix: bool = False) -> int:
    """Size of the file. ``imatrix``: it is made with an importance matrix, which changes a few types' mixtures."""
    bits = 32.0 * (model.vectors + model.biases)
    for layer in range(model.layers):
        for linear in model.linears:
            kind = linear_type(model, name, linear, layer, imatrix=imatrix)
            bits += linear.inputs * linear.outputs * _BITS[kind]
    table = model.vocabulary * model.hidden
    bits += table * _BITS[head_type(model, name)]
    if not model.tied:
        bits += table * _BITS[embedding_type(model, name)]
    return int(bits / 8) + _TOKENIZER * model.vocabulary


def linear_type(model: Architecture, name: GGUFType, linear: Linear, layer: int, *, imatrix: bool = False) -> str:
    """llama.cpp's tensor type for a linear layer of a block in a file of type ``name``."""
    return _fitting(_stored(name, linear.name, layer, model, imatrix), linear.inputs)


def head_type(model: Architecture, name: GGUFType) -> str:
    """The same for the output head, which is the embedding too where they are tied."""
    main = _main(name)
    if main in ("F32", "F16", "BF16", "Q8_0"):
        return _fitting(main, model.hidden)
    small = "Q5_K" if name in (*_TINY, GGUFType.IQ3_XXS) else "Q6_K"
    return _fitting("Q8_0" if model.hidden % _BLOCK else small, model.hidden)


def embedding_type(model: Architecture, name: GGUFType) -> str:
    """The same for the embedding."""
    return head_type(model, name) if model.tied else _fitting(_EMBEDDING.get(name, _main(name)), model.hidden)


def _main(name: GGUFType) -> str:
    return _MAIN.get(name) or (name[:4] if "_K_" in name else str(name))


def _fitting(tensor: str, row: int) -> str:
    if row % _SMALL_BLOCK and tensor not in ("F32", "F16", "BF16"):
        return "F16"
    return _FALLBACK.get(tensor, tensor) if row % _BLOCK else tensor


def _stored(name: GGUFType, linear: str, layer: int, model: Architecture, imatrix: bool) -> str:
    main, early = _main(name), layer < model.layers // 8
    match linear:
        case "v_proj" | "qkv_proj":
            value = _value(name, layer, model)
            # Llama's and Qwen's of 70 billion: eight heads share their values, which are so worth more bits.
            shared = model.layers == 80 and model.queries > model.keys and name not in _TINY
            return "Q5_K" if shared and value in ("Q3_K", "Q4_K") else value
        case "down_proj":
            return _down(name, layer, model, imatrix)
        case "o_proj":
            return _OUTPUTS.get(name, main)
        case "q_proj" | "k_proj":
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(name, main)
        case _:  # gate and up
            outer = early or layer >= 7 * model.layers // 8
            return "IQ3_XXS" if name is GGUFType.IQ3_XS and not outer else main


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the blocks, and every third one between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _value(name: GGUFType, layer: int, model: Architecture) -> str:
    """Values, and with them what they are fused to."""
    main = _main(name)
    if model.queries >= 4 * model.keys:  # few values, so that it costs little to keep them well
        if name in (*_TINY, "Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"):
            return "Q4_K"
        if name in ("IQ4_NL", "IQ4_XS"):
            return "Q5_K"
    if name in _TINY:
        return "IQ3_S" if name in ("IQ2_S", "IQ2_M") else "Q2_K"
    match name:
        case GGUFType.Q2_K:
            return "Q3_K"
        case GGUFType.IQ3_M:
            return "Q4_K"
        case GGUFType.Q3_K_M:
            return "Q5_K" if layer < 2 else "Q4_K"
        case GGUFType.Q3_K_L:
            return "Q5_K"
        case GGUFType.Q4_K_S if layer < 4:
            return "Q5_K"
        case GGUFType.Q4_K_M | GGUFType.Q5_K_M if _more_bits(layer, model.layers):
            return "Q6_K"
        case _:
            return main


def _down(name: GGUFType, layer: int, model: Architecture, imatrix: bool) -> str:
    main, early = _main(name), layer < model.layers // 8
    match name:
        case GGUFType.Q2_K:
            return "Q3_K"
        case GGUFType.Q3_K_M:
            return "Q5_K" if layer < model.layers // 16 else "Q4_K"
        case GGUFType.Q3_K_L:
            return "Q5_K"
        case GGUFType.Q4_K_M | GGUFType.Q5_K_M:
            return "Q6_K" if _more_bits(layer, model.layers) else main
        case GGUFType.IQ2_S | GGUFType.IQ2_M if early:
            return "IQ3_S"
        case GGUFType.IQ1_S | GGUFType.IQ1_M | GGUFType.IQ2_XXS | GGUFType.IQ2_XS if early:
            return "Q2_K"
        case GGUFType.Q2_K_S | GGUFType.IQ3_M if early:
            return "Q4_K"
        case GGUFType.Q4_K_S if early:
            return "Q5_K"
        case GGUFType.IQ4_NL | GGUFType.IQ4_XS if early and not imatrix:
            return "Q5_K"
        case GGUFType.Q4_0 if early and imatrix:
            return "Q4_1"
        case GGUFType.Q5_0 if early and imatrix:
            return "Q5_1"
        case _:
            return main
