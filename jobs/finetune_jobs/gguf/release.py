"""The llama.cpp source release that llama-cpp-python was built from, unpacked at set-up time.

It holds the converter and the ``gguf`` package of the very llama.cpp that reads the result: one version for all three.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from finetune_jobs.run.errors import ConfigurationError


def directory() -> Path:
    """Where it is: $FINETUNE_LLAMA_CPP, else ``share/finetune-job/llama.cpp`` of the Python environment.

    Raises ConfigurationError when it is not there.
    """
    written = os.environ.get("FINETUNE_LLAMA_CPP")
    path = Path(written) if written else Path(sys.prefix) / "share" / "finetune-job" / "llama.cpp"
    if not (path / "convert_hf_to_gguf.py").is_file():
        raise ConfigurationError(
            f"llama.cpp's converter is not in {path}: run `make setup`, or set FINETUNE_LLAMA_CPP to its folder"
        )
    return path


def gguf_py() -> Any:
    """That release's ``gguf`` package."""
    if "gguf" not in sys.modules:
        sys.path.insert(0, str(directory() / "gguf-py"))
        try:
            return importlib.import_module("gguf")
        finally:
            sys.path.pop(0)
    return sys.modules["gguf"]
