"""A job as the commands see it, wherever it runs: ``look.LocalJob`` on this machine, ``cluster.ClusterJob`` there."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from finetune_api.status import JobStatus
from finetune_api.types import FineTuneJob

if TYPE_CHECKING:
    from finetune_jobs.store.client import Store

Told = Callable[[str, int, int], None]
"""A callback for transfers: (key, bytes done, bytes in all)."""


class LogLine(NamedTuple):
    """One line of a stage's log."""

    text: str
    source: str = ""
    """Stage and attempt, where several speak at the same time."""


class Job(Protocol):
    """All that differs between ``finetune`` and ``kubectl finetune``. Failures are CommandErrors."""

    @property
    def name(self) -> str:
        """``metadata.name``."""

    @property
    def command(self) -> str:
        """What the user calls us, for words that name a command."""

    @property
    def downloads(self) -> Path:
        """A folder of this job's own for files that commands fetch for themselves."""

    def definition(self) -> FineTuneJob:
        """The spec, checked, with its metadata."""

    def resource(self) -> dict[str, Any]:
        """The object as ``kubectl get -o json`` shows it."""

    def status(self) -> JobStatus:
        """As it is now."""

    def since(self) -> datetime | None:
        """From when its age counts; None: not yet."""

    def updates(self) -> Iterator[JobStatus]:
        """The status now and after each change, until nothing will change by itself; the last one comes last."""

    def log_lines(self, stage: str, *, follow: bool) -> Iterator[LogLine]:
        """What every attempt of a stage wrote, or of all; ``follow`` waits for more of it."""

    def store(self, told: Told | None) -> "AbstractContextManager[Store]":
        """Its object store, from this machine."""
