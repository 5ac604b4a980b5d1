"""A library that was built for CUDA loads without NVIDIA's, and finds that nothing of theirs works."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# As torch does: a function by a version, one without, and one whose address the loader must know.
TORCH = """
int cublasCreate_v2(void *handle);
int ncclCommCount(int comm);
int cudnnDestroy(int handle);
int (*destroy)(int) = cudnnDestroy;
int blas(void) { return cublasCreate_v2(0); }
int count(void) { return ncclCommCount(7); }
int own(void) { return 5; }
int cublasOfTorchItself(void) { return 6; }
"""
CALLS = """
import ctypes, sys
loaded = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
destroy = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int).in_dll(loaded, "destroy")
print(loaded.blas(), loaded.count(), loaded.own(), loaded.cublasOfTorchItself(), destroy(0))
"""
LIBRARIES = {
    "libcublas.so.13": ("int cublasCreate_v2(void *handle) { return 0; }", "libcublas.so.13"),
    "libcudnn.so.9": ("int cudnnDestroy(int handle) { return 0; }", "libcudnn.so.9"),
    "libnccl.so.2": ("int ncclCommCount(int comm) { return 0; }", ""),
}


def test_every_function_is_there_and_fails(tmp_path: Path) -> None:
    """By name and version, in one file for all libraries; what the library defines itself stays its own."""
    torch = make_torch(tmp_path)
    command = [sys.executable, "scripts/leave_out_cuda.py", str(torch.parent), str(tmp_path / "nvidia")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = sorted((tmp_path / "nvidia").iterdir())
    assert {path.name for path in made if path.is_symlink()} == set(LIBRARIES)
    assert {path.resolve() for path in made} == {tmp_path / "nvidia/libwithout-cuda.so"}
    # In a process of its own: where torch is imported, the loader takes NVIDIA's libraries of the same names.
    called = subprocess.run([sys.executable, "-c", CALLS, str(torch)], capture_output=True, text=True)
    assert called.stdout.split() == ["1", "1", "5", "6", "1"], called.stderr


def make_torch(directory: Path) -> Path:
    """A library that needs NVIDIA's, which are gone."""
    lib = directory / "lib"
    lib.mkdir()
    for name, (code, version) in LIBRARIES.items():
        functions = re.findall(r"int (\w+)\(", code)
        (directory / "versions").write_text(f"{version} {{ {' '.join(f'{f};' for f in functions)} }};\n")
        versions = [f"-Wl,--version-script={directory / 'versions'}"] if version else []
        compile_c(code, directory / name, f"-Wl,-soname={name}", *versions)
    torch = lib / "libtorch_cuda.so"
    needed = [str(directory / name) for name in LIBRARIES]
    compile_c(TORCH, torch, *needed, "-Wl,-rpath,$ORIGIN/../nvidia", "-Wl,-z,lazy")
    for name in LIBRARIES:
        (directory / name).unlink()
    return torch


def compile_c(code: str, library: Path, *options: str) -> None:
    """A shared library."""
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", *options, "-o", str(library)]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
