"""What can go wrong in a stage, by what should happen next. The exit code is the contract with the operator.

::

    StageError                 70  a bug of ours: counted, retried
    ├── ConfigurationError     64  the spec cannot work: final
    ├── DataError              65  the data cannot work: final
    ├── InputMissingError      66  an input is gone: final
    ├── StorageError           69  the store stayed unavailable: counted, retried
    ├── PreemptedError         75  saved and shoved aside: a new attempt, not counted
    └── PeerLostError          76  another process of the stage died: counted, retried

Messages are for the user: they name the field, file or line, and the mend.
"""


class StageError(Exception):
    """Base of all; on its own a bug."""

    exit_code = 70


class ConfigurationError(StageError):
    """A field of the spec is wrong; the message begins with its path."""

    exit_code = 64


class DataError(StageError):
    """A row, file or data set is wrong; the message names file and line."""

    exit_code = 65


class InputMissingError(StageError):
    """A model, data set or earlier result is not where it should be."""

    exit_code = 66


class StorageError(StageError):
    """The object store failed after all retries, or breaks a promise we need."""

    exit_code = 69


class PreemptedError(StageError):
    """The stage was told to stop and did, its state committed as far as it could be."""

    exit_code = 75


class PeerLostError(StageError):
    """Another process of this stage went away."""

    exit_code = 76


def first_line(error: BaseException) -> str:
    """Of what a library said, as much as fits into a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
