"""Where a stage ran: hardware, driver and package versions, for the report. Importable without torch."""

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "boto3",
    "datasets",
    "llama-cpp-python",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "unsloth",
    "unsloth-zoo",
)
"""Packages whose version can change a result."""

Json = dict[str, "Json | list[Json] | str | int | float | None"]


def record() -> Json:
    """Python, operating system, CPU, memory, GPUs and package versions; what cannot be read is left out."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "memoryBytes": _memory_bytes()},
        "gpus": _gpus(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def cpu_flags() -> frozenset[str]:
    """The instruction sets of this machine's CPU as Linux names them; empty where it does not say."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _gpus() -> list[Json]:
    # A stage that has not loaded torch has used no GPU, and asking would cost it torch's import.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    driver = re.search(r"Kernel Module\s+(?:for \S+\s+)?([0-9.]+)", _read("/proc/driver/nvidia/version"))
    gpus: list[Json] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memoryBytes": properties.total_memory,
                "computeCapability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda,
                "driver": driver.group(1) if driver else None,
            }
        )
    return gpus


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
