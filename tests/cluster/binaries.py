"""Programs of a Kubernetes cluster, built by the Go toolchain from the versions that the three ``go.mod`` here pin.

They are kept in ``$XDG_CACHE_HOME/finetunejob/cluster/<digest>/bin`` (by default below ``~/.cache``). The digest covers
everything that a program is made of, so another clone finds them built, and a changed version is built beside the old.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Kubernetes' own release tags (hack/lib/golang.sh).
BUILD = ("go", "build", "-p=2", "-trimpath", "-buildvcs=false", "-tags=selinux,notest,grpcnotrace")
# With Go 1.27 the apiserver's /openapi/v2 is invalid (kube-openapi#616); Kubernetes 1.37 is released with Go 1.26.
GO = "go1.26."


class MissingToolError(RuntimeError):
    """This machine lacks something that no build here can make; the message says what."""


@dataclass(frozen=True)
class Program:
    """One binary: the directory of its ``go.mod`` below this one, and the package in it."""

    name: str
    package: str
    module: str = "."


# In the order in which tests need them: a control plane can start before the rest is built.
PROGRAMS = (
    Program("etcd", "go.etcd.io/etcd/server/v3"),
    Program("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    Program("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    Program("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    Program("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    Program("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    Program("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
    Program("coredns", ".", "coredns"),
    Program("helm", "helm.sh/helm/v4/cmd/helm", "helm"),
)
BY_NAME = {program.name: program for program in PROGRAMS}


def binary(name: str) -> Path:
    """Where the program is, built if it is not there yet.

    Raises:
        MissingToolError: it is not built, and there is no Go 1.26 to build it.
    """
    build([name])
    return _path(BY_NAME[name])


def build(names: list[str], say: Callable[[str], None] | None = None) -> None:
    """Build those that are missing, one at a time; a second process that wants the same waits for the first.

    Raises:
        MissingToolError: something is to be built, and there is no Go 1.26.
    """
    for program in [BY_NAME[name] for name in names]:
        target = _path(program)
        if target.exists():
            continue
        with locked(target.with_suffix(".lock")):
            if not target.exists():
                _build(program, target, say or _to_stderr)


def version(module: str) -> str:
    """The version of a Go module that a ``go.mod`` here requires, such as ``v1.37.2`` of ``k8s.io/kubernetes``."""
    for directory in sorted({program.module for program in PROGRAMS}):
        text = (HERE / directory / "go.mod").read_text()
        if found := re.search(rf"^(?:require|\t)\s*{re.escape(module)} (v\S+)", text, re.MULTILINE):
            return found[1]
    raise LookupError(f"no go.mod below {HERE} requires {module}")


def cache_directory() -> Path:
    """For everything that outlives a cluster."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "finetunejob" / "cluster"


def _build(program: Program, target: Path, say: Callable[[str], None]) -> None:
    if not _go_version().startswith(GO):
        raise MissingToolError(f"Go 1.26 is needed to build {program.name}, here is {_go_version()}")
    say(f"building {program.name}")
    started = time.monotonic()
    temporary = target.with_suffix(f".{os.getpid()}")
    command = [*BUILD, f"-ldflags={_ldflags(program.module)}", "-o", str(temporary), program.package]
    nice = ["nice", "-n", "10"]
    done = subprocess.run([*nice, *command], cwd=HERE / program.module, env={**os.environ, "CGO_ENABLED": "0"})
    if done.returncode:
        raise RuntimeError(f"building {program.name} failed: {' '.join(command)}")
    temporary.replace(target)
    say(f"built {program.name} in {time.monotonic() - started:.0f} s")


def _path(program: Program) -> Path:
    return cache_directory() / _digest(program.module) / "bin" / program.name


@cache
def _digest(module: str) -> str:
    directory = HERE / module
    parts = [_go_version(), _ldflags(module), *BUILD]
    for path in sorted([*directory.glob("go.*"), *directory.glob("*.go")]):
        parts += [path.name, path.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@cache
def _go_version() -> str:
    """Such as ``go1.26.8``."""
    if shutil.which("go") is None:
        raise MissingToolError("the Go toolchain is needed (go1.26, https://go.dev/dl): there is no `go` on PATH")
    asked = subprocess.run(["go", "env", "GOVERSION"], cwd=HERE, capture_output=True, text=True, check=True)
    return asked.stdout.strip()


def _ldflags(module: str) -> str:
    """Real version strings: without them Helm's and other clients' checks of the cluster's version fail."""
    values: dict[str, str] = {}
    if module == ".":
        kubernetes = version("k8s.io/kubernetes")
        major, minor, _ = kubernetes.removeprefix("v").split(".", 2)
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            values |= {f"{package}.gitVersion": kubernetes, f"{package}.gitTreeState": "clean"}
            values |= {f"{package}.gitMajor": major, f"{package}.gitMinor": minor}
    if module == "helm":
        values["helm.sh/helm/v4/internal/version.version"] = version("helm.sh/helm/v4")
    return " ".join(["-s -w", *(f"-X {name}={value}" for name, value in values.items())])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
