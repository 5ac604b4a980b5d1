"""A stand-in for the kubelet, so that the operator can be tested with thousands of pods and no container.

It places every pod of a namespace on a node of its own, lets it run, and ends it as the test says, in the order in
which a kubelet writes these states. All the rest is real: API server, Job controller, garbage collector.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from finetune_operator.kube.client import STRATEGIC_PATCH, Client, Resource
from finetune_operator.kube.errors import AlreadyExistsError, ConflictError, KubeError, NotFoundError
from finetune_operator.kube.reflector import Reflector

PODS = Resource("", "v1", "pods")
NODES = Resource("", "v1", "nodes", namespaced=False)
NODE = "stand-in"


@dataclass(frozen=True)
class End:
    """How a stage's container ends: after so many seconds, or once it is told to stop."""

    code: int = 0
    message: str = ""
    seconds: float = 0.0
    waits: bool = False
    """Runs until it is deleted, then saves and exits with 75."""


def committed(stage: str, *artifacts: str, **figures: float | str) -> str:
    """The termination message of a stage that committed its result."""
    made = [
        {"stage": stage, "name": name, "uri": f"s3://b/{stage}/{name}", "sizeBytes": 1, "sha256": "0" * 64}
        for name in artifacts
    ]
    result = {"digest": f"d-{stage}", "manifest": f"{stage}/manifest.json", "artifacts": made, "figures": figures}
    return json.dumps({"result": result})


@dataclass
class Kubelet:
    """Runs the pods of one namespace until it is cancelled."""

    client: Client
    namespace: str
    ends: Mapping[str, list[End]] = field(default_factory=dict)
    """By stage, one for each attempt; by default each commits a result. ``sft/1``: of the pods on the second node."""
    started: list[tuple[str, int]] = field(default_factory=list)
    """(stage, attempt) of every pod that ran, or ``sft/1`` for the stage on the second node."""

    def __post_init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._deleted: dict[str, asyncio.Event] = {}

    async def run(self) -> None:
        """Watch and play."""
        await self._patient(self._join, NODE)
        reflector = Reflector(self.client, PODS, self.namespace, "finetune.dev/stage", self._on_pod)
        try:
            await reflector.run()
        finally:
            for task in self._tasks.values():
                task.cancel()

    def _on_pod(self, old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
        pod = new or old or {}
        uid = pod["metadata"]["uid"]
        told = self._deleted.setdefault(uid, asyncio.Event())
        if new is None or "deletionTimestamp" in pod["metadata"]:
            told.set()
        if uid not in self._tasks and new is not None:
            self._tasks[uid] = asyncio.create_task(self._live(pod, told))

    async def _live(self, pod: dict[str, Any], told: asyncio.Event) -> None:
        name, labels = pod["metadata"]["name"], pod["metadata"]["labels"]
        stage, attempt = labels["finetune.dev/stage"], int(labels["finetune.dev/attempt"])
        index = labels.get("batch.kubernetes.io/job-completion-index", "0")
        which = stage if index == "0" else f"{stage}/{index}"
        ends = self.ends.get(which, [])
        end = ends[attempt - 1] if attempt <= len(ends) else End(message=committed(stage))
        with contextlib.suppress(NotFoundError):
            await self._patient(self._bind, name)
            started = _now()
            self.started.append((which, attempt))
            await self._status(name, "Running", {"running": {"startedAt": started}})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(told.wait(), None if end.waits else end.seconds)
            code, message = (75, "") if told.is_set() and end.waits else (end.code, end.message)
            state = {"exitCode": code, "message": message, "startedAt": started, "finishedAt": _now()}
            reason = "Completed" if code == 0 else "Error"
            phase = "Succeeded" if code == 0 else "Failed"
            await self._status(name, phase, {"terminated": {**state, "reason": reason}})
            await told.wait()
            await self._patient(self._delete, name)

    async def _status(self, name: str, phase: str, state: dict[str, Any]) -> None:
        container = {"name": "stage", "image": "x", "imageID": "sha256:x", "ready": False, "restartCount": 0}
        status = {"phase": phase, "containerStatuses": [{**container, "state": state}]}

        async def write(pod: str) -> None:
            await self.client.patch(
                PODS, self.namespace, pod, {"status": status}, subresource="status", content_type=STRATEGIC_PATCH
            )

        await self._patient(write, name)

    async def _join(self, name: str) -> None:
        """Pods on a node that is not there are deleted after a minute, by the controller manager's pod collector."""
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        with contextlib.suppress(AlreadyExistsError):
            await self.client.create(NODES, None, node)

    async def _bind(self, name: str) -> None:
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name, "namespace": self.namespace},
            "target": {"apiVersion": "v1", "kind": "Node", "name": NODE},
        }
        path = PODS.path(self.namespace, name, "binding")
        with contextlib.suppress(ConflictError):  # bound by a kubelet before us
            await self.client.transport.request("POST", path, body=binding)

    async def _delete(self, name: str) -> None:
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
        await self.client.transport.request("DELETE", PODS.path(self.namespace, name), body=options)

    async def _patient(self, act: Any, name: str) -> None:
        """The API server may be busy, or away."""
        for wait in _waits():
            try:
                await act(name)
            except NotFoundError:
                raise
            except KubeError:
                await asyncio.sleep(wait)
            else:
                return


def _waits() -> Iterator[float]:
    yield from (0.1, 0.2, 0.5)
    while True:
        yield 1.0


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
