"""Stand-ins for engine tests: time that passes at once, and a server that does what no real one can be made to do.

The truth about Kubernetes is the real apiserver (tests/engine with ``control_plane``); nothing here imitates it.
"""

import asyncio
import functools
import json
import selectors
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

# -- time


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as nothing else is to do."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """The virtual now."""
        return self.now


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._of = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits, and nothing is left that could happen")
        if not ready and timeout > 0:
            self._of.now += timeout
        return ready


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in virtual time: no real sockets, no threads."""
    return _runs(test, VirtualLoop)


def real_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test; one that hangs fails after three minutes."""
    return _runs(test, None, 180)


def _runs(test: Callable[..., Coroutine[Any, Any, None]], loop: Any, limit: float | None = None) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(limit):
                await test(*arguments, **named)

        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(limited())

    return run


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another task brings about."""
    while not condition():
        await asyncio.sleep(0.01)


# -- a server

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def says(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """That body as JSON."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return answer


def refuses(code: int, reason: str = "", message: str = "no", headers: dict[str, str] | None = None) -> Answer:
    """A ``Status`` object, as the apiserver sends it."""
    return says({"kind": "Status", "code": code, "reason": reason, "message": message}, code, headers)


def text(body: str, status: int = 200) -> Answer:
    """No JSON at all."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(text=body, status=status)

    return answer


def hangs() -> Answer:
    """The request arrives, no answer ever comes."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        return web.Response()

    return answer


def cuts() -> Answer:
    """The connection is closed instead of an answer."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    return answer


def streams(*parts: object, then: str = "end") -> Answer:
    """A watch: objects as lines, strings as they are, numbers as seconds of silence; ``then`` end, cut or hang."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            if isinstance(part, float | int):
                await asyncio.sleep(part)
            else:
                await response.write((part if isinstance(part, str) else json.dumps(part) + "\n").encode())
        if then == "hang":
            await asyncio.sleep(3600)
        if then == "cut":
            assert request.transport is not None
            request.transport.abort()
        return response

    return answer


@dataclass
class Request:
    """One that arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeServer:
    """Answers as it was told, in order; its last answer to a question it repeats."""

    requests: list[Request] = field(default_factory=list)
    url: str = ""
    _answers: dict[str, deque[Answer]] = field(default_factory=dict)

    def on(self, method: str, *answers: Answer) -> None:
        """What it says to GET, WATCH, POST, PUT, PATCH, DELETE from now on."""
        self._answers[method] = deque(answers)

    def seen(self, method: str) -> list[Request]:
        """The requests of that method."""
        return [request for request in self.requests if request.method == method]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        method = "WATCH" if "watch" in request.query else request.method
        body = await request.read()
        self.requests.append(Request(method, request.path, dict(request.query), dict(request.headers), body))
        answers = self._answers[method]
        answer = answers.popleft() if len(answers) > 1 else answers[0]
        return await answer(request)

    def kubeconfig(self, directory: Path, **user: str) -> Path:
        """A file that leads here."""
        path = directory / "kubeconfig"
        path.write_text(
            json.dumps(
                {
                    "current-context": "fake",
                    "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me", "namespace": "here"}}],
                    "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
                    "users": [{"name": "me", "user": user}],
                }
            )
        )
        return path


@asynccontextmanager
async def fake_server() -> AsyncIterator[FakeServer]:
    """One on loopback, for as long as the block lasts."""
    server = FakeServer()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server._serve)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = "http://127.0.0.1:" + str(runner.addresses[0][1])
    try:
        yield server
    finally:
        await runner.cleanup()
