"""Everything of a model directory but the weights: it travels with the merged model."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FORMATS = ("safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx")
_WEIGHTS = (*(f".{end}" for end in _FORMATS), ".safetensors.index.json", ".bin.index.json")


def copy_all_but_weights(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template, configs, model code, licence; gives the relative paths, sorted."""
    copied = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)  # the hub client's bookkeeping
        if path.is_file() and not hidden and not path.name.endswith(_WEIGHTS):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)
            copied.append(relative.as_posix())
    return copied


def set_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Make ``config.json`` name the type of the weights, in either spelling; nothing else changes."""
    name = str(dtype).removeprefix("torch.")
    with changed_config(directory) as (config, *inner):
        for part in (config, *inner):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = name
        if "torch_dtype" not in config:
            config["dtype"] = name


def untie(directory: Path) -> None:
    """Make ``config.json`` say that the output head is a matrix of its own."""
    with changed_config(directory) as (config, *inner):
        for part in (config, *(one for one in inner if "tie_word_embeddings" in one)):
            part["tie_word_embeddings"] = False


@contextmanager
def changed_config(directory: Path) -> Iterator[list[dict[str, Any]]]:
    """``config.json``, followed by the configurations of parts that stand in it; written back at the end."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    yield [config, *(value for value in config.values() if isinstance(value, dict))]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def set_chat_template(directory: Path, template: str) -> None:
    """Make ``template`` the model's own, in place of any that it has."""
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = directory / "tokenizer_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
