"""Where rows come from: local files and folders, objects, data sets of the hub. Each with the facts that pin it
down.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.types import DataSource, Storage
from finetune_jobs.data import formats
from finetune_jobs.data.formats import Broken, Record
from finetune_jobs.remote import commit_of, fetch_object, hub_error, open_objects, parse_hub, sha256, token
from finetune_jobs.run.errors import ConfigurationError, DataError, InputMissingError


@dataclass(frozen=True)
class Part:
    """One file of rows, or one split of a hub data set."""

    name: str
    """What rows and messages call it."""
    path: Path | None = None
    hub: dict[str, Any] = field(default_factory=dict)
    """Arguments for ``datasets.load_dataset`` instead of a path."""


@dataclass(frozen=True)
class Opened:
    """A source whose content is fixed and, unless it is a hub data set, here."""

    parts: list[Part]
    facts: dict[str, Any]
    """For the data card: the source, its revision, its files with size and sha256."""


def open_source(source: DataSource, storage: Storage, where: str, directory: Path) -> Opened:
    """Bring the source here; ``where`` is its field path for messages, ``directory`` is scratch.

    Raises InputMissingError when there is nothing, ConfigurationError for a kind of source that is not known.
    """
    uri = source.source
    if uri.startswith("hf://"):
        return _open_hub(source, where, directory)
    uri = _mounted(uri, where)
    files = _object_files(uri, storage, where, directory) if uri.startswith("s3://") else _local_files(uri, where)
    facts = [{"name": name, "sizeBytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files]
    return Opened([Part(name, path) for name, path in files], {"source": source.source, "files": facts})


def fingerprint(source: DataSource, storage: Storage, where: str) -> str:
    """Changes when, and only when, the source's content may have: hashes, ETags or the hub's commit."""
    uri = _mounted(source.source, where)
    if uri.startswith("hf://"):
        return commit_of(parse_hub(uri, f"{where}.source"), f"{where}.source")
    if uri.startswith("s3://"):
        found = open_objects(uri, storage, f"{where}.source").found
        return ",".join(f"{name}:{info.etag}:{info.size}" for name, info in found if _readable(name))
    return ",".join(f"{name}:{sha256(path)}" for name, path in _local_files(uri, where))


def read(part: Part) -> Iterator[Record | Broken]:
    """The rows of a part, in order."""
    return formats.read(part.path, part.name) if part.path is not None else _read_hub(part)


def _mounted(uri: str, where: str) -> str:
    """A ConfigMap's key as the file that the operator mounts (``plan/pods.py``); other sources as they are."""
    if not uri.startswith("configmap://"):
        return uri
    if not (mounts := os.environ.get("FINETUNE_CONFIG_MAPS")):
        raise ConfigurationError(
            f"{where}.source: configmap:// is of a cluster, got {uri!r}; without one write file://"
        )
    return f"file://{mounts}/{uri.removeprefix('configmap://')}"


def _readable(name: str) -> bool:
    return formats.extension(name) is not None and not name.rpartition("/")[2].startswith(".")


def check_local(source: DataSource, where: str) -> None:
    """Refuse, as ``open_source`` will, a source of this machine that cannot be opened; others pass."""
    if source.source.startswith("file://"):
        _local_files(source.source, where)


def _local_files(uri: str, where: str) -> list[tuple[str, Path]]:
    if not uri.startswith("file://"):
        raise ConfigurationError(f"{where}.source: must begin with file://, s3:// or hf://datasets/, got {uri!r}")
    path = Path(uri.removeprefix("file://"))
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and _readable(p.name))
        if not files:
            raise InputMissingError(f"{where}.source: {path} holds no {', '.join(formats.EXTENSIONS)} file")
        return [(p.name, p) for p in files]
    if not path.is_file():
        raise InputMissingError(f"{where}.source: there is no file {path}")
    if not os.access(path, os.R_OK):
        raise InputMissingError(f"{where}.source: {path} may not be read; change its permissions")
    _checked_name(path.name, where)
    return [(path.name, path)]


def _checked_name(name: str, where: str) -> None:
    if formats.extension(name) is None:
        known = ", ".join(formats.EXTENSIONS)
        raise DataError(f"{where}.source: {name} is not a known kind of file; use {known}, each also .gz")


def _object_files(uri: str, storage: Storage, where: str, directory: Path) -> list[tuple[str, Path]]:
    objects = open_objects(uri, storage, f"{where}.source")
    if len(objects.found) == 1:
        _checked_name(objects.found[0][0], where)
    wanted = [(name, info) for name, info in objects.found if _readable(name)]
    if not wanted:
        raise InputMissingError(f"{where}.source: {uri} holds no {', '.join(formats.EXTENSIONS)} object")
    for name, info in wanted:
        fetch_object(objects.store, info, directory / name)
    return [(name, directory / name) for name, _ in wanted]


def _open_hub(source: DataSource, where: str, directory: Path) -> Opened:
    repository = parse_hub(source.source, f"{where}.source")
    if repository.kind != "dataset":
        raise ConfigurationError(
            f"{where}.source: a data set of the hub is hf://datasets/{repository.name}, got {source.source!r}"
        )
    commit = commit_of(repository, f"{where}.source")
    facts: dict[str, Any] = {"source": source.source, "revision": commit, "split": source.split, "files": []}
    if formats.extension(repository.inside) is not None:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(
                hf_hub_download(repository.name, repository.inside, repo_type="dataset", revision=commit, token=token())
            )
        except Exception as error:
            raise hub_error(error, repository, f"{where}.source") from error
        name = repository.inside.rpartition("/")[2]
        facts["files"] = [{"name": name, "sizeBytes": path.stat().st_size, "sha256": sha256(path)}]
        return Opened([Part(name, path)], facts)
    arguments = {"path": repository.name, "name": repository.inside or None, "revision": commit, "split": source.split}
    return Opened([Part(f"{repository.name}/{source.split}", hub={**arguments, "where": f"{where}.source"})], facts)


def _read_hub(part: Part) -> Iterator[Record | Broken]:
    """One split, through the hub's own reader (configurations, splits and file layouts are its business)."""
    import datasets

    arguments = dict(part.hub)
    where = arguments.pop("where")
    try:
        rows = datasets.load_dataset(**arguments, token=token())
    except ValueError as error:  # an unknown split or configuration; the message lists those that there are
        words = " ".join(str(error).split())[:400]
        raise ConfigurationError(
            f"{where}: {words} (configuration: hf://datasets/org/name/configuration; split: `split`)"
        ) from error
    except Exception as error:
        repository = parse_hub(f"hf://datasets/{arguments['path']}@{arguments['revision']}", where)
        raise hub_error(error, repository, where) from error
    empty = True
    for number, columns in enumerate(rows, start=1):
        empty = False
        yield Record(number, columns)
    if empty:
        raise DataError(f"{part.name}: no rows; the split is empty")
