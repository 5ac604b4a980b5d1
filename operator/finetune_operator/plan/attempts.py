"""What a stage's children say about it: its result, its failures, how far it is. Every ended attempt counts once."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.status import Reason, StageState, StageStatus
from finetune_api.types import FineTuneJobSpec, Stage
from finetune_operator.plan import deadline, retry
from finetune_operator.plan.children import Child, Refused

OPEN = (StageState.QUEUED, StageState.PENDING, StageState.RUNNING)
"""States whose latest attempt has not been seen to end."""


@dataclass(frozen=True)
class Limits:
    """What a stage may cost."""

    retries: int
    deadline: timedelta | None
    pending: timedelta | None = None
    """How long an attempt may wait for a place to run."""


def limits(spec: FineTuneJobSpec, name: str) -> Limits:
    """The stage's own, or the defaults for a stage that every job has."""
    stage = next((s for s in spec.pipeline if s.name == name), Stage(name="derived"))
    return Limits(
        stage.retries,
        deadline.span(stage.active_deadline_seconds),
        deadline.span(spec.pending_deadline_seconds),
    )


def current(stage: StageStatus, children: Sequence[Child]) -> Child | None:
    """The child that is, or will be, running the stage's latest attempt. Any other live child is a stray."""
    live = [child for child in children if not child.ended and child.attempt > accounted(stage)]
    return max(live, key=lambda child: child.attempt, default=None)


def observe(stage: StageStatus, children: Sequence[Child], limits: Limits, now: datetime) -> StageStatus:
    """The stage's status after all that its children show.

    Status writes may have been lost: an attempt that the status does not know yet is taken into account as it is.
    """
    if _settled(stage):
        return stage
    for child in sorted(children, key=lambda c: c.attempt):
        if child.ended and child.attempt > accounted(stage):
            stage = _close(stage, child, limits, now)
            if _settled(stage):
                return stage
    running = current(stage, children)
    if running is not None:
        stage = _follow(stage, running)
        waiting = deadline.pending(limits.pending, running, now)
        if waiting is not None and waiting <= timedelta():
            return _never_placed(stage, limits, now)
        time_left = deadline.left(limits.deadline, stage, running, now)
        if time_left is None or time_left > timedelta():
            return stage
        seconds = stage.running_seconds + deadline.ran(running, now).total_seconds()
        return _out_of_time(stage.model_copy(update={"running_seconds": seconds}), limits, now)
    if stage.state in (StageState.RUNNING, StageState.QUEUED):  # it was there
        words = f"{stage.job} is gone without a trace"
        lost = {"state": StageState.RETRYING, "reason": Reason.PREEMPTED, "message": words}
        return stage.model_copy(update=lost)
    return stage


def refused(stage: StageStatus, by: Refused, limits: Limits, now: datetime) -> StageStatus:
    """The status of a stage whose attempt the platform would not make: that is waiting for a place, too."""
    stage = stage.model_copy(update={"reason": Reason.JOB_REFUSED, "message": by.words})
    late = limits.pending is not None and now - by.since >= limits.pending
    return _never_placed(stage, limits, now) if late else stage


def _settled(stage: StageStatus) -> bool:
    return stage.state.done or stage.state is StageState.FAILED


def accounted(stage: StageStatus) -> int:
    """The last attempt whose end the status has taken in; of a stage that is done or failed all that there may be."""
    if _settled(stage):
        return sys.maxsize
    return stage.attempt - 1 if stage.state in OPEN else stage.attempt


def _follow(stage: StageStatus, child: Child) -> StageStatus:
    return stage.model_copy(
        update={
            "state": StageState(child.state),
            "reason": child.cause,
            "message": child.message,
            "retry_time": None,
            "running_seconds": stage.running_seconds + child.interrupted.total_seconds(),
            **_trace(stage, child),
        }
    )


def _trace(stage: StageStatus, child: Child) -> dict[str, object]:
    known = stage.progress if child.attempt == stage.attempt else None
    return {
        "job": child.name,
        "attempt": child.attempt,
        "start_time": stage.start_time or child.start,
        "image": child.image or stage.image,
        "progress": child.progress or known,
        "checkpoint": child.checkpoint or stage.checkpoint,
    }


def _close(stage: StageStatus, child: Child, limits: Limits, now: datetime) -> StageStatus:
    """Take in how an attempt ended."""
    end = min(child.end or now, now)  # a node's clock may be ahead
    seconds = stage.running_seconds + (child.interrupted + deadline.ran(child, now)).total_seconds()
    stage = stage.model_copy(update={**_trace(stage, child), "running_seconds": seconds, "retry_time": None})
    result = child.termination.result if child.termination else None
    if child.state == "Succeeded" and result is not None:
        state = StageState.REUSED if result.reused else StageState.COMPLETE
        done = {"state": state, "reason": "", "message": "", "completion_time": end, "result": result}
        return stage.model_copy(update=done)
    verdict = retry.judge(child)
    failures = stage.failures + verdict.counted
    update = {"reason": verdict.reason, "message": verdict.message, "failures": failures}
    if verdict.final or failures > limits.retries:
        if not verdict.final:
            update["message"] = f"{verdict.message} (failed {failures} times, retries: {limits.retries})"
        return stage.model_copy(update={**update, "state": StageState.FAILED, "completion_time": end})
    time_left = deadline.left(limits.deadline, stage, None, now)
    if time_left is not None and time_left <= timedelta():
        return _out_of_time(stage, limits, now)
    pause = retry.wait(failures) if verdict.counted else retry.pause(child, stage.attempt - failures, now)
    wait_until = end + pause if pause else None
    return stage.model_copy(update={**update, "state": StageState.RETRYING, "retry_time": wait_until})


def _out_of_time(stage: StageStatus, limits: Limits, now: datetime) -> StageStatus:
    seconds = limits.deadline.total_seconds() if limits.deadline else 0
    message = f"ran for longer than activeDeadlineSeconds, {seconds:.0f}"
    over = {"state": StageState.FAILED, "reason": Reason.DEADLINE_EXCEEDED, "message": message, "completion_time": now}
    return stage.model_copy(update=over)


def _never_placed(stage: StageStatus, limits: Limits, now: datetime) -> StageStatus:
    seconds = limits.pending.total_seconds() if limits.pending else 0
    why = f": {stage.reason}: {stage.message}" if stage.reason else ""
    message = f"found no place to run within pendingDeadlineSeconds, {seconds:.0f}{why}"
    over = {"state": StageState.FAILED, "reason": Reason.PENDING_DEADLINE, "message": message, "completion_time": now}
    return stage.model_copy(update=over)
