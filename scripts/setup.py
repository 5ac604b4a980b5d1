"""Set up ``.venv`` with everything the project needs. Standard library only; a second run ends at once.

llama-cpp-python is built from its source release, for two reasons: there is no wheel for every machine, and the release
holds the converter (convert_hf_to_gguf.py) of exactly the llama.cpp that reads the result. Both are kept in
``~/.cache/finetunejob`` (or $XDG_CACHE_HOME), keyed by release, compiler and CPU, so that another clone need not build.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import build_llama_cpp

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements"
STAMP = VENV / "finetunejob-setup"
MINIMUM = (3, 11)
FREE_GIB = 12  # measured: 7 GB of packages (CUDA libraries), 1 GB of build, and room for the demo


def main() -> None:
    """Check the machine, then install what is not yet there."""
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    check_machine()
    started = time.monotonic()
    step("a virtual environment in .venv")
    if not (VENV / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", VENV)
    step("packages, pinned and hashed (about 3 GB the first time)")
    run(
        VENV / "bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--require-hashes",
        "--only-binary=:all:",
        "-r",
        uv_only(),
    )
    # Compiled once here, not by every stage as it starts: imports take half the time.
    pip_install("--require-hashes", "--compile-bytecode", "-r", REQUIREMENTS / "lock.txt")
    pip_install("--require-hashes", "--no-deps", "-r", REQUIREMENTS / "quickstart.txt")
    install_llama_cpp()
    step("this project")
    pip_install("--no-deps", "--no-build-isolation", "--editable", ROOT)
    STAMP.write_text(wanted)
    print(f"set up in {time.monotonic() - started:.0f} s", flush=True)


def check_machine() -> None:
    """Stop with everything that is missing, and how to get it."""
    missing: list[str] = []
    if sys.version_info < MINIMUM:
        missing.append(
            f"Python {MINIMUM[0]}.{MINIMUM[1]} or newer (this is {platform.python_version()}): "
            "apt-get install python3.11 python3.11-venv, then make PYTHON=python3.11 ..."
        )
    try:
        import ensurepip  # noqa: F401 - Debian ships Python without it
    except ImportError:
        missing.append("Python's venv module: apt-get install python3-venv")
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        missing.append("a C++ compiler: apt-get install g++")
    if not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler: apt-get install gcc")
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < FREE_GIB and not STAMP.exists():
        missing.append(f"disk space: {FREE_GIB} GiB free in {ROOT}, there are {free:.1f}")
    if missing:
        sys.exit("set-up needs:\n" + "\n".join(f"  - {line}" for line in missing))


def fingerprint() -> str:
    """Changes when anything that set-up installs from does."""
    digest = hashlib.sha256()
    scripts = (Path(__file__), Path(build_llama_cpp.__file__))
    for path in (*sorted(REQUIREMENTS.glob("*.txt")), ROOT / "pyproject.toml", *scripts):
        digest.update(path.read_bytes())
    return f"{platform.python_version()} {digest.hexdigest()}\n"


def uv_only() -> Path:
    """The lock's entry for uv as a file of its own: pip installs uv, and uv the rest in a tenth of the time."""
    lock = (REQUIREMENTS / "lock.txt").read_text()
    start = lock.index("\nuv==") + 1
    lines = [lock[start:].splitlines()[0]]
    for line in lock[start:].splitlines()[1:]:
        if not line.startswith(" "):
            break
        lines.append(line)
    path = VENV / "uv.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def install_llama_cpp() -> None:
    """llama-cpp-python's wheel and the converter of the same release, from the cache or built now."""
    pinned = (REQUIREMENTS / "llama-cpp-python.txt").read_text()
    key = "\n".join((pinned, build_llama_cpp.CMAKE_ARGS, cpu(), compiler()))
    cache = cache_root() / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (cache / "done").exists():
        step("llama.cpp, from source (4 minutes on 2 cores, the first time)")
        run(VENV / "bin/python", Path(build_llama_cpp.__file__), cache)
        (cache / "done").touch()
    pip_install("--no-deps", "--reinstall", "--compile-bytecode", *cache.glob("*.whl"))
    share = VENV / "share/finetune-job/llama.cpp"
    shutil.rmtree(share, ignore_errors=True)
    shutil.copytree(cache / "llama.cpp", share)


def cache_root() -> Path:
    """Where builds are kept between clones."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetunejob"


def cpu() -> str:
    """What the compiler may use: llama.cpp is built for this very processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def compiler() -> str:
    """The C++ compiler's first line about itself."""
    name = shutil.which("c++") or shutil.which("g++") or "clang++"
    return subprocess.run([name, "--version"], text=True, stdout=subprocess.PIPE, check=True).stdout.splitlines()[0]


def pip_install(*arguments: object) -> None:
    """Install into .venv with uv."""
    run(VENV / "bin/uv", "pip", "install", "--quiet", "--python", VENV / "bin/python", *arguments)


def run(*command: object) -> None:
    """Run a command, its output shown; stop with its name if it fails."""
    done = subprocess.run([str(part) for part in command])
    if done.returncode:
        sys.exit(f"set-up failed at: {' '.join(str(part) for part in command)}")


def step(what: str) -> None:
    """Say what comes next."""
    print(f"set-up: {what}", flush=True)


if __name__ == "__main__":
    main()
