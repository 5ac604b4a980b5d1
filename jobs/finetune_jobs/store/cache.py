"""Files by their sha256, shared by the stages of one machine, so that a model is downloaded once.

A verified file gets a fixed fraction of a second in its time of modification. Whatever writes to it later, through any
of its hard links, changes that, and the file is no longer taken for what its name says. So each use costs one ``stat``.
"""

import hashlib
import logging
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

from finetune_api.stage import File

_log = logging.getLogger("finetune.store")
_SECOND = 1_000_000_000
_VERIFIED = 271_828_100
"""Nanoseconds. A file system too coarse to keep them makes us download again, no worse."""


def mark_verified(path: Path) -> None:
    """The content was just compared with its sha256."""
    modified = time.time_ns() // _SECOND * _SECOND + _VERIFIED
    os.utime(path, ns=(modified, modified))


def is_verified(path: Path, size: int) -> bool:
    """Was the file verified, and not written to since?"""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_size == size and found.st_mtime_ns % _SECOND == _VERIFIED


def take(cache: Path, file: File, dest: Path) -> bool:
    """Put the file at ``dest`` if the cache has it; an entry that was written to is removed."""
    entry = cache / file.sha256
    if is_verified(entry, file.size_bytes) and _place(entry, dest, file.sha256):
        return True
    if entry.exists():
        _log.warning("the cached file %s was changed; it is removed", entry)
        entry.unlink(missing_ok=True)
    return False


def keep(cache: Path, file: File, verified: Path) -> None:
    """Add a verified file. A cache that cannot take it, for want of space, say, stays without."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _place(verified, cache / file.sha256, file.sha256)
    except OSError as error:
        _log.warning("not cached: %s", error)


def _place(source: Path, target: Path, sha256: str) -> bool:
    """Link, or across file systems copy, in one step; a copy counts only if it has the sha256."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            if _copy(source, temporary) != sha256:
                return False
            mark_verified(temporary)
        os.replace(temporary, target)
        return True
    finally:
        # Also after a replace: renaming one link of a file over another does nothing.
        with suppress(FileNotFoundError):
            temporary.unlink()


def _copy(source: Path, target: Path) -> str:
    sha256 = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while data := reader.read(1 << 20):
            sha256.update(data)
            writer.write(data)
    return sha256.hexdigest()
