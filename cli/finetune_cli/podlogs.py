"""What running pods write, several of them at a time."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import InvalidError, NotFoundError, RetryableError
from finetune_operator.kube.objects import Object, uid_of
from finetune_operator.plan.pods import CONTAINER

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster

PODS = Resource("", "v1", "pods")
Attempt = tuple[str, int]
"""Stage and number."""
_SILENCE_SECONDS = 600.0
"""A log that says nothing for so long may hang on a dead connection; it is then opened anew where it was."""
_AGAIN_SECONDS = 1.0
_AHEAD = 1000
"""Lines that are held for who reads them slowly."""


class Speaking:
    """The pods that are read at present. Between two calls of ``next`` nothing is read."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self._lines: asyncio.Queue[tuple[Attempt, str | None]] = asyncio.Queue(_AHEAD)
        self._tasks: dict[Attempt, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._tasks)

    def begin(self, attempt: Attempt, pod: Object) -> None:
        """Read that one, too, until its container has ended."""

        async def start() -> None:
            self._tasks[attempt] = asyncio.create_task(self._read(attempt, pod))

        self._cluster.do(start())

    def next(self, seconds: float) -> tuple[Attempt, str] | None:
        """The next line, whosever it is; None if none comes within so many seconds."""
        return self._cluster.do(self._next(seconds))

    async def _next(self, seconds: float) -> tuple[Attempt, str] | None:
        try:
            async with asyncio.timeout(seconds):
                while True:
                    attempt, line = await self._lines.get()
                    if line is not None:
                        return attempt, line
                    await self._tasks.pop(attempt)  # raises what went wrong
        except TimeoutError:
            return None

    async def _read(self, attempt: Attempt, pod: Object) -> None:
        try:
            async with aclosing(lines_of(self._cluster.client, pod, follow=True)) as lines:
                async for line in lines:
                    await self._lines.put((attempt, line))
        finally:
            await self._lines.put((attempt, None))

    def close(self) -> None:
        """Read no more."""

        async def stop() -> None:
            for task in self._tasks.values():
                task.cancel()
            while not self._lines.empty():
                self._lines.get_nowait()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

        if not self._cluster.closed:  # an iterator may outlive the connection, in the frames of an error
            self._cluster.do(stop())


async def lines_of(client: Client, pod: Object, *, follow: bool) -> AsyncGenerator[str, None]:
    """To the end of what there is, or of the container; a broken connection is gone on with where it broke."""
    stamp = ""
    while True:
        resumed = stamp
        try:
            async with aclosing(_request(client, pod, since=stamp, follow=follow)) as answer:
                async for line in answer:
                    stamp, _, text = line.decode(errors="replace").partition(" ")
                    if stamp > resumed:  # sinceTime knows only whole seconds; the stamps have nine digits each
                        yield text
        except (NotFoundError, InvalidError):  # gone meanwhile, or nothing of its log is left
            return
        except RetryableError:
            if not follow:
                raise
        if not follow or await _is_over(client, pod):
            return
        await asyncio.sleep(_AGAIN_SECONDS)


def _request(client: Client, pod: Object, *, since: str, follow: bool) -> AsyncGenerator[bytes, None]:
    meta = pod["metadata"]
    params = {"container": CONTAINER, "timestamps": "true", "follow": "true" if follow else "false"}
    if since:
        params["sinceTime"] = since
    return client.transport.lines(PODS.path(meta["namespace"], meta["name"], "log"), params, _SILENCE_SECONDS)


async def _is_over(client: Client, pod: Object) -> bool:
    meta = pod["metadata"]
    try:
        now = await client.get(PODS, meta["namespace"], meta["name"])
    except NotFoundError:
        return True
    return uid_of(now) != meta["uid"] or "running" not in state_of(now)


def state_of(pod: Object) -> dict[str, object]:
    """Of the stage's container: ``waiting``, ``running`` or ``terminated``; empty before the kubelet knows it."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return next((dict(s.get("state", {})) for s in statuses if s["name"] == CONTAINER), {})
