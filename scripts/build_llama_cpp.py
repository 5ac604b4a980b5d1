"""Build llama-cpp-python from its source release, as a wheel, and keep the converter that the release holds.

``python scripts/build_llama_cpp.py DIRECTORY [--portable]``, by a Python that has requirements/build.txt, with a C++
compiler: 4 minutes on 2 cores. The converter (convert_hf_to_gguf.py) is that of exactly the llama.cpp that reads the
result. Standard library only.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements/llama-cpp-python.txt"
# No vision, server or tools: a third of the build time, and nothing here uses them.
CMAKE_ARGS = (
    "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF"
)
# For other machines than this one: on x86-64 any processor with AVX2 and FMA, that is since about 2013.
PORTABLE = "-DGGML_NATIVE=OFF"
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")


def build(directory: Path, portable: bool) -> None:
    """Fetch the source release by its hash; leave the wheel and ``llama.cpp/`` in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        pip = (sys.executable, "-m", "pip", "--quiet")
        fetch = ("--no-deps", "--no-build-isolation", "--no-binary=:all:", "--require-hashes", "--dest", scratch)
        subprocess.run([*pip, "download", *fetch, "-r", str(REQUIREMENTS)], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            # Debian 12's Python 3.11.2 has no filters yet; the archive is ours by its hash in any case.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
            tar.extractall(scratch)
        source = archive.with_name(archive.name.removesuffix(".tar.gz"))
        environment = {
            **os.environ,
            "CMAKE_ARGS": f"{CMAKE_ARGS} {PORTABLE}" if portable else CMAKE_ARGS,
            "CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0))),
            # cmake and ninja of requirements/build.txt
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        make = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(source))
        subprocess.run([*pip, *make], env=environment, check=True)
        for name in CONVERTER:
            part = source / "vendor/llama.cpp" / name
            target = directory / "llama.cpp" / name
            if part.is_dir():
                shutil.copytree(part, target, dirs_exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(part, target)


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), portable="--portable" in sys.argv[2:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"building llama.cpp failed at: {' '.join(map(str, error.cmd))}")
