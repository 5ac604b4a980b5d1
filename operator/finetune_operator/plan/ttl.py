"""``ttlSecondsAfterFinished``: how long the record of a finished job stays. Unset: for good."""

from datetime import datetime, timedelta

from finetune_api.status import JobStatus
from finetune_api.types import FineTuneJob
from finetune_operator.plan.deadline import span
from finetune_operator.plan.status import condition


def left(job: FineTuneJob, status: JobStatus, now: datetime) -> timedelta | None:
    """What a finished job's record has left, zero or less once it is over; None: it stays."""
    limit = span(job.spec.ttl_seconds_after_finished)
    ends = [c.last_transition_time for kind in ("Complete", "Failed") if (c := condition(status, kind)) is not None]
    return limit - (now - max(ends)) if limit is not None and ends else None
