"""The status that users and other programs read: conditions, columns, artifacts. All derived from the stages."""

import copy
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.pipeline import order
from finetune_api.stage import Artifact
from finetune_api.status import Condition, JobStatus, Reason, StageState, StageStatus
from finetune_api.types import FineTuneJob
from finetune_api.validate import FieldError

_LONGEST_MESSAGE = 4000
_LONGEST_IMAGE = 2048
_LONGEST_SUMMARY = 240
_ACTIVE = (StageState.RUNNING, StageState.PENDING, StageState.QUEUED)


def read(found: Any) -> tuple[JobStatus, list[str]]:
    """A status as the API server has it, and what of it cannot be read: an entry of a list, or a whole field.

    Those are left out, as if they had never been written. What they said comes back from the attempts' Jobs, or else
    the stage runs again and finds its committed result.
    """
    plain = found if isinstance(found, dict) else {}
    lost: list[str] = []
    while True:
        try:
            return JobStatus.model_validate(plain), lost
        except ValidationError as error:
            if not lost:
                plain = copy.deepcopy(plain)  # what the caches hold is shared; a status that can be read needs no copy
            field, *index = error.errors()[0]["loc"][:2]
            lost.append(f"status.{field}" + "".join(f"[{number}]" for number in index))
            held = plain.get(str(field))
            if index and isinstance(held, list) and isinstance(index[0], int):
                del held[index[0]]
            else:
                del plain[str(field)]


def condition(status: JobStatus, kind: str) -> Condition | None:
    """The condition of that type, if it was ever set."""
    return next((c for c in status.conditions if c.type == kind), None)


def holds(status: JobStatus, kind: str) -> bool:
    """The condition is True."""
    found = condition(status, kind)
    return found is not None and found.status == "True"


def with_condition(
    status: JobStatus, generation: int, now: datetime, kind: str, value: bool, reason: Reason, message: str = ""
) -> JobStatus:
    """The status with the condition set; its transition time moves only when its value does."""
    old = condition(status, kind)
    new = Condition(
        type=kind,
        status=str(value),
        reason=reason,
        message=message[:_LONGEST_MESSAGE],
        last_transition_time=old.last_transition_time if old and old.status == str(value) else now,
        observed_generation=generation,
    )
    others = [c for c in status.conditions if c.type != kind]
    return status.model_copy(update={"conditions": sorted([*others, new], key=lambda c: c.type)})


def begin(job: FineTuneJob, status: JobStatus) -> JobStatus:
    """The status with a line for every stage, in the order of running."""
    known = {stage.name: stage for stage in status.stages}
    stages = [known.get(name) or StageStatus(name=name) for name in order(job.spec)]
    return status.model_copy(update={"stages": stages, "observed_generation": job.metadata.generation})


def invalid(generation: int, status: JobStatus, errors: Sequence[FieldError], now: datetime) -> JobStatus:
    """The status of a job that can never run: every mistake is in the message."""
    message = "\n".join(map(str, errors))
    status = status.model_copy(update={"observed_generation": generation})
    status = with_condition(status, generation, now, "Accepted", False, Reason.INVALID_SPEC, message)
    status = with_condition(status, generation, now, "Failed", True, Reason.INVALID_SPEC, message)
    mistakes = "1 mistake" if len(errors) == 1 else f"{len(errors)} mistakes"
    return status.model_copy(update={"summary": f"Failed: InvalidSpec ({mistakes})"})


def settle(job: FineTuneJob, status: JobStatus, stages: Sequence[StageStatus], now: datetime) -> JobStatus:
    """The status with these stages and all that follows from them."""
    stages = [_cut(stage) for stage in stages]
    artifacts = _artifacts(stages)
    page = next((a.uri for a in artifacts if (a.stage, a.name) == ("report", "index.html")), "")
    status = status.model_copy(update={"stages": stages, "artifacts": artifacts, "report_uri": page})
    status = _end(job, _gate(job, status, now), now)
    return status.model_copy(update=_columns(status))


def _cut(stage: StageStatus) -> StageStatus:
    """What others say may be of any length; the API server takes no more than the schema allows."""
    if len(stage.message) <= _LONGEST_MESSAGE and len(stage.image) <= _LONGEST_IMAGE:
        return stage
    cut = {"message": stage.message[:_LONGEST_MESSAGE], "image": stage.image[:_LONGEST_IMAGE]}
    return stage.model_copy(update=cut)


def _artifacts(stages: Sequence[StageStatus]) -> list[Artifact]:
    """Of every finished stage, each (stage, name) once."""
    found = {(s.name, a.name): a for s in stages if s.result is not None for a in s.result.artifacts}
    return [artifact.model_copy(update={"stage": stage}) for (stage, _), artifact in found.items()]


def _gate(job: FineTuneJob, status: JobStatus, now: datetime) -> JobStatus:
    report = next((s.result for s in status.stages if s.name == "report" and s.state.done), None)
    passed = report.figures.get("gatesPassed") if report else None
    if passed is None:
        return status
    if passed:
        return with_condition(status, job.metadata.generation, now, "GatePassed", True, Reason.GATES_PASSED)
    return with_condition(
        status, job.metadata.generation, now, "GatePassed", False, Reason.GATES_FAILED, "the report says which and why"
    )


def _end(job: FineTuneJob, status: JobStatus, now: datetime) -> JobStatus:
    """Complete or Failed, once that is certain."""
    failed = [stage for stage in status.stages if stage.state is StageState.FAILED]
    if failed:
        words = "; ".join(f"stage {s.name} failed ({s.reason}): {s.message}" for s in failed)
        return with_condition(status, job.metadata.generation, now, "Failed", True, _why(job, failed[0]), words)
    if not all(stage.state.done for stage in status.stages):
        return status
    gate = condition(status, "GatePassed")
    if gate and gate.status == "False" and job.spec.evaluation.gates.fail_job:
        words = "a gate failed, and spec.evaluation.gates.failJob is set: the report says which and why"
        return with_condition(status, job.metadata.generation, now, "Failed", True, Reason.GATES_FAILED, words)
    return with_condition(status, job.metadata.generation, now, "Complete", True, Reason.COMPLETED)


def _why(job: FineTuneJob, stage: StageStatus) -> Reason:
    if stage.reason in (Reason.DEADLINE_EXCEEDED, Reason.PENDING_DEADLINE):
        return Reason(stage.reason)
    final = (Reason.BAD_CONFIGURATION, Reason.BAD_DATA, Reason.INPUT_MISSING)
    return Reason.STAGE_FAILED if stage.reason in final else Reason.RETRIES_EXHAUSTED


# ---------------------------------------------------------------- columns


def _columns(status: JobStatus) -> dict[str, str]:
    """STAGE, PROGRESS, ETA and STATUS of ``kubectl get``."""
    done = sum(stage.state.done for stage in status.stages)
    at = _at(status.stages)
    progress = at.progress if at and at.state is StageState.RUNNING else None
    percent = f" {progress.percent}%" if progress else ""
    eta = progress.eta_seconds if progress else None
    return {
        "stage": at.name if at else "",
        "progress": f"{done}/{len(status.stages)}{percent}",
        "eta": duration(eta) if eta is not None else "",
        "summary": _summary(status),
    }


def _at(stages: Sequence[StageStatus]) -> StageStatus | None:
    """The stage that the columns speak of: the failed one, else one at work, else the first that is not done."""
    for states in ([StageState.FAILED], _ACTIVE, [StageState.RETRYING, StageState.SUSPENDED]):
        if found := next((s for s in stages if s.state in states), None):
            return found
    return next((s for s in stages if not s.state.done), None)


def _summary(status: JobStatus) -> str:
    if holds(status, "Complete"):
        gate = condition(status, "GatePassed")
        return "Complete, a gate failed" if gate and gate.status == "False" else "Complete"
    if holds(status, "Failed"):
        broken = next((s for s in status.stages if s.state is StageState.FAILED), None)
        return f"Failed: {broken.name}: {broken.reason}" if broken else "Failed: GatesFailed"
    if holds(status, "Suspended"):
        return "Suspended"
    stopping = [s.name for s in status.stages if s.state in _ACTIVE and s.reason == Reason.SUSPENDED]
    if stopping:
        return f"Suspending {', '.join(stopping)}"
    for state in (StageState.RUNNING, StageState.RETRYING, StageState.QUEUED, StageState.PENDING):
        if found := [s for s in status.stages if s.state is state]:
            reason = f": {found[0].reason}" if found[0].reason else ""
            # What keeps a stage from running is for the user to mend: in the words of who knows.
            words = f": {found[0].message}" if found[0].message and state is not StageState.RETRYING else ""
            line = f"{state} {', '.join(s.name for s in found)}{reason}{words}"
            return " ".join(line.split())[:_LONGEST_SUMMARY]
    return "Waiting"


def duration(seconds: int) -> str:
    """``45s``, ``12m``, ``3h10m``."""
    if seconds < 60:
        return f"{seconds}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"
