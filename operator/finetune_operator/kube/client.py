"""The few verbs that controllers need, on plain dicts.

>>> async with await Client.connect() as client:
...     job = await client.get(JOBS, "default", "sft-1")
"""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune_operator.kube.credentials import Credentials
from finetune_operator.kube.errors import UnreachableError, from_status
from finetune_operator.kube.metrics import Metrics
from finetune_operator.kube.objects import Object
from finetune_operator.kube.settings import HTTPSettings
from finetune_operator.kube.transport import Fence, Transport

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
APPLY = "application/apply-patch+yaml"


@dataclass(frozen=True)
class Resource:
    """A kind, as URLs name it: ``Resource("batch", "v1", "jobs")``; the core group is ``""``."""

    group: str
    version: str
    plural: str
    namespaced: bool = True

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """The URL's path; without ``name`` that of the list, without ``namespace`` that of all namespaces."""
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        elif self.namespaced and name:
            raise ValueError(f"{self} {name}: a namespace is needed")
        parts += [self.plural, *([name] if name else []), *([subresource] if subresource else [])]
        return "/" + "/".join(quote(part, safe="") for part in parts)


@dataclass(frozen=True)
class Page:
    """Part of a list."""

    items: list[Object]
    resource_version: str
    """Of the whole list: where a watch goes on from."""


@dataclass(frozen=True)
class Client:
    """Access to one cluster. Safe to use from all tasks of one event loop; all errors are KubeErrors.

    Returned objects are the caller's own. Reads are tried again by themselves, writes only where the server surely did
    not carry them out (``HTTPSettings.attempts``). One exception: a PUT or DELETE on a connection that turns out to be
    dead is sent once more on a new one by aiohttp, which their preconditions (resourceVersion, uid) make harmless.
    """

    transport: Transport
    fence: Fence | None = None
    """Asked before each write; raises NotLeadingError to forbid it."""
    attempts: int | None = None
    """Other than the settings say."""

    @classmethod
    async def connect(
        cls,
        kubeconfig: str | Path | None = None,
        context: str | None = None,
        *,
        settings: HTTPSettings | None = None,
        metrics: Metrics | None = None,
    ) -> "Client":
        """Read the configuration: ``kubeconfig``, else $KUBECONFIG, the pod's service account, ~/.kube/config.

        Nothing is sent yet. Raises CredentialsError if there is no configuration or it cannot be read.
        """
        settings = settings or HTTPSettings()
        credentials = Credentials(kubeconfig, context, settings.refresh)
        await credentials.current()
        return cls(Transport(credentials, settings, metrics or Metrics()))

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, those of the clients made from this one too."""
        await self.transport.close()

    def fenced(self, fence: Fence) -> "Client":
        """The same, but no write goes out unless ``fence()`` returns: ``client.fenced(elector.check)``."""
        return Client(self.transport, fence, self.attempts)

    def without_retries(self) -> "Client":
        """The same, but each request is sent once."""
        return Client(self.transport, self.fence, 1)

    async def namespace(self) -> str:
        """That of the kubeconfig's context, or of the pod we run in."""
        return (await self.transport.access()).namespace

    # -- reading

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """One object. Raises NotFoundError."""
        return await self.transport.request("GET", resource.path(namespace, name), attempts=self.attempts)

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
    ) -> list[Object]:
        """All of them, in memory: for the few (events of one object). A ``Reflector`` is for the many."""
        found: list[Object] = []
        pages = self.pages(resource, namespace, label_selector=label_selector, field_selector=field_selector)
        async with aclosing(pages):
            async for page in pages:
                found += page.items
        return found

    async def pages(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 500,
    ) -> AsyncGenerator[Page, None]:
        """All of them as of one moment, page by page. Raises GoneError if that takes longer than etcd remembers."""
        params = {"limit": str(limit), "labelSelector": label_selector, "fieldSelector": field_selector}
        params = {name: value for name, value in params.items() if value}
        while True:
            answer = await self.transport.request(
                "GET", resource.path(namespace), params=params, attempts=self.attempts
            )
            yield Page(_with_kind(answer), answer["metadata"]["resourceVersion"])
            following = answer["metadata"].get("continue")
            if not following:
                return
            params["continue"] = following

    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str,
        label_selector: str = "",
        field_selector: str = "",
        timeout: float = 300.0,
    ) -> AsyncGenerator[tuple[str, Object], None]:
        """What changes after ``resource_version``: ADDED, MODIFIED, DELETED or BOOKMARK, and the object.

        Ends after about ``timeout`` seconds. Raises GoneError (list again), UnreachableError (cut, or silent for
        longer than ``HTTPSettings.watch_silence``) and whatever else the server has to say.
        """
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(max(1, round(timeout))),
        }
        if label_selector:
            params["labelSelector"] = label_selector
        if field_selector:
            params["fieldSelector"] = field_selector
        path = resource.path(namespace)
        lines = self.transport.lines(path, params, self.transport.settings.watch_silence)
        async with aclosing(lines):
            async for line in lines:
                try:
                    event = json.loads(line)
                    kind, obj = event["type"], event["object"]
                except (ValueError, KeyError, TypeError) as error:
                    raise UnreachableError(f"WATCH {path}: not an event: {line[:200]!r}") from error
                if kind == "ERROR":
                    raise from_status(int(obj.get("code") or 500), obj, f"WATCH {path}")
                yield kind, obj

    # -- writing

    async def create(self, resource: Resource, namespace: str | None, obj: Object) -> Object:
        """Make it; the object as the server has it. Raises AlreadyExistsError, InvalidError, ForbiddenError."""
        return await self._write("POST", resource.path(namespace), obj)

    async def replace(self, resource: Resource, namespace: str | None, name: str, obj: Object) -> Object:
        """Overwrite it. With ``metadata.resourceVersion`` only if nobody else did since: else ConflictError."""
        return await self._write("PUT", resource.path(namespace, name), obj)

    async def replace_status(self, resource: Resource, namespace: str | None, name: str, obj: Object) -> Object:
        """Overwrite its status and nothing else; the same precondition."""
        return await self._write("PUT", resource.path(namespace, name, "status"), obj)

    async def patch(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        patch: object,
        *,
        subresource: str = "",
        content_type: str = MERGE_PATCH,
    ) -> Object:
        """Change part of it; a merge patch that holds ``metadata.resourceVersion`` is conditional too."""
        return await self._write("PATCH", resource.path(namespace, name, subresource), patch, content_type)

    async def apply(self, resource: Resource, namespace: str | None, obj: Object, manager: str) -> Object:
        """Have these fields so, in an object that may not be there yet: server-side apply.

        Unlike ``create``, a right to it can be limited to names. Fields that ``manager`` applied before and leaves out
        now are removed; ConflictError if another manager holds one of the fields with another value.
        """
        path = resource.path(namespace, obj["metadata"]["name"])
        return await self._write("PATCH", path, obj, APPLY, {"fieldManager": manager})

    async def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        *,
        propagation: str = "Foreground",
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> None:
        """Have it deleted; it may take its time. NotFoundError if it is gone, ConflictError if ``uid`` is another's.

        With ``resource_version`` only if it has not changed since, else ConflictError.

        ``propagation``: Foreground (it stays until what it owns is gone), Background or Orphan.
        """
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        preconditions = {"uid": uid, "resourceVersion": resource_version}
        if any(preconditions.values()):
            options["preconditions"] = {name: value for name, value in preconditions.items() if value is not None}
        await self._write("DELETE", resource.path(namespace, name), options)

    async def _write(
        self,
        method: str,
        path: str,
        body: object,
        content_type: str = "application/json",
        params: Mapping[str, str] | None = None,
    ) -> Object:
        return await self.transport.request(
            method,
            path,
            params=params,
            body=body,
            content_type=content_type,
            fence=self.fence,
            attempts=self.attempts,
        )


def _with_kind(answer: Object) -> list[Object]:
    """The items of a list. Those of built-in kinds do not say what they are, though single objects and events do."""
    kind = str(answer.get("kind", "")).removesuffix("List")
    items: list[Object] = answer.get("items") or []
    for item in items:
        item.setdefault("apiVersion", answer.get("apiVersion", ""))
        item.setdefault("kind", kind)
    return items
