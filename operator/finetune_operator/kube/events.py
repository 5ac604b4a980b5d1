"""Kubernetes Events: what ``kubectl describe`` shows. Sent in the background; if one is lost, nothing but words is."""

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import KubeError, NotFoundError
from finetune_operator.kube.objects import Object, uid_of
from finetune_operator.kube.settings import EventSettings

_log = logging.getLogger(__name__)
EVENTS = Resource("", "v1", "events")
_LONGEST_MESSAGE = 1024  # the apiserver refuses longer ones
_Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class _Told:
    key: _Key
    about: dict[str, Any]
    at: str


@dataclass
class _Sent:
    namespace: str
    name: str
    count: int
    at: float


class Recorder:
    """Makes Events of one component. ``record`` may be called at any time, ``run`` sends them."""

    def __init__(
        self,
        client: Client,
        component: str,
        instance: str,
        settings: EventSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``component`` is shown as the source; ``instance`` tells its replicas apart."""
        self._client = client
        self._component = component
        self._instance = instance
        self._settings = settings or EventSettings()
        self._clock = clock
        self._waiting: deque[_Told] = deque()
        self._arrived = asyncio.Event()
        self._sent: OrderedDict[_Key, _Sent] = OrderedDict()
        self._number = time.time_ns()

    def record(self, about: Object, type: str, reason: str, message: str) -> None:
        """Tell of ``about``; ``type`` is Normal or Warning, ``reason`` one word. Never waits, never raises.

        The same said again within ``repeat_window`` raises the Event's count.
        """
        metadata = about["metadata"]
        reference = {
            "apiVersion": about.get("apiVersion", ""),
            "kind": about.get("kind", ""),
            "namespace": metadata.get("namespace"),
            "name": metadata["name"],
            "uid": uid_of(about),
        }
        if len(message) > _LONGEST_MESSAGE:
            message = message[: _LONGEST_MESSAGE - 3] + "..."
        if len(self._waiting) >= self._settings.waiting:
            self._waiting.popleft()
            self._client.transport.metrics.events_dropped.inc()
        self._waiting.append(_Told((uid_of(about), type, reason, message), reference, _timestamp()))
        self._arrived.set()

    async def run(self) -> None:
        """Send what is recorded, until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await self.flush()

    async def flush(self) -> None:
        """Send what waits now. What the server does not take is dropped."""
        while self._waiting:
            told = self._waiting.popleft()
            try:
                await self._send(told)
            except KubeError as error:
                self._client.transport.metrics.events_dropped.inc()
                _log.info("an Event was dropped (%s): %s", told.key[2], error)

    async def _send(self, told: _Told) -> None:
        sent = self._sent.get(told.key)
        now = self._clock()
        if sent is not None and now < sent.at + self._settings.repeat_window:
            sent.count, sent.at = sent.count + 1, now
            self._sent.move_to_end(told.key)
            patch = {"count": sent.count, "lastTimestamp": told.at}
            try:
                await self._client.patch(EVENTS, sent.namespace, sent.name, patch)
                return
            except NotFoundError:
                pass  # the apiserver keeps Events for an hour
        self._number += 1
        namespace = told.about["namespace"] or "default"
        name = f"{told.about['name'][:200]}.{self._number:x}"
        _, type_, reason, message = told.key
        await self._client.create(
            EVENTS,
            namespace,
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": namespace},
                "involvedObject": told.about,
                "type": type_,
                "reason": reason,
                "message": message,
                "count": 1,
                "firstTimestamp": told.at,
                "lastTimestamp": told.at,
                "source": {"component": self._component},
                "reportingComponent": self._component,
                "reportingInstance": self._instance,
            },
        )
        self._sent[told.key] = _Sent(namespace, name, 1, now)
        self._sent.move_to_end(told.key)
        while len(self._sent) > self._settings.remembered:
            self._sent.popitem(last=False)


def _timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
