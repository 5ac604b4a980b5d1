"""llama.cpp by way of llama-cpp-python: imported, quieted and wrapped in one place.

Importing this module loads the native library. Its OpenMP threads spin while they wait unless ``OMP_WAIT_POLICY`` says
otherwise, which on shared cores makes everything several times slower (reference/practice.md section 5). OpenMP reads
it when first loaded, maybe with torch: whoever imports torch before this module must set it too.
"""

import ctypes
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import llama_cpp

from finetune_jobs.run.errors import InputMissingError

api: Any = llama_cpp
"""The untyped low-level interface, ``llama.h`` name by name."""

_log = logging.getLogger("finetune.llama")
_ERROR = 4  # ggml_log_level; what is below it is chatter at every load
_errors: deque[str] = deque(maxlen=2)


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _forward(level: int, text: bytes, _data: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if level == _ERROR:
        _errors.append(line)
    if line.strip("."):
        _log.log(logging.ERROR if level == _ERROR else logging.DEBUG, "%s", line)


def listen() -> None:
    """Have llama.cpp speak to our logger: a process has one listener, and llama-cpp-python sets another."""
    api.llama_log_set(_forward, ctypes.c_void_p(0))


def last_errors() -> str:
    """The newest complaints of llama.cpp, for an error message; each is given out once."""
    words = "; ".join(_errors)
    _errors.clear()
    return words or "no reason given"


def threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def loaded(path: Path, *, vocab_only: bool = False) -> Iterator[Any]:
    """A model from a file, mapped into memory. Raises InputMissingError when llama.cpp cannot read it."""
    listen()
    parameters = api.llama_model_default_params()
    parameters.vocab_only = vocab_only
    parameters.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise InputMissingError(
            f"{path} cannot be read by llama.cpp (llama-cpp-python {api.__version__}): {last_errors()}"
        )
    try:
        yield model
    finally:
        api.llama_model_free(model)


def tokenize(vocab: Any, text: str) -> list[int]:
    """Token ids; control tokens written in the text are recognised, none are added."""
    data = text.encode()
    buffer = (api.llama_token * (len(data) + 8))()  # a token is at least a byte, but for a prefix that may be added
    count = api.llama_tokenize(vocab, data, len(data), buffer, len(buffer), False, True)
    if count < 0:
        raise RuntimeError(f"llama_tokenize wants room for {-count} tokens for {len(data)} bytes")
    return list(buffer[:count])


def detokenize(vocab: Any, ids: Sequence[int]) -> str:
    """The text of token ids, without control tokens."""
    tokens = (api.llama_token * len(ids))(*ids)
    size = 256 + 16 * len(ids)
    while True:
        buffer = ctypes.create_string_buffer(size)
        count = api.llama_detokenize(vocab, tokens, len(ids), buffer, size, False, False)
        if count >= 0:
            return buffer.raw[:count].decode("utf-8", "replace")
        size = -count


def token_ids_of(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """What the vocabulary of a GGUF makes of each text, without BOS."""
    with loaded(path, vocab_only=True) as model:
        vocab = api.llama_model_get_vocab(model)
        return [tokenize(vocab, text) for text in texts]
