"""A Job and its pods as ``plan`` sees them: a ``Child``, with the platform's reasons in words a user can act on.

Pure functions over plain objects as the API server gives them.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Literal

from finetune_api.stage import Termination
from finetune_api.status import CheckpointStatus, Progress, Reason
from finetune_operator.kube.objects import Object
from finetune_operator.plan.children import Child
from finetune_operator.plan.pods import ATTEMPT_LABEL, CONTAINER, STAGE_LABEL

_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_EXIT_CODE = re.compile(r"failed with exit code (\d+) matching")
_LAST_WORDS = 1000
"""Of a log that takes the place of a termination message."""


def child_of(
    job: Object,
    pods: Sequence[Object],
    *,
    warning: str = "",
    progress: Progress | None = None,
    checkpoint: CheckpointStatus | None = None,
) -> Child:
    """The attempt that a Job is.

    ``pods``: all of the Job's that were ever seen, deleted ones in their last state. ``warning``: what the latest
    warning Event on the Job, or on a pod that does not start, says. ``progress``, ``checkpoint``: as last reported.
    """
    labels = job["metadata"]["labels"]
    pod = max(pods, key=lambda p: p["metadata"].get("creationTimestamp", ""), default=None)
    state = _state(job, pod)
    container = _container(pod)
    ended = container.get("state", {}).get("terminated") or {}
    started = (container.get("state", {}).get("running") or ended).get("startedAt")
    cause, message = _why(job, pod, state, warning)
    return Child(
        name=job["metadata"]["name"],
        stage=labels[STAGE_LABEL],
        attempt=int(labels[ATTEMPT_LABEL]),
        state=state,
        exit_code=_exit_code(job, ended) if state in ("Succeeded", "Failed") else None,
        cause=cause,
        message=message,
        termination=_termination(ended) if state in ("Succeeded", "Failed") else None,
        start=_time(started),
        end=(_time(ended.get("finishedAt")) or _finished(job)) if state in ("Succeeded", "Failed") else None,
        since=_since(job) if state == "Pending" else None,
        image=container.get("imageID", "") or container.get("image", ""),
        progress=progress,
        checkpoint=checkpoint,
        deleting="deletionTimestamp" in job["metadata"],
    )


def condition(holder: Object, kind: str) -> Object | None:
    """A Job's or a pod's condition of that type, if it is True."""
    conditions: Iterable[Object] = holder.get("status", {}).get("conditions") or ()
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def finished(job: Object) -> Object | None:
    """The condition by which a Job is over: none of its pods runs any more."""
    return condition(job, "Complete") or condition(job, "Failed")


def alive(pod: Object) -> bool:
    """Something of it may still run, or come to run."""
    return pod.get("status", {}).get("phase", "Pending") not in ("Succeeded", "Failed")


def has_ended(pod: Object) -> bool:
    """This state of it is its last, and says how it ended."""
    return not alive(pod) or "terminated" in _container(pod).get("state", {})


def gone(job: Object, pods: Sequence[Object]) -> Child:
    """The attempt that a deleted Job was: over, however its last pod stood when it was last seen."""
    child = child_of(job, pods)
    if child.ended:
        return child
    pod = max(pods, key=lambda p: p["metadata"].get("creationTimestamp", ""), default=None)
    ended = _container(pod).get("state", {}).get("terminated") or {}
    return Child(
        name=child.name,
        stage=child.stage,
        attempt=child.attempt,
        state="Succeeded" if ended.get("exitCode") == 0 else "Failed",
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


def _state(job: Object, pod: Object | None) -> Literal["Queued", "Pending", "Running", "Succeeded", "Failed"]:
    if finished(job) is not None:
        return "Succeeded" if condition(job, "Complete") else "Failed"
    if job["spec"].get("suspend"):
        return "Queued"
    if pod is None or pod.get("status", {}).get("phase", "Pending") == "Pending":
        return "Pending"
    # A pod that has ended is still the Job controller's to judge.
    return "Running"


def _since(job: Object) -> datetime | None:
    """Since when it waits for a place. The Job controller says so only once it could make a pod."""
    status = job.get("status", {})
    conditions: Iterable[Object] = status.get("conditions") or ()
    resumed = next((c["lastTransitionTime"] for c in conditions if c["type"] == "Suspended"), None)
    return _time(status.get("startTime") or resumed or job["metadata"].get("creationTimestamp"))


def _container(pod: Object | None) -> Object:
    statuses: Iterable[Object] = (pod or {}).get("status", {}).get("containerStatuses") or ()
    return next((s for s in statuses if s["name"] == CONTAINER), {})


def _why(job: Object, pod: Object | None, state: str, warning: str) -> tuple[str, str]:
    """The platform's reason for a Child's state, and its words."""
    if state == "Queued":
        return "", ""
    if state == "Pending":
        return _waiting(pod, warning)
    disruption = condition(pod, "DisruptionTarget") if pod is not None else None
    if state == "Running":
        lost = pod is not None and disruption is not None and "deletionTimestamp" in pod["metadata"]
        if lost and disruption is not None and disruption.get("reason") == "DeletionByTaintManager":
            return Reason.NODE_LOST, _lost(pod or {})
        return "", ""
    if state == "Succeeded":
        if pod is not None and has_ended(pod):
            return "", ""
        return "DisruptionTarget", "its pod was deleted before it could be read what it left: the next attempt finds it"
    over = condition(job, "Failed") or {}
    said = str(over.get("message", ""))
    if disruption is not None or "has condition DisruptionTarget" in said:
        return "DisruptionTarget", str((disruption or {}).get("message", ""))
    status = (pod or {}).get("status", {})
    if status.get("reason") == "Evicted":
        return "Evicted", f"{status.get('message', '')}: give it more by resources.workspace.size"
    ended = _container(pod).get("state", {}).get("terminated") or {}
    if ended.get("reason") == "OOMKilled":
        return "OOMKilled", "killed at its memory limit: give it more by resources.memory, or train on less at a time"
    if ended.get("exitCode") == 137 and _was_asked_to_end(pod):
        return "DisruptionTarget", "its pod was deleted, and did not end within its grace period"
    if not ended and _exit_code(job, ended) is None:
        if pod is not None and status.get("phase") == "Failed":
            return "PodRefused", f"{status.get('reason', '')}: {status.get('message', '')}".strip(": ")
        return "DisruptionTarget", "its pod was deleted"
    return "", ""


def _was_asked_to_end(pod: Object | None) -> bool:
    """It was deleted before its container ended, not after."""
    meta = (pod or {}).get("metadata", {})
    deadline = _time(meta.get("deletionTimestamp"))
    end = _time(((_container(pod).get("state") or {}).get("terminated") or {}).get("finishedAt"))
    if deadline is None or end is None:
        return False
    return end >= deadline - timedelta(seconds=meta.get("deletionGracePeriodSeconds", 0))


def _waiting(pod: Object | None, warning: str) -> tuple[str, str]:
    """Why an attempt does not run yet."""
    if pod is None:
        return (Reason.POD_REFUSED, warning) if warning else ("", "")
    status = pod.get("status", {})
    unplaced = next(
        (c for c in status.get("conditions") or () if c["type"] == "PodScheduled" and c["status"] == "False"), None
    )
    if unplaced is not None:
        return Reason.UNSCHEDULABLE, str(unplaced.get("message", ""))
    waiting = _container(pod).get("state", {}).get("waiting") or {}
    reason, said = waiting.get("reason", ""), str(waiting.get("message", ""))
    if reason in _IMAGE_REASONS:
        image = _container(pod).get("image") or pod["spec"]["containers"][0]["image"]
        return Reason.IMAGE_PULL, f"{image}: {said or reason}"
    if reason == "CreateContainerConfigError":
        return Reason.SECRET_MISSING, f"{said}: create it in the namespace, the pod goes on by itself"
    if reason in ("CreateContainerError", "RunContainerError", "StartError"):
        return Reason.STARTING, f"{reason}: {said}"
    return Reason.STARTING, warning


def _lost(pod: Object) -> str:
    node = pod["spec"].get("nodeName", "")
    return (
        f"node {node} does not answer, and Kubernetes cannot know whether the stage still runs there: "
        f"bring it back, or `kubectl delete node {node}`, and the stage goes on elsewhere"
    )


def _exit_code(job: Object, ended: Object) -> int | None:
    if (code := ended.get("exitCode")) is not None:
        return int(code)
    # The pod is gone: the condition keeps what its FailJob rule matched.
    matched = _EXIT_CODE.search(str((condition(job, "Failed") or {}).get("message", "")))
    return int(matched[1]) if matched else None


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


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
