"""What a node needs of Debian, and how to get it."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.cluster.binaries import MissingToolError, cache_directory, locked

NODE = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "nftables": "nft",
    "iproute2": "ip",
    "busybox-static": "busybox",
    "openssl": "openssl",
}
"""Package -> a program of it that shows that it is there."""
IMAGES = {"buildah": "buildah", "skopeo": "skopeo", "debootstrap": "debootstrap"}
"""For building the images of ``images/``."""


def require(packages: dict[str, str], install: bool | None = None, say: Callable[[str], None] = print) -> None:
    """See to it that these are there.

    Args:
        packages: ``NODE``, ``IMAGES``, or both.
        install: with apt-get, what is missing; by default only in CI (``CI=true``).
        say: is told before something is installed.

    Raises:
        MissingToolError: something is missing, and it was not to be installed, or could not be; with the command.
    """
    if not _missing(packages):
        return
    with locked(cache_directory() / "packages.lock"):  # workers of a test run come at the same time
        if missing := _missing(packages):
            _install(missing, install, say)


def _missing(packages: dict[str, str]) -> list[str]:
    return [package for package, program in packages.items() if not _there(program)]


def _install(missing: list[str], install: bool | None, say: Callable[[str], None]) -> None:
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
    wished = os.environ.get("CI") == "true" if install is None else install
    if not wished or os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise MissingToolError(f"missing {', '.join(missing)}: {' '.join(command)} (as root, on Debian or Ubuntu)")
    say(f"installing {', '.join(missing)}")
    for step in (["apt-get", "update", "-q"], [*command, "-o", "DPkg::Lock::Timeout=600"]):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(step, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise MissingToolError(f"{' '.join(step)} failed: {done.stderr.strip()[-1000:]}")


def _there(program: str) -> bool:
    return Path(program).exists() if program.startswith("/") else _which(program) is not None


def _which(program: str) -> str | None:
    """Users' PATH often lacks the directories of administration."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
