"""What a command tells its user instead of a traceback, with the exit code it leaves."""

from collections.abc import Sequence

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


def describe(error: Exception) -> tuple[int, str]:
    """Exit code and words for whatever a command raised."""
    if isinstance(error, CommandError):
        return error.code, str(error)
    from finetune_jobs.run.errors import StageError

    if isinstance(error, StageError):  # of the store, which speaks to users too
        return error.exit_code, str(error)
    if isinstance(error, OSError):
        return FAILED, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return BUG, f"{type(error).__name__}: {error}\nThis is a bug; with --debug (or FINETUNE_DEBUG=1) it shows where"
