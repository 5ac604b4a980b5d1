"""Compile Triton's way to NVIDIA's driver ahead, for an image that has no compiler: ``... compile_triton.py TARGET``.

Run by the Python that Triton is installed for, with gcc and Python's headers. Triton compiles this one file of C before
its first kernel, and takes it from elsewhere if it is told to (``finetune_jobs/training/liger.py``). The driver itself
is the machine's: an empty library of its name stands in for it while we link. Standard library only.
"""

import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

DRIVER = "libcuda.so.1"


def compile_driver(target: Path) -> None:
    """Write it there."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        sys.exit("Triton is not installed for this Python")
    source = Path(triton.origin).parent / "backends/nvidia"
    target.parent.mkdir(parents=True, exist_ok=True)
    headers = [f"-I{source / 'include'}", f"-I{sysconfig.get_path('include')}"]
    with tempfile.TemporaryDirectory() as scratch:
        _gcc("-x", "c", "/dev/null", f"-Wl,-soname,{DRIVER}", "-o", f"{scratch}/{DRIVER}")
        driver = ["-Wl,--no-as-needed", f"-L{scratch}", f"-l:{DRIVER}"]
        _gcc("-O3", "-Wno-psabi", *headers, str(source / "driver.c"), *driver, "-o", str(target))


def _gcc(*options: str) -> None:
    subprocess.run(["gcc", "-shared", "-fPIC", *options], check=True)


if __name__ == "__main__":
    compile_driver(Path(sys.argv[1]))
