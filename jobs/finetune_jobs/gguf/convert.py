"""Hugging Face weights to a GGUF of the same precision, by llama.cpp's own converter."""

import ast
import errno
import io
import json
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from finetune_jobs.gguf import release
from finetune_jobs.run.errors import ConfigurationError

_PRECISION = {frozenset({"BF16"}): "bf16", frozenset({"F16"}): "f16"}


def supported(config: Mapping[str, Any]) -> bool:
    """Whether the converter knows the model's architecture. Reads its table without running it: no torch."""
    tree = ast.parse((release.directory() / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "TEXT_MODEL_MAP":
            assert node.value is not None
            table: dict[str, str] = ast.literal_eval(node.value)
            return (config.get("architectures") or [""])[0] in table
    raise ConfigurationError(
        f"{release.directory()} is not the llama.cpp release this was written for: run `make setup`"
    )


def lossless_type(model: Path) -> str:
    """The converter's ``--outtype`` that keeps every weight as it is: bf16, f16, or f32 for all else."""
    from safetensors import safe_open

    found = set()
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    return _PRECISION.get(frozenset(found), "f32")


def convert(model: Path, destination: Path, *, name: str, precision: str) -> None:
    """Write the GGUF of a model directory; ``name`` becomes its ``general.name``, or a part of it.

    In this process, as if from the command line: torch and transformers, which take seconds to import, are here.
    Raises ConfigurationError with the converter's words: what it refuses, it refuses again.
    """
    _run(model, destination, "--outtype", precision, "--model-name", _general_name(model, name))


def convert_vocabulary(model: Path, destination: Path) -> None:
    """Write a GGUF of the settings and the tokenizer alone; the directory must have no weights.

    Raises ConfigurationError like ``convert``.
    """
    _run(model, destination, "--vocab-only", "--outtype", "f16", "--model-name", _general_name(model, "vocabulary"))


def check_tensors(model: Path) -> None:
    """Let the converter name and turn every tensor of a model directory, of which it reads no more than the shapes.

    Raises ConfigurationError like ``convert``.
    """
    _run(model, model / "unwritten.gguf", "--dry-run", "--outtype", "f16", "--model-name", "tensors")


def _run(model: Path, destination: Path, *options: str) -> None:
    script = release.directory() / "convert_hf_to_gguf.py"
    release.gguf_py()
    arguments = [str(script), str(model), "--outfile", str(destination), *options]
    try:
        # A progress bar, and the name of a file that it will not write.
        with _command_line(script.parent, arguments), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            runpy.run_path(str(script), run_name="__main__")
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            return
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # the disk, not the model
        raise ConfigurationError(f"llama.cpp's converter refuses the model: {_words(error, model)}") from error


def _general_name(model: Path, name: str) -> str:
    """From `phi-3` in this name alone llama.cpp knows that the tokens of turns swallow the white space behind them."""
    config, tokenizer = model / "config.json", model / "tokenizer.json"
    if not tokenizer.is_file() or json.loads(config.read_text(encoding="utf-8")).get("model_type") != "phi3":
        return name
    added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
    return f"{name} (Phi-3)" if any(token.get("rstrip") for token in added) else name


def _words(error: BaseException, model: Path) -> str:
    if isinstance(error, NotImplementedError) and "pre-tokenizer" in str(error):
        return "its tokenizer splits text in a way that this llama.cpp does not know"
    if "tokenizer.model" in str(error):
        return "it needs the tokenizer.model of SentencePiece; copy that file from the original model"
    return f"{type(error).__name__}: {error}".replace(f"{model}/", "")


@contextmanager
def _command_line(directory: Path, arguments: list[str]) -> Iterator[None]:
    with mock.patch.object(sys, "argv", arguments), mock.patch.object(sys, "path", [str(directory), *sys.path]):
        yield
