"""The pods of one attempt: one for each node it runs on, the first of which speaks for all where all goes well."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from finetune_operator.kube.objects import Object
from finetune_operator.plan.pods import CONTAINER, INDEX_LABEL


def condition(holder: Object, kind: str) -> Object | None:
    """A Job's or a pod's condition of that type, if it is True."""
    conditions: Iterable[Object] = holder.get("status", {}).get("conditions") or ()
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def finished(job: Object) -> Object | None:
    """The condition by which a Job is over: none of its pods runs any more."""
    return condition(job, "Complete") or condition(job, "Failed")


def expected(job: Object) -> int:
    """How many there must be."""
    return int(job["spec"].get("completions") or 1)


def members(pods: Iterable[Object]) -> dict[int, Object]:
    """The youngest pod of each node, by its number. An earlier one was replaced when a queue took the place away."""
    ordered = sorted(pods, key=lambda p: str(p["metadata"].get("creationTimestamp", "")))
    return dict(sorted({index_of(pod): pod for pod in ordered}.items()))


def first(pods: Iterable[Object]) -> Object | None:
    """The one that leaves the result, tells the progress and is asked for the log."""
    return members(pods).get(0)


def index_of(pod: Object) -> int:
    """Which of the nodes it is on."""
    return int((pod["metadata"].get("labels") or {}).get(INDEX_LABEL, 0))


def phase(pod: Object) -> str:
    """Pending until all of its containers could be started."""
    return str(pod.get("status", {}).get("phase", "Pending"))


def alive(pod: Object) -> bool:
    """Something of it may still run, or come to run."""
    return phase(pod) not in ("Succeeded", "Failed")


def has_ended(pod: Object) -> bool:
    """This state of it is its last, and says how it ended."""
    return not alive(pod) or bool(terminated(pod))


def all_have_ended(job: Object, pods: Sequence[Object]) -> bool:
    """Nothing more is to be learnt of any."""
    found = members(pods)
    return len(found) >= expected(job) and all(map(has_ended, found.values()))


def container(pod: Object | None) -> Object:
    """What the kubelet says of the stage's container; empty before it says something."""
    statuses: Iterable[Object] = (pod or {}).get("status", {}).get("containerStatuses") or ()
    return next((s for s in statuses if s["name"] == CONTAINER), {})


def terminated(pod: Object | None) -> Object:
    """How its container ended; empty while it has not."""
    return container(pod).get("state", {}).get("terminated") or {}


def started(pod: Object) -> datetime | None:
    """When its container began to run."""
    state = container(pod).get("state", {})
    return time_of((state.get("running") or terminated(pod)).get("startedAt"))


def interruption(job: Object, deleted: Sequence[Object], pods: Sequence[Object]) -> tuple[timedelta, list[Object]]:
    """How long the attempt ran in pods that a queue took away, and those pods.

    ``deleted``: pods that are gone, each in its last state. The others of ``pods`` are what the attempt is now. A pod
    that is gone without having been replaced is how the attempt ends, unless the Job is held back.
    """
    held = job["spec"].get("suspend") and finished(job) is None
    now = {} if held else members(pods)
    replaced = [pod for pod in deleted if now.get(index_of(pod)) is not pod]
    spans = [_ran(pod) for pod in replaced if index_of(pod) == 0]  # the others ran beside it
    return sum(spans, timedelta()), replaced


def _ran(pod: Object) -> timedelta:
    begun = started(pod)
    end = time_of(terminated(pod).get("finishedAt")) or time_of(pod["metadata"].get("deletionTimestamp"))
    return max(timedelta(), end - begun) if begun is not None and end is not None else timedelta()


def time_of(text: str | None) -> datetime | None:
    """As the API server writes it."""
    return datetime.fromisoformat(text) if text else None
