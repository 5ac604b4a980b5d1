"""One GGUF into another type, in this process."""

import logging
from pathlib import Path

from finetune_jobs.gguf.imatrix import ImportanceMatrix, hand_over
from finetune_jobs.gguf.library import api, last_errors, listen, threads
from finetune_jobs.run.errors import StageError

_log = logging.getLogger("finetune.gguf")

BITS = {
    "F32": 32.0,
    **dict.fromkeys(("F16", "BF16"), 16.0),
    **dict.fromkeys(("Q8_0", "MXFP4_MOE"), 8.5),
    **{"Q6_K": 6.6, "Q5_1": 6.1, "Q5_K_M": 5.7, "Q5_K_S": 5.6, "Q5_0": 5.6, "Q4_1": 5.2},
    **{"Q4_K_M": 4.9, "Q4_K_S": 4.7, "Q4_0": 4.7, "IQ4_NL": 4.7, "IQ4_XS": 4.5},
    **{"Q3_K_L": 4.3, "Q3_K_M": 4.0, "IQ3_M": 3.8, "IQ3_S": 3.7, "Q3_K_S": 3.7, "IQ3_XS": 3.5, "IQ3_XXS": 3.3},
    **{
        "Q2_K": 3.2,
        "Q2_K_S": 3.0,
        "IQ2_M": 3.0,
        "IQ2_S": 2.8,
        "IQ2_XS": 2.6,
        "IQ2_XXS": 2.4,
        "Q2_0": 2.7,
        "TQ2_0": 2.5,
    },
    **{"IQ1_M": 2.2, "TQ1_0": 2.2, "IQ1_S": 2.1, "Q1_0": 1.7},
}
"""Bits per weight on large models (llama.cpp's tools/quantize/README); small ones take up to 3 more."""


def quantize(source: Path, destination: Path, kind: str, matrix: ImportanceMatrix | None = None) -> None:
    """Write ``source``, of 16 or 32 bits, as ``kind`` (llama.cpp's name, e.g. ``Q4_K_M``).

    Rows that are no multiple of 256 get the nearest older type: a file is a mixture, whatever its name says.
    Raises StageError with llama.cpp's words.
    """
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = file_type(kind)
    parameters.nthread = threads()
    held = hand_over(parameters, matrix) if matrix is not None else []
    listen()
    failed = api.llama_model_quantize(str(source).encode(), str(destination).encode(), parameters) != 0
    del held
    if failed:
        raise StageError(f"llama.cpp cannot write {destination.name} as {kind}: {last_errors()}")
    _log.info("%s: %.1f MB", destination.name, destination.stat().st_size / 1e6)


def file_type(kind: str) -> int:
    """llama.cpp's number for a type."""
    return int(api.LLAMA_FTYPE_ALL_F32 if kind == "F32" else getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}"))
