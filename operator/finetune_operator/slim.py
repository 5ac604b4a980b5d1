"""What the caches keep. Templates hold whole stage files, and `kubectl apply` each spec once more, as an annotation:
megabytes for a few thousand jobs.
"""

from finetune_operator.kube.objects import Object

_METADATA = (
    *("name", "namespace", "uid", "resourceVersion", "creationTimestamp", "labels", "generation"),
    *("deletionTimestamp", "deletionGracePeriodSeconds"),
)


def finetunejob(obj: Object) -> Object:
    """A FineTuneJob without its annotations."""
    return {**obj, "metadata": _metadata(obj)}


def job(obj: Object) -> Object:
    """A Job without its pod template."""
    return {**obj, "metadata": _metadata(obj), "spec": {"suspend": obj["spec"].get("suspend", False)}}


def pod(obj: Object) -> Object:
    """A pod without what only the kubelet needs."""
    spec = obj["spec"]
    containers = [{"name": c["name"], "image": c.get("image", "")} for c in spec["containers"]]
    kept = {"nodeName": spec.get("nodeName", ""), "containers": containers}
    return {**obj, "metadata": _metadata(obj), "spec": kept}


def _metadata(obj: Object) -> Object:
    metadata = obj["metadata"]
    kept = {name: metadata[name] for name in _METADATA if name in metadata}
    if owners := metadata.get("ownerReferences"):
        kept["ownerReferences"] = owners
    return kept
