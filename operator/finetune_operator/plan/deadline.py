"""How long a stage may run (``activeDeadlineSeconds``, summed over its attempts) or wait for a place to
(``pendingDeadlineSeconds``, each attempt anew; time in a queue does not count)."""

from datetime import datetime, timedelta

from finetune_api.status import StageStatus
from finetune_operator.plan.children import Child


def span(seconds: int | None) -> timedelta | None:
    """A limit as the spec gives it; None where there is none."""
    return None if seconds is None else timedelta(seconds=seconds)


def ran(child: Child, now: datetime) -> timedelta:
    """How long the attempt has been running, or ran."""
    if child.start is None:
        return timedelta()
    return max(timedelta(), (child.end or now) - child.start)


def left(limit: timedelta | None, stage: StageStatus, child: Child | None, now: datetime) -> timedelta | None:
    """What the stage may still run, zero or less once it is over; None without a limit."""
    if limit is None:
        return None
    return limit - timedelta(seconds=stage.running_seconds) - (ran(child, now) if child else timedelta())


def pending(limit: timedelta | None, child: Child, now: datetime) -> timedelta | None:
    """What the attempt may still wait, zero or less once it is over; None if it does not wait, or has no limit."""
    if limit is None or child.since is None or child.state != "Pending":
        return None
    return limit - (now - child.since)
