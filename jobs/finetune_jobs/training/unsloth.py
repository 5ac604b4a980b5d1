"""Unsloth's kernels under our loop: it loads the model and computes its layers, all else is ours (docs/adr/013).

It replaces functions of transformers, PEFT and TRL when it is imported, for the whole process, and wants to come before
them. So it is imported here alone, by the process of a stage that asks for it, and nothing here imports those.
"""

import functools
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune_api.types import Training
from finetune_jobs.run.errors import ConfigurationError, first_line

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of what its kernels cover and was compared with ours (tests/gpu/test_unsloth.py)."""
_CAPABILITY = (7, 0)
_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",  # a download that counts its users
    "UNSLOTH_RETURN_HIDDEN_STATES": "1",  # which of them go through the output head, `losses` says
    "UNSLOTH_COMPILE_LOCATION": f"{tempfile.gettempdir()}/unsloth_compiled_cache",  # by default below where we stand
}


@functools.cache
def start() -> str | None:
    """Import it, once in a process; why that cannot be, in words, or None."""
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < _CAPABILITY:
        return f"{torch.cuda.get_device_name()} has a compute capability below {'.'.join(map(str, _CAPABILITY))}"
    if find_spec("unsloth") is None:
        return "it is not installed here; the image trainer-unsloth has it"
    if "transformers" in sys.modules:
        return "transformers was loaded before it"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        importlib.import_module("unsloth")
    except Exception as error:  # of whatever kind: its checks of versions and drivers raise many
        return f"it cannot be imported: {first_line(error)}"
    return None


def unfit(config: Mapping[str, Any], training: Training) -> str | None:
    """Why it is not for a model with this ``config.json``, in words, or None."""
    kind, longest = config.get("model_type"), config.get("max_position_embeddings")
    if kind not in ARCHITECTURES:
        return f"its kernels are used for {', '.join(ARCHITECTURES)}, and this model is {kind}"
    if "quantization_config" in config:
        return "the model is stored quantized"
    if longest is None or training.max_length > longest:  # beyond it stretches the positions, and ours does not
        return f"maxLength is {training.max_length}, and the model knows {longest} positions"
    return None


def refusal(source: Path, training: Training) -> str | None:
    """Why it does not train the model in ``source``, in words, or None: ``start`` succeeded, and it fits."""
    return start() or unfit(json.loads((source / "config.json").read_text()), training)


def load(directory: Path, quantization: Any, compute: Any, device: Any) -> Any:
    """The model in ``directory`` with its functions in place of transformers'. From the disk alone.

    ``quantization``: bitsandbytes' settings. Raises ConfigurationError for what it cannot load.
    """
    import torch
    from unsloth import FastLanguageModel

    settings = {} if quantization is None else {"quantization_config": quantization}
    try:
        model, _ = FastLanguageModel.from_pretrained(
            str(directory),
            max_seq_length=None,
            dtype=compute,
            load_in_4bit=quantization is not None,
            device_map={"": device},
            token=False,
            local_files_only=True,
            use_gradient_checkpointing=False,
            offload_embedding=False,
            **settings,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"training.backend: Unsloth cannot load this model ({first_line(error)}); write transformers"
        ) from error
    return model


def patch(adapted: Any) -> Any:
    """Let its kernels compute the adapter that PEFT made."""
    from unsloth import FastLanguageModel

    return FastLanguageModel.patch_peft_model(adapted, use_gradient_checkpointing=False)
