"""Why an attempt does not run yet, in words a user can act on: of several pods the one that keeps it longest."""

from collections.abc import Sequence

from finetune_api.status import Reason
from finetune_operator.kube.objects import Object
from finetune_operator.members import container, expected, members, phase

_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_WORST_FIRST = (Reason.POD_REFUSED, Reason.UNSCHEDULABLE, Reason.IMAGE_PULL, Reason.SECRET_MISSING, Reason.STARTING, "")
"""What somebody has to mend, before what goes on by itself."""


def holds_up(job: Object, pods: Sequence[Object]) -> Object:
    """Whose Events tell why: the Job itself while a pod cannot be made, else a pod."""
    return _worst(job, pods)[1] or job


def why(job: Object, pods: Sequence[Object], warning: str) -> tuple[str, str]:
    """The reason and the words. ``warning``: the latest of the Events of ``holds_up``."""
    index, pod = _worst(job, pods)
    cause, words = _of(pod, warning)
    if words and expected(job) > 1:
        words = f"pod {index} of {expected(job)}: {words}"
    return cause, words


def _worst(job: Object, pods: Sequence[Object]) -> tuple[int, Object | None]:
    found = members(pods)
    missing: dict[int, Object | None] = {i: None for i in range(expected(job)) if i not in found}
    if missing:  # the Job controller makes all at once, unless it is refused
        return min(missing), None
    pending = {i: pod for i, pod in found.items() if phase(pod) == "Pending"}
    return min(pending.items(), key=lambda item: _WORST_FIRST.index(_of(item[1], "")[0]), default=(0, None))


def _of(pod: Object | None, warning: str) -> tuple[str, str]:
    if pod is None:
        return (Reason.POD_REFUSED, warning) if warning else ("", "")
    status = pod.get("status", {})
    unplaced = next(
        (c for c in status.get("conditions") or () if c["type"] == "PodScheduled" and c["status"] == "False"), None
    )
    if unplaced is not None:
        return Reason.UNSCHEDULABLE, str(unplaced.get("message", ""))
    waiting = container(pod).get("state", {}).get("waiting") or {}
    reason, said = waiting.get("reason", ""), str(waiting.get("message", ""))
    if reason in _IMAGE_REASONS:
        image = container(pod).get("image") or pod["spec"]["containers"][0]["image"]
        return Reason.IMAGE_PULL, f"{image}: {said or reason}"
    if reason == "CreateContainerConfigError":
        return Reason.SECRET_MISSING, f"{said}: create it in the namespace, the pod goes on by itself"
    if reason in ("CreateContainerError", "RunContainerError", "StartError"):
        return Reason.STARTING, f"{reason}: {said}"
    return Reason.STARTING, warning
