"""A LoRA adapter as a GGUF of its own, to be laid over a GGUF of its base model.

By the release's own model classes, which know how an architecture's weights are turned and named: what they do to the
rows of a weight, they do to those of B. Scales are folded into B first, since the format has one alpha for all modules
and divides it by each one's rank: rank-stabilized and alpha patterns come out as PEFT reckons them.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from finetune_jobs.gguf import release
from finetune_jobs.merging.adapter import read_adapter
from finetune_jobs.merging.updates import LoraUpdate
from finetune_jobs.run.errors import ConfigurationError


def convert(adapter: Path, base: Path, destination: Path, *, name: str) -> int:
    """Write the GGUF of a PEFT adapter in float32; the number of weights that it changes.

    Raises ConfigurationError for what the format cannot carry: magnitudes (DoRA), biases and whole modules.
    """
    updates: dict[str, LoraUpdate] = {}
    for tensor, update in read_adapter(adapter).items():
        if not isinstance(update, LoraUpdate):
            raise ConfigurationError(f"{tensor} is trained whole, which an adapter in GGUF cannot hold: {_MEND}")
        if update.magnitude is not None:
            raise ConfigurationError(f"{tensor} has a DoRA magnitude, which an adapter in GGUF cannot hold: {_MEND}")
        updates[tensor] = update
    gguf = release.gguf_py()
    model = _model(base)
    alpha = float(max(update.a.shape[0] for update in updates.values()))
    writer = gguf.GGUFWriter(destination, gguf.MODEL_ARCH_NAMES[model.model_arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    with torch.inference_mode():
        for tensor, update in updates.items():
            rank = update.a.shape[0]
            for named, rows in _turned(model, tensor, update.b * (update.scale * rank / alpha)):
                writer.add_tensor(f"{named}.lora_a", update.a.contiguous().numpy())
                writer.add_tensor(f"{named}.lora_b", rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(updates)


_MEND = "leave out loraGGUF, or train without it"


def _model(base: Path) -> Any:
    """The converter's model of the base; it reads the settings and the heads of the weights' files."""
    directory = str(release.directory())
    release.gguf_py()
    with mock.patch.object(sys, "path", [directory, *sys.path]):
        conversion = importlib.import_module("conversion")
    hparams = json.loads((base / "config.json").read_text(encoding="utf-8"))
    kind = conversion.get_model_class(hparams["architectures"][0])
    settings = conversion.ModelBase.load_hparams(base, False)
    # In a dry run nothing is written; what it would write to is never opened.
    return kind(base, release.gguf_py().LlamaFileType.ALL_F32, base / "unused.gguf", hparams=settings, dry_run=True)


def _turned(model: Any, tensor: str, b: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the GGUF that hold this one's rows, and what becomes of B there."""
    block = next((int(part) for part in tensor.split(".") if part.isdigit()), None)
    found = model.filter_tensors((tensor, lambda: b))
    if found is None:
        raise ConfigurationError(f"llama.cpp's converter leaves out {tensor}, which the adapter changes: {_MEND}")
    for named, rows in model.modify_tensors(b, found[0], block):
        if rows.dim() != 2 or rows.shape[1] != b.shape[1]:
            raise ConfigurationError(f"llama.cpp's converter reshapes {tensor}, which the adapter changes: {_MEND}")
        yield named, rows
