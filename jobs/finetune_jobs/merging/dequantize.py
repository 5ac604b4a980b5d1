"""The base as qlora saw it: every linear layer's weight rounded to what its quantized form holds, tensor by tensor."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from finetune_api.types import Quantization
from finetune_jobs.merging import files
from finetune_jobs.merging.weights import ShardWriter, Weights

_BLOCK = 64
"""Weights to a scale; bitsandbytes' default, and transformers'."""


def write_dequantized(
    base_dir: Path,
    directory: Path,
    quantization: Quantization,
    linear: Collection[str],
    max_shard_bytes: int,
    on_tensor: Callable[[], None],
    turned: Collection[str] = (),
) -> None:
    """Write the model of ``base_dir`` with its ``linear`` modules' weights quantized and raised again; ``turned`` are
    those of them that keep theirs as (in, out), while a quantized layer holds (out, in).

    In the types that the base has. ``on_tensor`` is called after each tensor and may raise to stop. The memory of one
    tensor in float32, several times, is needed.
    """
    base = Weights(base_dir)
    directory.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = _weights(linear)
    turn = _weights(turned)
    with ShardWriter(directory, base.specs, max_shard_bytes) as writer:
        for name, spec in base.specs.items():
            tensor = base[name]
            if name in names:
                held = tensor.to(device).T if name in turn else tensor.to(device)
                tensor = rounded(held, quantization).to("cpu", spec.dtype)
                tensor = tensor.T if name in turn else tensor
            writer.write(name, 0, tensor if tensor.dim() else tensor.reshape(1))
            on_tensor()
    files.copy_all_but_weights(base_dir, directory)


def _weights(modules: Collection[str]) -> set[str]:
    """The tensors' names; a checkpoint of the bare model lacks the first part (`model.`)."""
    names = {f"{name}.weight" for name in modules}
    return names | {name.partition(".")[2] for name in names}


def rounded(weight: Tensor, quantization: Quantization) -> Tensor:
    """The weight as bitsandbytes' layers read it back, in its own type."""
    import bitsandbytes.functional as bnb

    if quantization.type == "int8":  # a scale for each row; computed in float16, as its layers are
        rows, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        raised: Tensor = bnb.int8_vectorwise_dequant(rows, scales)
        return raised.to(weight.dtype)
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=_BLOCK,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.type,
    )
    whole: Tensor = bnb.dequantize_4bit(packed, state)
    return whole.to(weight.dtype)
