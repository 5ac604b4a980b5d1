"""What people are told as Kubernetes Events: each change of a stage's state, and how the job ended."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from finetune_api.status import JobStatus, Reason, StageState, StageStatus
from finetune_operator.plan.status import condition

_TROUBLE = (StageState.FAILED, StageState.RETRYING)


@dataclass(frozen=True)
class Told:
    """One Event."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def changes(before: JobStatus, after: JobStatus, passed: Iterable[StageStatus] = ()) -> Iterator[Told]:
    """What happened between two statuses of a job. ``passed``: stages as they stood for a moment in between."""
    earlier = {stage.name: stage for stage in before.stages}
    for stage in passed:
        yield _told(stage)
    for stage in after.stages:
        old = earlier.get(stage.name, StageStatus(name=stage.name))
        if (stage.state, stage.reason, stage.attempt) != (old.state, old.reason, old.attempt):
            yield _told(stage)
    for kind in ("Suspended", "GatePassed", "Complete", "Failed"):
        new, old_condition = condition(after, kind), condition(before, kind)
        if new is None or (kind, new.reason, new.status) == ("Suspended", Reason.SUSPENDED, "False"):
            continue  # the stages' own lines tell that they are stopping
        if old_condition is None or old_condition.status != new.status:
            bad = (new.status == "True") is (kind == "Failed")
            yield Told("Warning" if bad and kind != "Suspended" else "Normal", new.reason, new.message or kind)


def _told(stage: StageStatus) -> Told:
    # A stage that waits for its turn, or just starts, has nothing to say; one that cannot start, or is lost, does.
    starts = stage.state is StageState.PENDING and stage.reason not in ("", Reason.SUSPENDED)
    lost = stage.reason == Reason.NODE_LOST
    trouble = stage.state in _TROUBLE or ((starts or lost) and stage.message != "")
    attempt = f", attempt {stage.attempt}" if stage.attempt > 1 else ""
    words = f": {stage.message}" if stage.message else ""
    return Told(
        "Warning" if trouble else "Normal",
        stage.reason or f"Stage{stage.state}",
        f"{stage.name} is {stage.state}{attempt}{words}",
    )
