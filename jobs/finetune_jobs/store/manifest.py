"""Results: a manifest that names every file with size and sha256, written last and only once."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable

from finetune_api.stage import File, JobRef, Manifest
from finetune_jobs.run.errors import InputMissingError, StageError, StorageError
from finetune_jobs.store import layout
from finetune_jobs.store.client import Store

_log = logging.getLogger("finetune.store")


def commit(store: Store, manifest: Manifest) -> Manifest:
    """Make the result exist. Returns the manifest that counts: another attempt may have come first.

    Both have the same digest, so either will do; the loser's files are removed. A manifest whose objects are gone does
    not count and is replaced.
    """
    key = layout.manifest_key(layout.result_prefix(store.prefix, manifest.job, manifest.stage, manifest.digest))
    pointer = json.dumps({"manifest": key}).encode()
    # First the pointers, since a lookup checks what they point to: whoever dies in between has committed nothing.
    store.put_bytes(layout.reuse_key(store.prefix, manifest.job.namespace, manifest.digest), pointer)
    store.put_bytes(layout.latest_key(store.prefix, manifest.job, manifest.stage), pointer)

    def counts(data: bytes) -> bool:
        found = _parse(data)
        return found is not None and found.digest == manifest.digest and verify(store, found)

    ours = manifest.model_dump_json(by_alias=True, indent=1).encode()
    winner = _parse(put_once(store, key, ours, counts)) or manifest
    if winner.files != manifest.files:
        _log.info("another attempt has committed the same result; its files are used")
        named = {file.key for file in winner.files}
        store.delete(file.key for file in manifest.files if file.key not in named)
    try:
        store.abort_uploads(key.removesuffix("manifest.json") + "artifacts/")
    except StageError as error:  # they cost space, not results
        _log.warning("unfinished uploads of attempts that died were not removed: %s", error)
    return winner


def put_once(store: Store, key: str, data: bytes, counts: Callable[[bytes], bool]) -> bytes:
    """Write ``data`` unless what is there counts; returns what is there then.

    Two that replace the same broken object may both succeed, the later one's stays; theirs are interchangeable.
    """
    for _ in range(4):
        if store.put_if_absent(key, data):
            return data
        try:
            found = store.get_bytes(key)
        except InputMissingError:
            continue
        if counts(found):
            return found
        _log.warning("s3://%s/%s is broken or names objects that are gone; it is replaced", store.bucket, key)
        store.delete([key])
    raise StorageError(f"s3://{store.bucket}/{key} appears and vanishes; is someone deleting the job's objects?")


def load(store: Store, key: str) -> Manifest:
    """Read a committed manifest; InputMissingError if there is none, or none that can be read."""
    manifest = _parse(store.get_bytes(key))
    if manifest is None:
        raise InputMissingError(f"s3://{store.bucket}/{key} is no manifest; delete the result and run the job again")
    return manifest


def _parse(data: bytes) -> Manifest | None:
    try:
        return Manifest.model_validate_json(data)
    except ValueError:
        return None


def verify(store: Store, manifest: Manifest) -> bool:
    """Is every object there with its size? (Contents are checked when they are read.)"""
    return present(store, manifest.files)


def present(store: Store, files: Iterable[File]) -> bool:
    """Are these objects there with their sizes? A listing for each folder that they lie in."""
    wanted = {file.key: file.size_bytes for file in files}
    folders = {key.rpartition("/")[0] for key in wanted}
    # Listing a folder shows those below it too.
    tops = [folder for folder in folders if not any(folder.startswith(f"{other}/") for other in folders)]
    found = {item.key: item.size for folder in tops for item in store.list(f"{folder}/")}
    return all(found.get(key) == size for key, size in wanted.items())


def find_committed(store: Store, job: JobRef, stage: str, digest: str) -> Manifest | None:
    """A result of these inputs that is whole: the job's own, or another's of the namespace."""
    own = layout.manifest_key(layout.result_prefix(store.prefix, job, stage, digest))
    found = _whole(store, own, digest)
    if found is not None:
        return found
    try:
        elsewhere = json.loads(store.get_bytes(layout.reuse_key(store.prefix, job.namespace, digest)))["manifest"]
    except (InputMissingError, ValueError, TypeError, KeyError):
        return None
    return _whole(store, elsewhere, digest) if isinstance(elsewhere, str) and elsewhere != own else None


def _whole(store: Store, key: str, digest: str) -> Manifest | None:
    try:
        manifest = load(store, key)
    except InputMissingError:
        return None
    if manifest.digest == digest and verify(store, manifest):
        return manifest
    _log.warning("s3://%s/%s names objects that are gone; it is not used", store.bucket, key)
    return None


def content_digest(files: Iterable[File], under: str) -> str:
    """Hex sha256 of the names and contents of the files at or below ``under``; renaming ``under`` changes nothing.

    It is the sha256 of the sorted lines ``<path relative to under>\\0<sha256>\\n``.
    """
    lines = sorted(
        f"{file.path.removeprefix(under).removeprefix('/')}\0{file.sha256}\n"
        for file in files
        if not under or file.path == under or file.path.startswith(f"{under}/")
    )
    if not lines:
        raise StageError(f"the stage left no file at {under!r}, which it named as its output")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
