"""Liger's kernels for what lies between the matrix products: norms, rotary embeddings and gated activations.

The same formulas as transformers', each in one pass over the GPU's memory and with less of it kept for the way back
(Hsu et al. 2024, arXiv:2410.10989). Losses stay ours. It changes transformers for the whole process.
"""

import functools
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from finetune_jobs.run.errors import first_line

ACTIVATIONS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), ("silu", "swish")),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("gelu_pytorch_tanh",)),
}
"""``model_type`` of what was compared with transformers (tests/gpu/test_liger.py), and what its kernel computes."""
COMPILED = Path(sys.prefix, "share/finetune-job/triton/cuda_utils.so")
"""Triton's way to the driver, the one part of it that takes a C compiler. The image has none, and brings this."""


def use(model: PreTrainedModel) -> str | None:
    """Let them compute ``model``, which is on a GPU, from now on; why transformers goes on, in words, or None."""
    reason = _unfit(model) or unusable()
    if reason is None:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        wanted = dict.fromkeys(("rope", "rms_norm", "swiglu", "geglu"), True)
        # Without a head it changes layers alone, and knows those of every kind of model.
        layers = model.base_model
        _apply_liger_kernel_to_instance(layers, **wanted, cross_entropy=False, fused_linear_cross_entropy=False)
    return reason


def _unfit(model: PreTrainedModel) -> str | None:
    config = model.config
    known = ACTIVATIONS.get(config.model_type)
    if known is None:
        return f"they are used for {', '.join(ACTIVATIONS)}, and this model is {config.model_type}"
    if any(kind.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME) for kind in type(model).__mro__):
        return "the model brings code of its own"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    return None if activation in known else f"its activation is {activation}, and theirs {known[0]}"


@functools.cache
def unusable() -> str | None:
    """Why they do not run on this machine, in words, or None: one of them is tried."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    try:
        if COMPILED.exists():
            take_compiled()
        functions: Any = importlib.import_module("liger_kernel.transformers.functional")
        functions.liger_rms_norm(torch.ones(2, 64, device="cuda"), torch.ones(64, device="cuda"), 1e-6)
        torch.cuda.synchronize()
    except Exception as error:  # of whatever kind: Triton, the driver and a missing compiler raise many
        return f"they do not run here: {first_line(error)}"
    return None


def take_compiled() -> None:
    """Triton asks for no compiler from now on."""
    from triton import knobs

    def build(name: str, *_: Any) -> str:
        if name != COMPILED.stem:
            raise RuntimeError(f"there is no C compiler, and {name} has not been compiled before")
        return str(COMPILED)

    knobs.build.impl = build
