"""What a user reads under ``status``. The ledger: a finished stage stands here before its Job may vanish."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.stage import Artifact, Record, StageResult


class StageState(StrEnum):
    """Where a stage is. Strings in the schema, so that an older CRD accepts a newer state."""

    WAITING = "Waiting"
    QUEUED = "Queued"
    PENDING = "Pending"
    RUNNING = "Running"
    RETRYING = "Retrying"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    REUSED = "Reused"
    FAILED = "Failed"

    @property
    def done(self) -> bool:
        """The stage has a committed result."""
        return self in (StageState.COMPLETE, StageState.REUSED)


class Reason(StrEnum):
    """Why a condition or a stage is as it is. One list, so that documentation and alerts can rely on it."""

    INVALID_SPEC = "InvalidSpec"
    VALID = "Valid"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    COMPLETED = "Completed"
    STAGE_FAILED = "StageFailed"
    SIBLING_FAILED = "SiblingFailed"
    GATES_PASSED = "GatesPassed"
    GATES_FAILED = "GatesFailed"
    BAD_CONFIGURATION = "BadConfiguration"
    BAD_DATA = "BadData"
    INPUT_MISSING = "InputMissing"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    PEER_LOST = "PeerLost"
    STAGE_ERROR = "StageError"
    OUT_OF_MEMORY = "OutOfMemory"
    DISK_FULL = "DiskFull"
    PREEMPTED = "Preempted"
    NO_RESULT = "NoResult"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    RETRIES_EXHAUSTED = "RetriesExhausted"


class MetricValue(Record):
    """A figure of the running stage; text, since the API has no floats in status."""

    name: str
    value: str


class Progress(Record):
    """How far a running stage is."""

    step: int = 0
    total_steps: int = 0
    percent: int = 0
    eta_seconds: int | None = None
    tokens_per_second: int | None = None
    metrics: Annotated[list[MetricValue], Field(max_length=16)] = []
    updated_time: datetime | None = None


class CheckpointStatus(Record):
    """The newest committed checkpoint."""

    step: int
    uri: str


class StageStatus(Record):
    """One stage."""

    name: str
    state: StageState = StageState.WAITING
    reason: str = ""
    message: str = ""
    job: str = ""
    """Name of the child that runs, or ran, the latest attempt."""
    attempt: int = 0
    failures: int = 0
    """Attempts that count against ``retries``."""
    start_time: datetime | None = None
    """Of the first attempt."""
    completion_time: datetime | None = None
    running_seconds: float = 0
    """Summed over ended attempts."""
    retry_time: datetime | None = None
    """Not before this the next attempt starts."""
    progress: Progress | None = None
    checkpoint: CheckpointStatus | None = None
    result: StageResult | None = None


class Condition(Record):
    """As in Kubernetes: ``status`` is True, False or Unknown."""

    type: str
    status: str
    reason: str
    message: str = ""
    last_transition_time: datetime
    observed_generation: int = 0


class JobStatus(Record):
    """``status`` of a FineTuneJob."""

    observed_generation: int = 0
    summary: str = ""
    """The STATUS column: one honest line."""
    stage: str = ""
    progress: str = ""
    eta: str = ""
    conditions: list[Condition] = []
    stages: list[StageStatus] = []
    artifacts: list[Artifact] = []
    report_uri: Annotated[str, Field(alias="reportURI")] = ""
