"""Kubernetes objects as they come: plain dicts, and the few facts that everything here needs of them."""

from typing import Any

Object = dict[str, Any]
"""As the API server's JSON decodes."""


def key_of(obj: Object) -> str:
    """``namespace/name``, or ``name`` for what has no namespace, as in client-go."""
    metadata = obj["metadata"]
    return key_for(metadata.get("namespace"), metadata["name"])


def key_for(namespace: str | None, name: str) -> str:
    """The key of the object of that name."""
    return f"{namespace}/{name}" if namespace else name


def split_key(key: str) -> tuple[str, str]:
    """Namespace (empty without one) and name."""
    namespace, _, name = key.rpartition("/")
    return namespace, name


def uid_of(obj: Object) -> str:
    """What tells an object from a later one of the same name; empty for one that was never on a server."""
    return str(obj["metadata"].get("uid", ""))


def controller_of(obj: Object) -> Object | None:
    """The reference to the owner that controls it; None without one."""
    return next((owner for owner in obj["metadata"].get("ownerReferences") or () if owner.get("controller")), None)


def controller_uid(obj: Object) -> str:
    """The uid of the owner that controls it; empty without one."""
    owner = controller_of(obj)
    return str(owner["uid"]) if owner else ""
