"""``suspend: true``: running stages save and stop, nothing starts; false goes on from their checkpoints."""

from collections.abc import Collection

from finetune_api.status import Reason, StageState, StageStatus

_STARTED = (StageState.QUEUED, StageState.PENDING, StageState.RUNNING, StageState.RETRYING)


def suspend(stages: dict[str, StageStatus], live: Collection[str]) -> dict[str, StageStatus]:
    """The stages with those Suspended that had begun; ``live`` are the ones with a child that has not ended yet."""
    return {name: _suspended(stage, name in live) for name, stage in stages.items()}


def _suspended(stage: StageStatus, live: bool) -> StageStatus:
    if stage.state not in _STARTED:
        return stage
    if live:
        return stage.model_copy(update={"reason": Reason.SUSPENDED, "message": "saving its state, then stopping"})
    # What is not there now is taken as never started: if it shows up after all, it is a stray and is stopped.
    # A failure's wait goes on; who only was interrupted goes on at once when the user says so.
    retry_time = None if stage.reason == Reason.PREEMPTED else stage.retry_time
    done = {"state": StageState.SUSPENDED, "reason": Reason.SUSPENDED, "message": "", "retry_time": retry_time}
    return stage.model_copy(update=done)
