"""``plan``: from a job, its last status and its children to what should happen next. Pure, and safe to repeat.

Status is the ledger: a stage that is recorded as done never runs again, whatever became of its child. All the rest is
worked out afresh from the children each time, so that a lost status write, a crash between two actions or an event that
comes twice only means that the same wishes are said again, under the same names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from types import MappingProxyType

from finetune_api.pipeline import order, waits_for
from finetune_api.status import JobStatus, Reason, StageState, StageStatus
from finetune_api.types import FineTuneJob
from finetune_operator.plan import attempts, ttl
from finetune_operator.plan.attempts import Limits, current, limits, observe
from finetune_operator.plan.children import Child, NewChild, Plan, Refused
from finetune_operator.plan.deadline import left, pending
from finetune_operator.plan.jobs import child_name, new_child
from finetune_operator.plan.retry import LONGEST_WAIT
from finetune_operator.plan.reuse import reuse
from finetune_operator.plan.rules import check
from finetune_operator.plan.status import begin, condition, holds, invalid, settle, with_condition
from finetune_operator.plan.suspend import suspend

__all__ = ["Child", "NewChild", "Plan", "plan"]

_STARTABLE = (StageState.WAITING, StageState.RETRYING, StageState.SUSPENDED)


def plan(
    job: FineTuneJob,
    status: JobStatus,
    children: Sequence[Child],
    now: datetime,
    *,
    cluster: bool = False,
    refused: Mapping[str, Refused] = MappingProxyType({}),
) -> Plan:
    """What to start, what to stop, and the status to record before doing so.

    ``children`` are all attempts that the shell can still see, ended ones too. With ``cluster``, a job whose sources
    pods cannot reach is refused. ``refused``: children that the platform would not make, by name.
    """
    return replace(_plan(job, status, children, now, cluster, refused), forget=_superseded(children))


def _plan(
    job: FineTuneJob,
    status: JobStatus,
    children: Sequence[Child],
    now: datetime,
    cluster: bool,
    refused: Mapping[str, Refused],
) -> Plan:
    generation = job.metadata.generation
    live = [child for child in children if not child.ended]
    stop_all = [child.name for child in live if not child.deleting]
    if holds(status, "Complete") or holds(status, "Failed"):
        status = status.model_copy(update={"observed_generation": generation})
        rest = ttl.left(job, status, now)
        expired = rest is not None and rest <= timedelta()
        return Plan([], stop_all, status, None if expired else rest, expired)
    if not _accepted(job, status):
        if errors := check(job, cluster=cluster):
            return Plan([], stop_all, invalid(generation, status, errors, now), None)
        status = with_condition(status, generation, now, "Accepted", True, Reason.VALID)

    status = begin(job, status)
    of = {name: [child for child in children if child.stage == name] for name in order(job.spec)}
    bounds = {name: limits(job.spec, name) for name in of}
    stages = {s.name: observe(s, of[s.name], bounds[s.name], now) for s in status.stages}
    for name, stage in stages.items():
        if stage.state is StageState.PENDING and stage.job in refused and not current(stage, of[name]):
            stages[name] = attempts.refused(stage, refused[stage.job], bounds[name], now)
    stages = reuse(job.spec, stages, of["prepare"])
    ended = settle(job, status, list(stages.values()), now)
    if holds(ended, "Failed") or holds(ended, "Complete"):
        return Plan([], stop_all, settle(job, ended, [_stopped(s) for s in stages.values()], now), None)

    if job.spec.suspend:
        stages = suspend(stages, {child.stage for child in live})
        names = ", ".join(child.name for child in live)
        words = f"waiting for {names}" if live else "nothing runs: set spec.suspend to false to go on"
        status = with_condition(status, generation, now, "Suspended", not live, Reason.SUSPENDED, words)
        return Plan([], stop_all, settle(job, status, list(stages.values()), now), None)
    if condition(status, "Suspended") is not None:
        words = "goes on from the last checkpoint"
        status = with_condition(status, generation, now, "Suspended", False, Reason.RESUMED, words)

    running = {name: current(stages[name], of[name]) for name in of}
    strays = [c.name for c in live if c != running.get(c.stage) and not c.deleting]
    busy = {child.stage for child in live}
    before, passed = {stage.name: stage for stage in status.stages}, []
    for name, stage in stages.items():
        if name not in busy and stage.state in _STARTABLE and _ready(job, stages, name) and _due(stage, now):
            if stage.state is StageState.RETRYING and before[name].state is not StageState.RETRYING:
                passed.append(stage)
            stages[name] = fresh = _next_attempt(job, stage)
            if fresh.job in refused:
                stages[name] = attempts.refused(fresh, refused[fresh.job], bounds[name], now)
    # A stage that is Pending without a child is wished for again: the shell may have died before it started it.
    wished = [n for n, s in stages.items() if s.state in (StageState.PENDING, StageState.QUEUED) and n not in busy]
    create = [new_child(job, stages, name) for name in wished]
    status = settle(job, status, list(stages.values()), now)
    return Plan(create, strays, status, _look_again(stages, running, bounds, now), passed=passed)


def _superseded(children: Sequence[Child]) -> list[str]:
    """The attempts before the last that ended: that one's log is what people look for."""
    ended = [child for child in children if child.ended]
    last = {child.stage: child.attempt for child in sorted(ended, key=lambda child: child.attempt)}
    return [child.name for child in ended if child.attempt < last[child.stage] and not child.deleting]


def _accepted(job: FineTuneJob, status: JobStatus) -> bool:
    """The rules were held against this very spec already."""
    accepted = condition(status, "Accepted")
    here = accepted is not None and accepted.observed_generation == job.metadata.generation
    return here and holds(status, "Accepted")


def _ready(job: FineTuneJob, stages: dict[str, StageStatus], name: str) -> bool:
    return all(stages[earlier].state.done for earlier in waits_for(job.spec, name))


def _due(stage: StageStatus, now: datetime) -> bool:
    # One that is further off than any wait was written by a clock that has been put right since.
    return stage.retry_time is None or not timedelta() < stage.retry_time - now <= LONGEST_WAIT


def _next_attempt(job: FineTuneJob, stage: StageStatus) -> StageStatus:
    attempt = stage.attempt + 1
    return stage.model_copy(
        update={
            "state": StageState.PENDING,
            "attempt": attempt,
            "job": child_name(job, stage.name, attempt),
            "reason": "",
            "message": "",
            "retry_time": None,
            "progress": None,  # of the one before; its checkpoint is where this one begins
        }
    )


def _stopped(stage: StageStatus) -> StageStatus:
    """How a stage is left behind when another one has failed for good."""
    if stage.state.done or stage.state in (StageState.FAILED, StageState.WAITING):
        return stage
    return stage.model_copy(update={"state": StageState.WAITING, "reason": Reason.SIBLING_FAILED, "message": ""})


def _look_again(
    stages: dict[str, StageStatus], running: dict[str, Child | None], bounds: dict[str, Limits], now: datetime
) -> timedelta | None:
    """The nearest moment at which time alone changes something."""
    # What is due but has to wait for the end of a stray is told of that end.
    retries = [s.retry_time - now for s in stages.values() if s.retry_time is not None and not _due(s, now)]
    at_work = [(name, child) for name, child in running.items() if child]
    deadlines = [left(bounds[name].deadline, stages[name], child, now) for name, child in at_work]
    places = [pending(bounds[name].pending, child, now) for name, child in at_work]
    waits = [*retries, *(wait for wait in (*deadlines, *places) if wait is not None)]
    return max(timedelta(), min(waits)) if waits else None
