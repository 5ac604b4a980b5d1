"""What the caches keep of Jobs and pods. Their templates hold whole stage files: megabytes for a few thousand jobs."""

from finetune_operator.kube.objects import Object

_METADATA = (
    *("name", "namespace", "uid", "resourceVersion", "creationTimestamp", "labels"),
    *("deletionTimestamp", "deletionGracePeriodSeconds"),
)


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
    return {**kept, "ownerReferences": metadata.get("ownerReferences") or []}
