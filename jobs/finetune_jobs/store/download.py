"""An object to a file: ranges in several threads, a broken download gone on with, the sha256 checked before the name.

Beside ``<dest>.part`` lies ``<dest>.part.done``: a line that says which object and which ranges, then the number of
each range as it is finished. Every range is asked for with ``If-Match``, so two versions of an object never mix.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, wait
from contextlib import closing
from pathlib import Path, PurePosixPath
from threading import Event
from typing import TYPE_CHECKING

from botocore.exceptions import IncompleteReadError

from finetune_api.stage import File
from finetune_jobs.run.errors import ConfigurationError, StageError
from finetune_jobs.store import cache as cached
from finetune_jobs.store.calls import AbandonedError, CorruptObjectError, RejectedError
from finetune_jobs.store.parts import Meter, part_size

if TYPE_CHECKING:
    from _hashlib import HASH

    from finetune_jobs.store.client import ObjectInfo, Store

_log = logging.getLogger("finetune.store")
_CHUNK = 1 << 20


def download(store: "Store", file: File, dest: Path, *, cache: Path | None = None) -> None:
    """See ``Store.get_file``."""
    check_names(file)
    if cached.is_verified(dest, file.size_bytes):
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    if cache is not None and cached.take(cache, file, dest):
        return
    part = dest.with_name(f"{dest.name}.part")
    try:
        _verified(store, file, part)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _discard(part)
        raise _disk_full(dest.parent, file.size_bytes) from error
    cached.mark_verified(part)
    os.replace(part, dest)
    _record(part).unlink(missing_ok=True)
    if cache is not None:
        cached.keep(cache, file, dest)


def check_names(file: File) -> None:
    """A manifest comes from outside: no path of it may lead out of the directory it is downloaded to."""
    path = PurePosixPath(file.path)
    if path.is_absolute() or ".." in path.parts or not re.fullmatch("[0-9a-f]{64}", file.sha256):
        raise CorruptObjectError(f"the manifest names an impossible file: path {file.path!r}, sha256 {file.sha256!r}")


def require_space(directory: Path, size: int) -> None:
    """StageError, with both figures, unless ``directory`` has room for ``size`` bytes more."""
    if shutil.disk_usage(directory).free < size:
        raise _disk_full(directory, size)


def _disk_full(directory: Path, size: int) -> StageError:
    free = shutil.disk_usage(directory).free
    return StageError(
        f"the disk is full: {size:,} bytes more are needed in {directory}, {free:,} are free; "
        "free space or give the workspace more"
    )


def _verified(store: "Store", file: File, part: Path) -> None:
    """Make ``part`` the whole file. Damage on the way is mended by a second download, damage in the store is not."""
    for _ in range(2):
        sha256 = _small(store, file, part) if file.size_bytes <= store.part_bytes else _ranges(store, file, part)
        if sha256 == file.sha256:
            return
        _discard(part)
        _log.warning("s3://%s/%s came with another sha256 than was committed", store.bucket, file.key)
    raise CorruptObjectError(
        f"s3://{store.bucket}/{file.key} is not what was committed: twice its sha256 was not {file.sha256}; "
        f"the object is damaged, or {store.call.host} sends wrong bytes"
    )


def _small(store: "Store", file: File, part: Path) -> str:
    data = store.get_bytes(file.key)
    require_space(part.parent, len(data))
    part.write_bytes(data)
    Meter(store.progress, file.path, file.size_bytes).add(len(data))
    return hashlib.sha256(data).hexdigest()


def _ranges(store: "Store", file: File, part: Path) -> str:
    """The sha256 of what arrived; empty if the object changed meanwhile."""
    found = store.head(file.key)
    if found.size != file.size_bytes:
        raise CorruptObjectError(
            f"s3://{store.bucket}/{file.key} has {found.size} bytes, {file.size_bytes} were committed; "
            "it was overwritten"
        )
    step = part_size(file.size_bytes, store.part_bytes)
    plan: dict[str, str | int] = {"key": file.key, "etag": found.etag, "size": found.size, "range": step}
    done = _resume(part, plan)
    meter = Meter(store.progress, file.path, file.size_bytes)
    sha256 = hashlib.sha256()
    count = -(-found.size // step)
    failed = Event()
    with part.open("r+b", buffering=0) as target, _record(part).open("ab", buffering=0) as record:
        require_space(part.parent, found.size - 512 * part.stat().st_blocks)
        os.posix_fallocate(target.fileno(), 0, found.size)  # a disk too small is found now, not at the end

        def bring(number: int) -> None:
            start, end = number * step, min((number + 1) * step, found.size)
            try:
                _range(store, found, target.fileno(), start, end, failed)
            except BaseException:
                failed.set()
                raise
            record.write(b"%d\n" % number)
            meter.add(end - start)

        coming = {number: store.pool.submit(bring, number) for number in range(count) if number not in done}
        try:
            for number in range(count):
                start, end = number * step, min((number + 1) * step, found.size)
                if number in coming:
                    coming[number].result()
                else:
                    meter.add(end - start)
                # In order, while later ranges come in; from the file, so that its disk is checked too.
                _hash(sha256, target.fileno(), start, end)
        except Exception as error:
            cause = _cause(coming.values(), error)
            if isinstance(cause, RejectedError) and cause.code == "PreconditionFailed":
                return ""
            raise cause from cause.__cause__
        finally:
            failed.set()
            for future in coming.values():
                future.cancel()
            wait(coming.values())
    return sha256.hexdigest()


def _cause(coming: Iterable[Future[None]], first: Exception) -> Exception:
    """The error that began it: other ranges were then given up."""
    ended = [future.exception() for future in coming if future.done() and not future.cancelled()]
    return next((e for e in ended if isinstance(e, Exception) and not isinstance(e, AbandonedError)), first)


def _range(store: "Store", found: "ObjectInfo", target: int, start: int, end: int, failed: Event) -> None:
    """Write bytes ``start`` to ``end`` of the object to the same place of the file."""

    def get() -> None:
        answer = store.s3.get_object(
            Bucket=store.bucket, Key=found.key, Range=f"bytes={start}-{end - 1}", IfMatch=found.etag
        )
        with closing(answer["Body"]) as body:
            if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise ConfigurationError(
                    f"spec.storage.endpoint: {store.call.host} answers a request for a part of an object with all of "
                    "it; downloads would be endless: use a store that has ranged GET"
                )
            at = start
            for data in body.iter_chunks(_CHUNK):
                if at + len(data) > end:
                    break
                at += os.pwrite(target, data, at)
        if at != end:
            raise IncompleteReadError(actual_bytes=at - start, expected_bytes=end - start)

    store.call("GetObject", found.key, get, failed.is_set)


def _hash(sha256: "HASH", source: int, start: int, end: int) -> None:
    for at in range(start, end, _CHUNK):
        sha256.update(os.pread(source, min(_CHUNK, end - at), at))


def _record(part: Path) -> Path:
    return part.with_name(f"{part.name}.done")


def _resume(part: Path, plan: dict[str, str | int]) -> set[int]:
    """The ranges that an earlier try has left in ``part``; begins anew if they are of another object, or none."""
    try:
        header, *lines = _record(part).read_text().splitlines(keepends=True)
        if json.loads(header) == plan and part.stat().st_size == plan["size"]:
            return {int(line) for line in lines if line.endswith("\n")}
    except (OSError, ValueError):
        pass
    _discard(part)
    part.touch()
    _record(part).write_text(json.dumps(plan) + "\n")
    return set()


def _discard(part: Path) -> None:
    _record(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)
