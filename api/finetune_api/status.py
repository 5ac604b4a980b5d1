"""What a user reads under ``status``. The ledger: a finished stage stands here before its Job may vanish."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field, PlainSerializer, WithJsonSchema

from finetune_api.stage import Artifact, Name, Record, StageResult, StoredUri
from finetune_api.types import listed_by


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
    KILLED = "Killed"
    DISK_FULL = "DiskFull"
    PREEMPTED = "Preempted"
    NO_RESULT = "NoResult"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    PENDING_DEADLINE = "PendingDeadlineExceeded"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL = "ImagePull"
    SECRET_MISSING = "SecretMissing"
    STARTING = "Starting"
    POD_REFUSED = "PodRefused"
    JOB_REFUSED = "JobRefused"
    NODE_LOST = "NodeLost"
    RETRIES_EXHAUSTED = "RetriesExhausted"


# 32768 is Kubernetes' own bound for the message of a condition.
Message = Annotated[str, Field(max_length=32768)]
Line = Annotated[str, Field(max_length=2048)]
Decimal = Annotated[
    float,
    PlainSerializer(str, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "maxLength": 32}),
]
"""A number that need not be whole. Text in JSON, since the API has no floats in status."""


class MetricValue(Record):
    """A figure of the running stage; text, since the API has no floats in status."""

    name: Name
    """Which: ``loss``, ``gradNorm``."""
    value: Name
    """The figure."""


class Progress(Record):
    """How far a running stage is."""

    step: int = 0
    """Steps that are done; of which kind, the stage decides."""
    total_steps: int = 0
    """Steps in all; 0 while that is not known."""
    percent: int = 0
    """Of the whole stage."""
    eta_seconds: int | None = None
    """What is left, at the present pace."""
    tokens_per_second: int | None = None
    """Tokens trained on, over all GPUs."""
    metrics: Annotated[list[MetricValue], Field(max_length=16)] = []
    """Latest figures."""
    updated_time: datetime | None = None
    """When the stage said so."""


class CheckpointStatus(Record):
    """The newest committed checkpoint."""

    step: int
    """Optimizer steps that it holds."""
    uri: StoredUri
    """Where it is."""


class StageStatus(Record):
    """One stage."""

    name: Name
    """``prepare``, ``baseline``, a name of the pipeline, ``evaluate`` or ``report``."""
    state: StageState = StageState.WAITING
    """Waiting, Queued, Pending, Running, Retrying, Suspended, Complete, Reused or Failed."""
    reason: Name = ""
    """One word for why it is so: Unschedulable, ImagePull, OutOfMemory."""
    message: Message = ""
    """The same in a sentence, with what to do."""
    job: Name = ""
    """Name of the child that runs, or ran, the latest attempt."""
    attempt: int = 0
    """Number of the latest attempt, from 1."""
    failures: int = 0
    """Attempts that count against ``retries``."""
    image: StoredUri = ""
    """What the latest attempt runs."""
    start_time: datetime | None = None
    """Of the first attempt."""
    completion_time: datetime | None = None
    """When it was done, or failed for good."""
    running_seconds: Decimal = 0
    """Summed over ended attempts, and over what a queue interrupted of the latest."""
    retry_time: datetime | None = None
    """Not before this the next attempt starts."""
    progress: Progress | None = None
    """How far the latest attempt is."""
    checkpoint: CheckpointStatus | None = None
    """From here the next attempt would go on."""
    result: StageResult | None = None
    """What the stage left, once it is done."""


class Condition(Record):
    """As in Kubernetes: ``status`` is True, False or Unknown."""

    type: Name
    """Accepted, Suspended, Complete, Failed or GatePassed."""
    status: Annotated[str, Field(max_length=16)]
    """True, False or Unknown."""
    reason: Name
    """One word for why."""
    message: Message = ""
    """The same in a sentence."""
    last_transition_time: datetime
    """When ``status`` changed last."""
    observed_generation: int = 0
    """``metadata.generation`` that it speaks of."""


class JobStatus(Record):
    """Where the job is, and what it has left; written by the operator alone."""

    observed_generation: int = 0
    """``metadata.generation`` that the status speaks of."""
    summary: Line = ""
    """The STATUS column: one honest line."""
    stage: Name = ""
    """The STAGE column: which stage the others speak of."""
    progress: Name = ""
    """The PROGRESS column: ``3/8 40%``, stages that are done and how far the running one is."""
    eta: Name = ""
    """The ETA column: what is left of the running stage."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=listed_by("type"))] = []
    """Accepted, Suspended, Complete, Failed, GatePassed; those that were ever set."""
    stages: Annotated[list[StageStatus], Field(max_length=64, json_schema_extra=listed_by("name"))] = []
    """Every stage, in the order of running."""
    artifacts: Annotated[list[Artifact], Field(max_length=1024, json_schema_extra=listed_by("stage", "name"))] = []
    """What can be pulled."""
    report_uri: Annotated[str, Field(alias="reportURI", max_length=2048)] = ""
    """The page with scores, losses, failures and gates."""
