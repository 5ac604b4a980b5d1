"""Stand in for NVIDIA's libraries, so that a torch built for CUDA runs on CPUs without their 3 GB.

``python3 scripts/leave_out_cuda.py TORCH_LIB DIRECTORY``, for x86-64, with binutils. PyPI has torch for Linux with CUDA
only. Its libraries name NVIDIA's, and the loader wants a file for each name and an address for each function before
torch is imported; no function is called where there is no GPU. So there is one small library here with all the
functions, every one of which fails, and a link to it for each name. CUDA's runtime, which finds out that there is no
GPU, stays the real one. Standard library only.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Those that torch names, but for the runtime (cudart) and the driver (cuda), which is never part of an image.
LIBRARY = re.compile(
    r"lib(cublas|cublasLt|cudnn|cufft|cufile|cupti|cusolver|cusparse|cusparseLt|nccl|nvrtc|nvshmem_host)\.so\.\d+"
)
FUNCTION = re.compile(r"(cublas|cudnn|cufft|cuFile|cupti|cusolver|cusparse|nccl|nvrtc|nvshmem)\w+")
NAME = "libwithout-cuda.so"


def stand_in(torch: Path, directory: Path) -> None:
    """Write the library and its links for the torch whose libraries are in that directory."""
    files = sorted(torch.glob("*.so"))
    own = {name for file in files for name, _ in _symbols(file, "defined")}
    wanted = {symbol for file in files for symbol in _symbols(file, "undefined") if FUNCTION.fullmatch(symbol[0])}
    needed = {name for file in files for name in re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "--dynamic", file))}
    directory.mkdir(parents=True, exist_ok=True)
    _link({symbol for symbol in wanted if symbol[0] not in own}, directory / NAME)
    for name in filter(LIBRARY.fullmatch, needed):
        (directory / name).symlink_to(NAME)


def _symbols(library: Path, kind: str) -> set[tuple[str, str]]:
    """(name, version) of those that the library defines, or wants from others."""
    lines = _run("nm", "--dynamic", f"--{kind}-only", library).splitlines()
    return {(name, version.lstrip("@")) for name, _, version in (line.split()[-1].partition("@") for line in lines)}


def _link(symbols: set[tuple[str, str]], library: Path) -> None:
    """A shared library in which each of them is a function that returns 1, which is a failure for all of them."""
    versions: dict[str, list[str]] = {}
    for name, version in sorted(symbols):
        versions.setdefault(version, []).append(name)
    labels = "".join(f".globl {name}\n.type {name}, @function\n{name}:\n" for name, _ in sorted(symbols))
    nodes = (f"{version} {{ {'; '.join(names)}; }};\n" for version, names in versions.items() if version)
    with tempfile.TemporaryDirectory() as scratch:
        code, script, compiled = (Path(scratch, name) for name in ("code.s", "versions", "code.o"))
        code.write_text(f'.text\n{labels}mov $1, %eax\nret\n.section .note.GNU-stack, "", @progbits\n')
        script.write_text("".join(nodes))
        _run("as", "-o", compiled, code)
        _run("ld", "-shared", f"--version-script={script}", "-o", library, compiled)


def _run(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    stand_in(Path(sys.argv[1]), Path(sys.argv[2]))
