"""What the caches keep. Templates hold whole stage files, and `kubectl apply` each spec once more, as an annotation:
megabytes for a few thousand jobs.
"""

from finetune_operator.kube.objects import Object
from finetune_operator.plan.pods import ATTEMPT_LABEL, STAGE_LABEL

_METADATA = (
    *("name", "namespace", "uid", "resourceVersion", "creationTimestamp", "labels", "generation"),
    *("deletionTimestamp", "deletionGracePeriodSeconds"),
)
_CONDITION = ("type", "status", "message", "lastTransitionTime")
_OWNER = ("kind", "name", "uid", "controller")


def finetunejob(obj: Object) -> Object:
    """A FineTuneJob without its annotations."""
    return {**obj, "metadata": _metadata(obj)}


def job(obj: Object) -> Object:
    """Of a Job what an attempt is judged by: they stay for as long as their FineTuneJob, all of them."""
    status = obj.get("status") or {}
    kept = {"startTime": status["startTime"]} if "startTime" in status else {}
    if conditions := status.get("conditions"):
        kept["conditions"] = [_only(condition, _CONDITION) for condition in conditions]
    metadata = _metadata(obj)
    metadata["labels"] = _only(metadata.get("labels") or {}, (STAGE_LABEL, ATTEMPT_LABEL))
    owners = metadata.get("ownerReferences") or ()
    metadata["ownerReferences"] = [_only(owner, _OWNER) for owner in owners if owner.get("controller")]
    spec = {"suspend": obj["spec"].get("suspend", False)}
    if (nodes := obj["spec"].get("completions", 1)) > 1:
        spec["completions"] = nodes
    return {"metadata": metadata, "spec": spec, "status": kept}


def pod(obj: Object) -> Object:
    """A pod without what only the kubelet needs."""
    spec = obj["spec"]
    containers = [{"name": c["name"], "image": c.get("image", "")} for c in spec["containers"]]
    kept = {"nodeName": spec.get("nodeName", ""), "containers": containers}
    return {**obj, "metadata": _metadata(obj), "spec": kept}


def _only(obj: Object, names: tuple[str, ...]) -> Object:
    return {name: obj[name] for name in names if name in obj}


def _metadata(obj: Object) -> Object:
    metadata = obj["metadata"]
    kept = _only(metadata, _METADATA)
    if owners := metadata.get("ownerReferences"):
        kept["ownerReferences"] = owners
    return kept
