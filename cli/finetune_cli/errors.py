"""What a command tells its user instead of a traceback, with the exit code it leaves."""

import errno
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune_api.validate import FieldError

COMPLETE = 0
FAILED = 1
INVALID = 64
"""The same number as a stage's: what the user wrote cannot work."""
BUG = 70


class CommandError(Exception):
    """The command cannot go on. The message says why and what to do."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class InvalidJobError(CommandError):
    """Every mistake of a job's file, each with its field path."""

    def __init__(self, file: str, errors: Sequence[FieldError]) -> None:
        many = f"{len(errors)} mistakes" if len(errors) > 1 else "a mistake"
        super().__init__("\n".join([f"{file} has {many}:", *(f"  {error}" for error in errors)]), INVALID)
        self.errors = list(errors)


_FULL_BYTES = 8 << 20
"""Less than this free, and the object store, which grows its files by several MiB at once, stops taking writes."""


def no_space(root: Path) -> list[str]:
    """A line that says so if the disk below ``$FINETUNE_HOME`` is full, else none.

    A stage's own words may be missing then: they are written to that disk too, and the object store on it only answers
    that it failed.
    """
    free = shutil.disk_usage(root).free
    if free >= _FULL_BYTES:
        return []
    return [
        f"  the disk of {root} is full ({free:,} bytes free): free space there, or move it and set FINETUNE_HOME; "
        "what is committed stays, the same command goes on"
    ]


def describe(error: Exception) -> tuple[int, str]:
    """Exit code and words for whatever a command raised."""
    if isinstance(error, CommandError):
        return error.code, str(error)
    from finetune_jobs.run.errors import StageError

    if isinstance(error, StageError):  # of the store, which speaks to users too
        return error.exit_code, str(error)
    cluster = sys.modules.get("finetune_operator.kube.errors")  # loaded by whoever has spoken to a cluster
    if cluster is not None and isinstance(error, cluster.KubeError):
        return FAILED, str(error)
    if isinstance(error, OSError):
        words = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            words += "; free space there, then the same command goes on"
        return FAILED, words
    return BUG, f"{type(error).__name__}: {error}\nThis is a bug; with --debug (or FINETUNE_DEBUG=1) it shows where"
