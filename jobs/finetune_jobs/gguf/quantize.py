"""One GGUF into another type, in this process."""

import logging
from pathlib import Path

from finetune_jobs.gguf.library import api, last_errors, listen, threads
from finetune_jobs.run.errors import StageError

_log = logging.getLogger("finetune.gguf")

BITS = {"F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_M": 4.0, "Q2_K": 3.2}
"""Bits per weight on large models (llama.cpp's tools/quantize/README); small ones take up to 3 more."""


def quantize(source: Path, destination: Path, kind: str) -> None:
    """Write ``source``, of 16 or 32 bits, as ``kind`` (llama.cpp's name, e.g. ``Q4_K_M``).

    Rows that are no multiple of 256 get the nearest older type: a file is a mixture, whatever its name says.
    Raises StageError with llama.cpp's words.
    """
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = threads()
    listen()
    if api.llama_model_quantize(str(source).encode(), str(destination).encode(), parameters) != 0:
        raise StageError(f"llama.cpp cannot write {destination.name} as {kind}: {last_errors()}")
    _log.info("%s: %.1f MB", destination.name, destination.stat().st_size / 1e6)
