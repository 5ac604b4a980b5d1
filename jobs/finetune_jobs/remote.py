"""What others keep: repositories of the Hugging Face hub and objects of any bucket. Read only."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune_api.types import Storage
from finetune_jobs.run.errors import ConfigurationError, InputMissingError, StageError, StorageError, first_line
from finetune_jobs.store.calls import RejectedError
from finetune_jobs.store.client import ObjectInfo, Store

_RANGE_BYTES = 32 << 20


@dataclass(frozen=True)
class Repository:
    """``hf://[datasets/]org/name[/more][@revision]``."""

    kind: Literal["model", "dataset"]
    name: str
    inside: str
    """What stands after the name: a configuration or a file of a data set."""
    revision: str


def parse_hub(source: str, field: str) -> Repository:
    """The repository that an ``hf://`` source names. ConfigurationError, beginning with ``field``, if it names none."""
    path, _, revision = source.removeprefix("hf://").partition("@")
    kind: Literal["model", "dataset"] = "dataset" if path.startswith("datasets/") else "model"
    parts = path.removeprefix("datasets/").strip("/").split("/")
    if (
        not all(re.fullmatch(r"[\w.-]+", part) for part in parts)
        or len(parts) < 2
        or (kind == "model" and len(parts) > 2)
    ):
        shape = "hf://datasets/org/name" if kind == "dataset" else "hf://org/name"
        raise ConfigurationError(f"{field}: must be {shape}, optionally with @revision, got {source!r}")
    return Repository(kind, "/".join(parts[:2]), "/".join(parts[2:]), revision or "main")


def token() -> str | None:
    """The hub's token, from HF_TOKEN."""
    return os.environ.get("HF_TOKEN") or None


def commit_of(repository: Repository, field: str) -> str:
    """The commit that the revision stands for now; asks the hub unless it is a commit already."""
    if re.fullmatch(r"[0-9a-f]{40}", repository.revision):
        return repository.revision
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token())
        ask = api.dataset_info if repository.kind == "dataset" else api.model_info
        return str(ask(repository.name, revision=repository.revision).sha)
    except Exception as error:
        raise hub_error(error, repository, field) from error


def hub_error(error: Exception, repository: Repository, field: str) -> StageError:
    """What the hub's client raised, in words that name the field and the mend."""
    from huggingface_hub import errors

    what = f"{field}: {repository.kind} {repository.name} at {repository.revision}"
    match error:
        case StageError():
            return error
        case errors.GatedRepoError():
            return ConfigurationError(
                f"{what} is gated: accept its terms on the hub and give a token of that account as HF_TOKEN "
                "(spec.model.secretRef)"
            )
        case errors.RevisionNotFoundError():
            return InputMissingError(f"{what}: there is no such revision; name a branch, tag or commit of it after @")
        case errors.RepositoryNotFoundError():
            return InputMissingError(
                f"{what} is not on the hub, or is private: check the name, and HF_TOKEN (spec.model.secretRef) for a "
                "private one"
            )
        case errors.EntryNotFoundError():
            return InputMissingError(f"{what}: a file is missing: {first_line(error)}")
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return StorageError(
                f"{what} is not in the local cache and the hub cannot be reached "
                f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')}); "
                "connect, or use file:// or s3://"
            )
        case errors.HfHubHTTPError() if error.response is not None and error.response.status_code in (401, 403):
            return ConfigurationError(f"{what}: the hub refuses HF_TOKEN (spec.model.secretRef): {first_line(error)}")
        case _:
            return StorageError(f"{what}: the hub cannot be read: {type(error).__name__}: {first_line(error)}")


@dataclass(frozen=True)
class Objects:
    """The objects that an ``s3://bucket/key-or-prefix`` source stands for."""

    store: Store
    found: tuple[tuple[str, ObjectInfo], ...]
    """(name relative to the source, object)."""


def open_objects(source: str, storage: Storage, field: str) -> Objects:
    """One object, or all below a prefix; read with the job's own credentials and endpoint. InputMissingError if there
    are none.
    """
    bucket, _, key = source.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigurationError(f"{field}: must be s3://bucket/key, got {source!r}")
    store = Store.of(storage.model_copy(update={"bucket": bucket, "prefix": ""}))
    listed = list(_listing(store, key, source, field))
    exact = [o for o in listed if o.key == key]
    folder = f"{key.rstrip('/')}/" if key else ""
    below = [o for o in listed if o.key.startswith(folder) and not o.key.endswith("/")]
    if not exact and not below:
        raise InputMissingError(f"{field}: nothing is stored at {source}; check bucket and key")
    if exact:
        return Objects(store, ((key.rpartition("/")[2], exact[0]),))
    return Objects(store, tuple((o.key.removeprefix(folder), o) for o in below))


def _listing(store: Store, prefix: str, source: str, field: str) -> Iterator[ObjectInfo]:
    try:
        yield from store.list(prefix)
    except ConfigurationError as error:
        raise ConfigurationError(f"{field}: {source} cannot be read: {error}") from error


def fetch_object(store: Store, info: ObjectInfo, dest: Path) -> None:
    """Download an object of which only size and ETag are known; a change of it on the way is an InputMissingError."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = dest.with_name(f"{dest.name}.part")
    with partial.open("wb") as out:
        for start in range(0, info.size, _RANGE_BYTES):
            out.write(read_range(store, info, start, min(start + _RANGE_BYTES, info.size) - 1))
    if partial.stat().st_size != info.size:
        raise _changed(store, info)
    partial.replace(dest)


def read_range(store: Store, info: ObjectInfo, start: int, last: int) -> bytes:
    """A part of an object, its ``last`` byte included; a change of the object is an InputMissingError."""

    def get() -> bytes:
        where = f"bytes={start}-{last}"
        return store.s3.get_object(Bucket=store.bucket, Key=info.key, Range=where, IfMatch=info.etag)["Body"].read()

    try:
        return store.call("GetObject", info.key, get)
    except RejectedError as error:
        raise (_changed(store, info) if error.code in ("PreconditionFailed", "InvalidRange") else error) from error


def _changed(store: Store, info: ObjectInfo) -> InputMissingError:
    return InputMissingError(
        f"s3://{store.bucket}/{info.key} is no longer what it was when the job was prepared; run the job again"
    )


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
