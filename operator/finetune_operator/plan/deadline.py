"""``activeDeadlineSeconds``: the longest a stage may run, summed over its attempts; waiting does not count."""

from datetime import datetime, timedelta

from finetune_api.status import StageStatus
from finetune_operator.plan.children import Child


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
