"""Container images without a registry, a build tool or network: one layer, written as an archive that ctr imports."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path


def write_image(
    archive: Path,
    name: str,
    files: Mapping[str, Path],
    command: list[str],
    links: Mapping[str, str] | None = None,
    user: str = "65532:65532",
) -> None:
    """Write a docker-archive whose only layer is these executable files.

    Args:
        archive: the file to write.
        name: what pods call it, with registry and tag, such as ``docker.io/local/tiny:1``.
        files: path in the image -> file here.
        command: the entry point.
        links: path in the image -> where that symbolic link points.
        user: uid and gid that the container runs as.
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        _add_directory(tar, "tmp", 0o1777)
        for path in sorted({parent for file in [*files, *(links or {})] for parent in _parents(file)}):
            _add_directory(tar, path, 0o755)
        for path, source in files.items():
            _add_file(tar, path.lstrip("/"), source.read_bytes(), 0o755)
        for path, target in (links or {}).items():
            link = tarfile.TarInfo(path.lstrip("/"))
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    content = layer.getvalue()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": command, "User": user, "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
        "history": [{"created_by": "tests/cluster/images.py"}],
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as tar:
        _add_file(tar, "layer.tar", content)
        _add_file(tar, "config.json", json.dumps(config).encode())
        _add_file(tar, "manifest.json", json.dumps(manifest).encode())


def _parents(path: str) -> list[str]:
    parts = path.strip("/").split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _add_directory(tar: tarfile.TarFile, path: str, mode: int) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    tar.addfile(entry)


def _add_file(tar: tarfile.TarFile, path: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))
