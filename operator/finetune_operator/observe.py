"""A Job and its pods as ``plan`` sees them: a ``Child``, with the platform's reasons in words a user can act on.

Pure functions over plain objects as the API server gives them. Of several pods that failed the one is believed that
failed first for a reason of its own: the others only lost it.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Literal

from finetune_api.stage import Termination
from finetune_api.status import CheckpointStatus, Progress, Reason
from finetune_operator import waiting
from finetune_operator.kube.objects import Object
from finetune_operator.members import (
    condition,
    container,
    expected,
    finished,
    first,
    has_ended,
    members,
    phase,
    started,
)
from finetune_operator.members import terminated as ended_of
from finetune_operator.members import time_of as _time
from finetune_operator.plan.children import Child
from finetune_operator.plan.pods import ATTEMPT_LABEL, STAGE_LABEL

_TOLD = re.compile(r"[Pp]od \S+/(?P<pod>\S+) (?:failed with exit code (?P<code>\d+)|has condition DisruptionTarget) ")
"""Which pod made the Job controller end the Job, and by what."""
_NOT_ITS_OWN = (0, 75, 76, 143)
"""Exit codes of who was told to stop, or lost another."""
_LAST_WORDS = 1000
"""Of a log that takes the place of a termination message."""


def child_of(
    job: Object,
    pods: Sequence[Object],
    *,
    warning: str = "",
    progress: Progress | None = None,
    checkpoint: CheckpointStatus | None = None,
    interrupted: timedelta = timedelta(),
) -> Child:
    """The attempt that a Job is.

    ``pods``: all of the Job's that were ever seen, deleted ones in their last state. ``warning``: what the latest
    warning Event on what holds it up says. ``progress``, ``checkpoint``: as last reported. ``interrupted``: as
    ``members.interruption`` says.
    """
    labels = job["metadata"]["labels"]
    state = _state(job, pods)
    over = state in ("Succeeded", "Failed")
    speaker = _root(job, pods) if state == "Failed" else first(pods)
    ended = ended_of(speaker)
    cause, message = _why(job, pods, speaker, state, warning)
    shown = container(first(pods))
    return Child(
        name=job["metadata"]["name"],
        stage=labels[STAGE_LABEL],
        attempt=int(labels[ATTEMPT_LABEL]),
        state=state,
        exit_code=_exit_code(job, speaker) if over else None,
        cause=cause,
        message=message,
        termination=_termination(ended) if over else None,
        start=_start(pods) if state != "Queued" else None,
        interrupted=interrupted,
        end=(_time(ended.get("finishedAt")) or _finished(job)) if over else None,
        since=_since(job) if state == "Pending" and "deletionTimestamp" not in job["metadata"] else None,
        image=shown.get("imageID", "") or shown.get("image", ""),
        progress=progress,
        checkpoint=checkpoint,
        deleting="deletionTimestamp" in job["metadata"],
    )


def gone(job: Object, pods: Sequence[Object]) -> Child:
    """The attempt that a deleted Job was: over, however its last pods stood when they were last seen."""
    child = child_of(job, pods)
    if child.ended:
        return child
    done = ended_of(first(pods)).get("exitCode") == 0
    ended = ended_of(first(pods) if done else _root(job, pods))
    return Child(
        name=child.name,
        stage=child.stage,
        attempt=child.attempt,
        state="Succeeded" if done else "Failed",
        exit_code=ended.get("exitCode"),
        # Whatever it waited for before: it is the deletion that ended it.
        cause="DisruptionTarget",
        message=f"{child.name} was deleted",
        termination=_termination(ended),
        start=child.start,
        end=_time(ended.get("finishedAt")) or _time(job["metadata"].get("deletionTimestamp")),
        image=child.image,
        deleting=True,
    )


def _state(job: Object, pods: Sequence[Object]) -> Literal["Queued", "Pending", "Running", "Succeeded", "Failed"]:
    if finished(job) is not None:
        return "Succeeded" if condition(job, "Complete") else "Failed"
    if job["spec"].get("suspend"):
        return "Queued"
    # Decided, but not over: pods are being ended, and some may be gone already.
    decided = condition(job, "FailureTarget") or condition(job, "SuccessCriteriaMet")
    found = members(pods)
    if not decided and (len(found) < expected(job) or any(phase(pod) == "Pending" for pod in found.values())):
        return "Pending"
    # A pod that has ended is still the Job controller's to judge.
    return "Running"


def _start(pods: Sequence[Object]) -> datetime | None:
    """When the last of them began: the first ones only wait for it."""
    times = [started(pod) for pod in members(pods).values()]
    known = [time for time in times if time is not None]
    return max(known) if known and len(known) == len(times) else None


def _since(job: Object) -> datetime | None:
    """Since when it waits for a place. The Job controller says so only once it could make a pod."""
    status = job.get("status", {})
    conditions: Iterable[Object] = status.get("conditions") or ()
    resumed = next((c["lastTransitionTime"] for c in conditions if c["type"] == "Suspended"), None)
    return _time(status.get("startTime") or resumed or job["metadata"].get("creationTimestamp"))


# ---------------------------------------------------------------- how it ended


def _root(job: Object, pods: Sequence[Object]) -> Object | None:
    """The pod whose end explains the attempt's. None: it is gone, and only the Job says how it ended."""
    found = members(pods).values()
    told = _told(job)
    is_gone = told is not None and told["pod"] not in map(_name, found)
    if told is not None and is_gone and (told["code"] is None or int(told["code"]) not in _NOT_ITS_OWN):
        return None
    failed = [pod for pod in found if ended_of(pod).get("exitCode") != 0] or found
    own = [pod for pod in failed if _has_own_reason(pod)]
    # Kubernetes counts whole seconds: of two ends in one, a bug may be what the other made of it.
    return min(own or failed, key=lambda pod: (_end(pod), ended_of(pod).get("exitCode") == 70), default=None)


def _told(job: Object) -> re.Match[str] | None:
    return _TOLD.search(str((condition(job, "Failed") or {}).get("message", "")))


def _has_own_reason(pod: Object) -> bool:
    """It was disrupted, refused, evicted, or failed by itself."""
    if condition(pod, "DisruptionTarget") is not None or (phase(pod) == "Failed" and not ended_of(pod)):
        return True
    code = ended_of(pod).get("exitCode", 0)
    return code not in _NOT_ITS_OWN and not (code == 137 and _was_asked_to_end(pod))


def _end(pod: Object) -> str:
    """When it ended, was disrupted, or was asked to end; in UTC, so that the text can be compared."""
    meta = pod["metadata"]
    disrupted = (condition(pod, "DisruptionTarget") or {}).get("lastTransitionTime")
    told = ended_of(pod).get("finishedAt") or disrupted or meta.get("deletionTimestamp")
    return str(told or meta.get("creationTimestamp", ""))


def _why(job: Object, pods: Sequence[Object], speaker: Object | None, state: str, warning: str) -> tuple[str, str]:
    """The platform's reason for a Child's state, and its words."""
    if state == "Queued":
        return "", ""
    if state == "Pending":
        return waiting.why(job, pods, warning)
    if state == "Running":
        lost = next((pod for pod in members(pods).values() if _is_lost(pod)), None)
        return (Reason.NODE_LOST, _lost(lost)) if lost is not None else ("", "")
    if state == "Succeeded":
        if speaker is not None and has_ended(speaker):
            return "", ""
        return "DisruptionTarget", "its pod was deleted before it could be read what it left: the next attempt finds it"
    disruption = condition(speaker, "DisruptionTarget") if speaker is not None else None
    told = _told(job)
    by_job = told is not None and told["code"] is None and (speaker is None or told["pod"] == _name(speaker))
    if disruption is not None or by_job:
        return "DisruptionTarget", str((disruption or {}).get("message", ""))
    status = (speaker or {}).get("status", {})
    if status.get("reason") == "Evicted":
        return "Evicted", f"{status.get('message', '')}: give it more by resources.workspace.size"
    ended = ended_of(speaker)
    if ended.get("reason") == "OOMKilled":
        return "OOMKilled", "killed at its memory limit: give it more by resources.memory, or train on less at a time"
    if ended.get("exitCode") in (75, 143) and _was_asked_to_end(speaker):
        return "DisruptionTarget", "its pod was deleted"
    if ended.get("exitCode") == 137 and _was_asked_to_end(speaker):
        return "DisruptionTarget", "its pod was deleted, and did not end within its grace period"
    if not ended and _exit_code(job, speaker) is None:
        if speaker is not None and status.get("phase") == "Failed":
            return "PodRefused", f"{status.get('reason', '')}: {status.get('message', '')}".strip(": ")
        return "DisruptionTarget", "its pod was deleted"
    return "", ""


def _was_asked_to_end(pod: Object | None) -> bool:
    """It was deleted before its container ended, not after."""
    meta = (pod or {}).get("metadata", {})
    deadline = _time(meta.get("deletionTimestamp"))
    end = _time(ended_of(pod).get("finishedAt"))
    if deadline is None or end is None:
        return False
    return end >= deadline - timedelta(seconds=meta.get("deletionGracePeriodSeconds", 0))


def _is_lost(pod: Object) -> bool:
    disruption = condition(pod, "DisruptionTarget") or {}
    return "deletionTimestamp" in pod["metadata"] and disruption.get("reason") == "DeletionByTaintManager"


def _lost(pod: Object) -> str:
    node = pod["spec"].get("nodeName", "")
    return (
        f"node {node} does not answer, and Kubernetes cannot know whether the stage still runs there: "
        f"bring it back, or `kubectl delete node {node}`, and the stage goes on elsewhere"
    )


def _exit_code(job: Object, pod: Object | None) -> int | None:
    if (code := ended_of(pod).get("exitCode")) is not None:
        return int(code)
    # The pod is gone: the condition keeps what its FailJob rule matched.
    told = _told(job)
    ours = told is not None and (pod is None or told["pod"] == _name(pod))
    return int(told["code"]) if told is not None and ours and told["code"] is not None else None


def _name(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def _termination(ended: Object) -> Termination | None:
    """What the stage said; of one that died without a word, the end of its log."""
    said = str(ended.get("message") or "")
    if not said:
        return None
    try:
        return Termination.model_validate_json(said)
    except ValueError:
        return Termination(error=said[-_LAST_WORDS:])


def _finished(job: Object) -> datetime | None:
    over = finished(job)
    return _time(over.get("lastTransitionTime")) if over else None
