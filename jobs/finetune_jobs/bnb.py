"""A model for transformers whose linear layers, but for the head, are int8 or nf4: ``from_pretrained`` loads it as is.

int8: LLM.int8() of arXiv:2208.07339. nf4 with double quantization: arXiv:2305.14314.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finetune_jobs.merging.files import copy_all_but_weights

BITS = {"int8": 9.0, "nf4": 5.5}
"""Bits per weight of an 8B model, whose embedding and head keep 16; small ones take up to 6 more."""


def folder(kind: str) -> str:
    """Where a quantize stage leaves it."""
    return f"bitsandbytes-{kind}"


def export(model: Path, destination: Path, kind: str, *, trust_remote_code: bool = False) -> None:
    """Write ``model`` as ``int8`` or ``nf4``, with its tokenizer and all else that belongs to it.

    Memory: the quantized model and one shard of the 16-bit one.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = (
        BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        if kind == "int8"
        else BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    )
    network: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", quantization_config=settings, device_map="cpu", trust_remote_code=trust_remote_code
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
    import torch
    from transformers import AutoModelForCausalLM

    from finetune_jobs.gguf.parity import answer_logprobs

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
        divergences += (np.exp(theirs, dtype=np.float64) * (theirs.astype(np.float64) - ours)).sum(-1).tolist()
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        at += len(theirs)
    return float(np.mean(divergences)), float(np.std(divergences)) / at**0.5, same / at
