"""Memory or disk that runs out, in words that say what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from finetune_jobs.run.errors import StageError


@contextmanager
def memory_errors(path: str) -> Iterator[None]:
    """``path``: the block of the spec whose fields lower the need."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        words = str(error).splitlines()[0] if str(error) else "MemoryError"
        raise StageError(
            f"out of memory: set {path}.training.microBatchSize: 1 and gradientCheckpointing: true, lower maxLength, "
            f"or use method qlora ({words})"
        ) from error


@contextmanager
def disk_errors(doing: str, directory: Path) -> Iterator[None]:
    """``doing``: what is written below ``directory``, as in "saving step 20"."""
    try:
        yield
    except Exception as error:  # each library has an error of its own for a full disk
        if not _is_full(error):
            raise
        raise StageError(
            f"the disk of the workspace is full while {doing} in {directory}: free space there or give the stage more "
            "room; what is committed stays"
        ) from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
