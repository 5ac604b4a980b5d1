"""/healthz, /readyz and /metrics over plain HTTP, for the kubelet and Prometheus."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


@asynccontextmanager
async def serving(
    not_ready: Callable[[], str], registry: CollectorRegistry, *, health_port: int, metrics_port: int
) -> AsyncIterator[None]:
    """Answer while the block lasts. ``not_ready`` tells why we are not ready, empty once we are.

    Leading is no part of readiness: a follower is ready to take over. An event loop that hangs fails /healthz.
    """

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def readyz(request: web.Request) -> web.Response:
        why = not_ready()
        return web.Response(text=why or "ok", status=503 if why else 200)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    pages = {health_port: {"/healthz": healthz, "/readyz": readyz}, metrics_port: {"/metrics": metrics}}
    runners = []
    try:
        for port, handlers in pages.items():
            application = web.Application()
            application.add_routes([web.get(path, handler) for path, handler in handlers.items()])
            runner = web.AppRunner(application, access_log=None)
            await runner.setup()
            runners.append(runner)
            await web.TCPSite(runner, port=port).start()
        yield
    finally:
        for runner in runners:
            await runner.cleanup()
