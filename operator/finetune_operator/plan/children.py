"""What a shell shows ``plan``, a ``Child`` for each attempt, and what it gets back, a ``Plan``."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from finetune_api.stage import StageRun, Termination
from finetune_api.status import CheckpointStatus, JobStatus, Progress, StageStatus


@dataclass(frozen=True, kw_only=True)
class Child:
    """One attempt of a stage as the shell sees it: a Job on the cluster, a process on one machine."""

    name: str
    stage: str
    attempt: int
    state: Literal["Queued", "Pending", "Running", "Succeeded", "Failed"]
    """Queued: a quota system holds it back; Pending: it may run as soon as there is a place."""
    exit_code: int | None = None
    """Of the stage's container, once it has ended; minus the signal's number where a process died of one."""
    cause: str = ""
    """The platform's own word: why it ended (DisruptionTarget, OOMKilled, Evicted), or why it does not run."""
    message: str = ""
    """The platform's words for that, such as the scheduler's."""
    since: datetime | None = None
    """Since when it waits for a place to run, time in queues not counted; None where that is not told."""
    image: str = ""
    """What its container runs, by digest where the platform tells."""
    termination: Termination | None = None
    start: datetime | None = None
    """When it began to run, time in queues not counted; after an interruption, when it began again."""
    interrupted: timedelta = timedelta()
    """How long it ran before a queue took its place away and gave it another; each such time is shown once."""
    end: datetime | None = None
    progress: Progress | None = None
    checkpoint: CheckpointStatus | None = None
    deleting: bool = False
    """Somebody asked for its end."""

    @property
    def ended(self) -> bool:
        """None of its processes is left."""
        return self.state in ("Succeeded", "Failed")


@dataclass(frozen=True)
class NewChild:
    """An attempt to start. The name is deterministic: one that is there already is this one."""

    name: str
    run: StageRun
    parameters: int | None = None
    """Of the base model, once ``prepare`` has seen it."""
    service: str = ""
    """Name of the Service that must be there before it, where it runs on several nodes of a cluster."""


@dataclass(frozen=True)
class Refused:
    """An attempt that the platform would not make."""

    words: str
    since: datetime


@dataclass(frozen=True)
class Plan:
    """What the shell should do, and the status to record before it does."""

    create: Sequence[NewChild]
    """Independent of each other: the shell decides how many run at once."""
    delete: Sequence[str]
    """Names of children to stop, in the foreground: SIGTERM, then wait until nothing of them runs."""
    status: JobStatus
    look_again: timedelta | None
    """Plan again after so long even if nothing is reported; None: only a report can change anything."""
    expired: bool = False
    """The job's time to live is over: the shell deletes it, record and all."""
    passed: Sequence[StageStatus] = ()
    """Stages whose attempt ended without a result and is followed by the next at once: as they stood in between."""
    forget: Sequence[str] = ()
    """Names of children whose end the status has, and after which another ended: what is left of them may go."""
