"""A model for transformers whose linear layers, but for the head, are int8 or nf4: ``from_pretrained`` loads it as is.

int8: LLM.int8() of arXiv:2208.07339. nf4 with double quantization: arXiv:2305.14314.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_api.types import Quantization
from finetune_jobs.merging.files import copy_all_but_weights

BITS = {"int8": 9.0, "nf4": 5.5}
"""Bits per weight of an 8B model, whose embedding and head keep 16; small ones take up to 6 more."""


def folder(kind: str) -> str:
    """Where a quantize stage leaves it."""
    return f"bitsandbytes-{kind}"


def settings(quantization: Quantization, compute: torch.dtype) -> Any:
    """What ``from_pretrained`` needs to store linear layers so."""
    from transformers import BitsAndBytesConfig

    if quantization.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute,
    )


def keep_scales(network: torch.nn.Module) -> None:
    """Let int8 layers survive DoRA, which looks at their weights in every pass: on a CPU PEFT then puts the weight
    anew, and bitsandbytes takes it for one whose rows have no scales.
    """
    for module in network.modules():
        if hasattr(getattr(module, "weight", None), "SCB"):
            module.register_forward_pre_hook(_find_scales)


def _find_scales(layer: Any, _: object) -> None:
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


def export(model: Path, destination: Path, kind: str, *, trust_remote_code: bool = False) -> None:
    """Write ``model`` as ``int8`` or ``nf4``, with its tokenizer and all else that belongs to it.

    Memory: the quantized model and one shard of the 16-bit one.
    """
    from transformers import AutoModelForCausalLM

    wanted = settings(Quantization.model_validate({"type": kind}), torch.bfloat16)
    network: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", quantization_config=wanted, device_map="cpu", trust_remote_code=trust_remote_code
    )
    destination.mkdir()
    copy_all_but_weights(model, destination)
    network.save_pretrained(destination)


def compare(
    directory: Path, known: Any, *, trust_remote_code: bool = False, tick: Callable[[], None] = lambda: None
) -> tuple[float, float, float]:
    """Mean KL divergence from the reference in nats, its standard error, and top-1 agreement, on the answer tokens.

    ``known`` is a ``gguf.parity.Reference``.
    """
    from transformers import AutoModelForCausalLM

    from finetune_jobs.gguf.parity import answer_logprobs, token_divergences

    network: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map="cpu", trust_remote_code=trust_remote_code
    )
    network.eval()
    divergences: list[float] = []
    same = at = 0
    for example in known.examples:
        tick()
        theirs = known.logprobs[at : at + len(example.answer)]
        ours = answer_logprobs(network, example)
        divergences += token_divergences(theirs, ours)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        at += len(theirs)
    return float(np.mean(divergences)), float(np.std(divergences)) / at**0.5, same / at
