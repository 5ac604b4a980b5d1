"""Triton works without a compiler with what the image brings."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOAD = """
from pathlib import Path
from finetune_jobs.training import liger
liger.COMPILED = Path("cuda_utils.so").resolve()
liger.take_compiled()
from triton.backends.nvidia.driver import CudaUtils
print(CudaUtils().launch.__name__)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="this torch is not for NVIDIA's GPUs")
def test_it_is_taken_where_there_is_no_compiler(tmp_path: Path) -> None:
    """Compiled without the driver, linked to the machine's: here one whose every function fails."""
    target = tmp_path / "cuda_utils.so"
    command = [sys.executable, "scripts/compile_triton.py", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = subprocess.run(["nm", "-D", "-u", target], check=True, capture_output=True, text=True).stdout
    functions = "".join(f"int {name}() {{ return 1; }}\n" for name in re.findall(r" (cu\w+)", wanted))
    driver = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", driver], input=functions, check=True, text=True)
    environment = {
        **os.environ,
        "PATH": "",
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": f"{ROOT}/api:{ROOT}/jobs",
    }
    ran = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout == "launch\n", ran.stderr
