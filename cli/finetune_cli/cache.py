"""Bounds on the cache that the stages of this machine share: files by sha256, of use to later stages and runs."""

import os
import re
import shutil
from pathlib import Path

from finetune_cli.errors import INVALID, CommandError

DEFAULT_BYTES = 50 * 1024**3
_UNITS = {"": 1, "Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "Ti": 1024**4}


def bound(root: Path) -> int:
    """Bytes that the cache may take: ``$FINETUNE_CACHE_SIZE`` (``20Gi``), by default 50 GiB or a quarter of what the
    disk has free, whichever is less."""
    if text := os.environ.get("FINETUNE_CACHE_SIZE"):
        match = re.fullmatch(r"(\d+)(|Ki|Mi|Gi|Ti)", text)
        if match is None:
            raise CommandError(f"FINETUNE_CACHE_SIZE: a number of bytes such as 500Mi or 20Gi, got {text!r}", INVALID)
        return int(match[1]) * _UNITS[match[2]]
    root.mkdir(parents=True, exist_ok=True)
    return min(DEFAULT_BYTES, (shutil.disk_usage(root).free + used(root)) // 4)


def used(cache: Path) -> int:
    """Bytes in the cache."""
    return sum(size for _, size, _ in _files(cache))


def prune(cache: Path, limit: int) -> None:
    """Remove the files that were used longest ago until the rest fits.

    A stage that reads one of them has its own hard link; one that comes too late fetches it again.
    """
    files = sorted(_files(cache))
    excess = sum(size for _, size, _ in files) - limit
    for _, size, path in files:
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


def _files(cache: Path) -> list[tuple[float, int, Path]]:
    found = []
    for path in cache.rglob("*"):
        try:
            state = path.lstat()
        except FileNotFoundError:  # another run prunes too
            continue
        if path.is_file() and not path.is_symlink():
            # Its times of writing and reading say nothing: the store sets the first. Every use makes or removes a hard
            # link, which sets the third.
            found.append((state.st_ctime, state.st_size, path))
    return found
