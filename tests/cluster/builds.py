"""The project's own images on a node: built from ``images/`` on a bare Debian, and kept outside the repository.

What was built is in ``$XDG_CACHE_HOME/finetunejob/cluster/images``: ``graph`` is buildah's, ``node`` containerd's.
Changed sources cost their own small layers only; ``rm -r`` of the directory frees some 12 GB and costs five minutes.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import sandbox
from tests.cluster.binaries import MissingToolError, cache_directory
from tests.cluster.node import Cluster
from tests.cluster.packages import IMAGES, require

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("api", "jobs", "operator", "requirements", "images", "scripts", ".dockerignore", "pyproject.toml")
REPOSITORY = "docker.io/finetunejob"
NAMES = ("operator", "gguf", "trainer", "object-store")
BASE = "localhost/finetunejob-base:bookworm"
DEBIAN = ("--variant=minbase", "--include=python3,python3-venv,ca-certificates,libgomp1", "bookworm")
CERTIFICATES = "/etc/ssl/certs"
FREE_GIB = 15


@contextmanager
def image_cache() -> Iterator[Path]:
    """The directory, for nobody else at the same time: one containerd at a time can have it."""
    directory = cache_directory() / "images"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield directory


def load_images(cluster: Cluster, cache: Path, say: Callable[[str], None]) -> str:
    """Give the node the images of this very tree; returns their tag.

    Raises:
        MissingToolError: a package is missing, or the disk has no room for them.
        RuntimeError: a build failed; its output is on standard error.
    """
    require(IMAGES, say=say)
    tag = _digest()
    names = [f"{REPOSITORY}/{name}:{tag}" for name in NAMES]
    if all(cluster.has_image(name) for name in names):
        return tag
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        environment = _builder(cache, Path(scratch))
        if not _buildah("images", "--quiet", BASE, environment=environment, check=False).strip():
            say("a Debian as base image")
            _make_base(Path(scratch), environment)
        say("images")
        _build(Path(scratch), tag, environment)
        say("images, to the node")
        _transfer(cluster, names, Path(scratch) / "layout", environment)
        _forget_others(cluster, tag, environment)
    return tag


def _digest() -> str:
    """Of everything that images are made of."""
    digest = hashlib.sha256(" ".join(DEBIAN).encode())
    for path in sorted(_files()):
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _files() -> Iterator[Path]:
    for name in SOURCES:
        path = ROOT / name
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and "wheels" not in file.parts:
                yield file


def _builder(cache: Path, scratch: Path) -> dict[str, str]:
    """The environment in which buildah works: its own store, and no more rights than such machines give."""
    storage = cache / "storage.conf"
    paths = {"driver": "overlay", "graphroot": str(cache / "graph"), "runroot": str(cache / "run")}
    storage.write_text("[storage]\n" + "".join(f'{name} = "{value}"\n' for name, value in paths.items()))
    temporary = scratch / "tmp"
    temporary.mkdir()
    return {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "CONTAINERS_STORAGE_CONF": str(storage),
        "BUILDAH_ISOLATION": "chroot",
        "TMPDIR": str(temporary),
    }


def _make_base(scratch: Path, environment: dict[str, str]) -> None:
    if (free := shutil.disk_usage(scratch).free / 2**30) < FREE_GIB:
        raise MissingToolError(f"images need {FREE_GIB} GiB on the disk of {scratch.parent}, there are {free:.0f}")
    system = scratch / "debian"
    _run(["debootstrap", *DEBIAN, str(system)], environment)
    container = _buildah("from", "scratch", environment=environment).strip()
    _buildah("add", "--quiet", container, str(system), "/", environment=environment)
    _buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", container, environment=environment)
    _buildah("commit", "--quiet", "--disable-compression", "--rm", container, BASE, environment=environment)
    shutil.rmtree(system)


def _build(scratch: Path, tag: str, environment: dict[str, str]) -> None:
    context = scratch / "context"
    for path in _files():
        target = context / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    _take_wheel(context / "images/wheels")
    # Nor for the trainer: 4 GB more to fetch, to unpack and to hand to the node, and no node here has a GPU.
    options = ["--build-arg=CUDA=no", "--network=host", f"--volume={CERTIFICATES}:{CERTIFICATES}:ro"]
    if Path("/etc/pip.conf").exists():
        options.append("--volume=/etc/pip.conf:/etc/pip.conf:ro")
    if bundle := os.environ.get("SSL_CERT_FILE"):
        options.append(f"--build-arg=SSL_CERT_FILE={bundle}")
    settings = {"BUILDER": "buildah", "BASE": BASE, "REPOSITORY": REPOSITORY, "TAG": tag}
    command = ["python3", "scripts/images.py"]
    _run(command, {**environment, **settings, "BUILD_OPTIONS": " ".join(options)}, context)


def _take_wheel(directory: Path) -> None:
    """The one that set-up built for this machine, from its cache: the one for any machine would take 4 minutes."""
    directory.mkdir(parents=True, exist_ok=True)
    for done in sorted(cache_directory().parent.glob("*/done"), key=lambda path: path.stat().st_mtime)[-1:]:
        shutil.copytree(done.parent, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def _transfer(cluster: Cluster, names: list[str], layout: Path, environment: dict[str, str]) -> None:
    """From buildah to containerd: no registry, no compression, and nothing that the node has already."""
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    # An empty file of the same size stands for each blob that is there: skopeo takes it for the blob and leaves it.
    there = list((cluster.images / "io.containerd.content.v1.content/blobs/sha256").iterdir())
    known = {path.name for path in there}
    for path in there:
        with (blobs / path.name).open("wb") as file:
            file.truncate(path.stat().st_size)
    for name in names:
        copy = ["skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers", f"containers-storage:{name}"]
        _run([*copy, f"oci:{layout}:{Path(name).name}"], environment)
    index = json.loads((layout / "index.json").read_text())
    for manifest, name in zip(index["manifests"], names, strict=True):
        manifest["annotations"] = {"io.containerd.image.name": name}
    (layout / "index.json").write_text(json.dumps(index))
    command = ["ctr", f"--address={cluster.directory / 'containerd.sock'}", "--namespace=k8s.io"]
    command += ["images", "import", "-"]
    ctr = subprocess.Popen([*sandbox.enter(cluster.first_process), *command], stdin=subprocess.PIPE)
    assert ctr.stdin is not None
    with ctr.stdin, tarfile.open(fileobj=ctr.stdin, mode="w|") as tar:
        for path in sorted(layout.rglob("*"), reverse=True):
            if path.is_file() and path.name not in known:
                tar.add(path, str(path.relative_to(layout)))
                path.unlink()  # what containerd has from now on need not be on the disk twice
    if ctr.wait():
        raise RuntimeError(f"ctr images import: exit {ctr.returncode}")


def _forget_others(cluster: Cluster, tag: str, environment: dict[str, str]) -> None:
    """Images of earlier trees: their layers would fill the disk."""
    for name in cluster.ctr("images", "list", "--quiet").split():
        if name.startswith(f"{REPOSITORY}/") and not name.endswith(f":{tag}"):
            cluster.ctr("images", "remove", name)
    for line in _buildah("images", "--format", "{{.Name}}:{{.Tag}}", environment=environment).splitlines():
        if line.startswith(f"{REPOSITORY}/") and not line.endswith(f":{tag}"):
            _buildah("rmi", line, environment=environment)


def _buildah(*arguments: str, environment: dict[str, str], check: bool = True) -> str:
    done = subprocess.run(["buildah", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode and check:
        raise RuntimeError(f"buildah {' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _run(command: list[str], environment: dict[str, str], directory: Path = ROOT) -> None:
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {(done.stdout + done.stderr)[-4000:]}")
