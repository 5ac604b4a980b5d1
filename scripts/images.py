"""Build the container images with buildah, podman or docker: ``python scripts/images.py [NAME...]``.

Standard library only.

From the environment: BASE (the image that they stand on), REPOSITORY and TAG (an image is called REPOSITORY/NAME:TAG),
BUILDER (one of the three, by default the first that is here), BUILD_OPTIONS (passed on to it as they are).
"""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILDERS = {"buildah": ("bud", "--layers"), "podman": ("build",), "docker": ("build",)}
# Directory below images/ -> name of the image, as in the chart's values.
NAMES = {"operator": "operator", "gguf": "gguf", "trainer": "trainer", "objectstore": "object-store"}
WISHED = {"trainer-unsloth": "trainer-unsloth"}  # as large as the trainer's, and few need it: built if it is named


def main() -> None:
    """Build those that are named, or all but those that must be."""
    wanted, known = sys.argv[1:] or list(NAMES), NAMES | WISHED
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"no image is called {', '.join(unknown)}; there are {', '.join(known)}")
    builder = os.environ.get("BUILDER") or next(filter(shutil.which, BUILDERS), "")
    if builder not in BUILDERS:
        sys.exit(f"images are built by one of {', '.join(BUILDERS)}: install one, or set BUILDER")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    arguments = {"VERSION": version, "REVISION": revision()}
    if base := os.environ.get("BASE"):
        arguments["BASE"] = base
    for directory in wanted:
        tag = f"{os.environ.get('REPOSITORY') or 'finetunejob'}/{known[directory]}:{os.environ.get('TAG') or version}"
        command = [builder, *BUILDERS[builder], "--tag", tag, "--file", f"images/{directory}/Containerfile"]
        for name, value in arguments.items():
            command += ["--build-arg", f"{name}={value}"]
        command += [*shlex.split(os.environ.get("BUILD_OPTIONS", "")), "."]
        print(f"images: {tag}", flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(f"building {tag} failed: {shlex.join(command)}")


def revision() -> str:
    """The commit, as far as there is a repository."""
    if not shutil.which("git"):
        return "unknown"
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True)
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
