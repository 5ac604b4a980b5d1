"""Takes in how far the stages are: ``POST /v1/progress``, from the stage's own pod and no other.

Never load-bearing: what arrives here is for people, all of it may be lost at any moment, and what it costs is bounded,
whatever is sent: bodies, connections, tokens that are remembered, updates that are kept.
"""

import asyncio
import logging
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import aiohttp
from aiohttp import web
from pydantic import Field, ValidationError

from finetune_api.status import CheckpointStatus, Progress
from finetune_operator.jwt import InvalidTokenError
from finetune_operator.kube.errors import KubeError
from finetune_operator.kube.objects import Object, uid_of
from finetune_operator.lookup import Reported
from finetune_operator.plan.pods import JOB_LABEL, MANAGED_BY
from finetune_operator.replicas import Replica
from finetune_operator.tokens import PodIdentity, Verifier

_log = logging.getLogger("finetune.progress")

PATH = "/v1/progress"
PASSED_ON = "Finetune-Passed-On"
"""Header of a request that a follower passes on: it is not passed on again."""
BODY_BYTES = 16 * 1024
UPDATE_SECONDS = 1.0
"""Between two updates of one pod."""
PODS = 10_000
"""Whose latest update is kept; beyond that the one is dropped that was silent longest."""
CONNECTIONS = 512
REQUEST_SECONDS = 10.0
_TLS_SECONDS = 5.0
"""For each side of the handshake at the beginning, and of the one at the end."""
_PASS_ON_SECONDS = 4.0
"""Less than the stage waits for its answer."""
_ANSWER_BYTES = 4096

# What a status may hold: a number that the API server refused would keep all else from being recorded, too.
_Count = Annotated[int, Field(ge=0, le=2**53)]


class CommittedCheckpoint(CheckpointStatus):
    """The newest checkpoint that the stage has committed."""

    step: _Count


class Update(Progress):
    """What a stage sends: ``finetune_jobs.run.progress`` writes the same to its file."""

    step: _Count = 0
    total_steps: _Count = 0
    percent: Annotated[int, Field(ge=0, le=100)] = 0
    eta_seconds: _Count | None = None
    tokens_per_second: _Count | None = None
    checkpoint: CommittedCheckpoint | None = None


@dataclass
class _Pod:
    taken: float
    text: str = ""
    """The update as JSON: a seventh of the memory that its objects take."""


def _now() -> datetime:
    return datetime.now(UTC)


class ProgressServer:
    """The latest update of each pod. The leader keeps them; a follower passes them on to it."""

    def __init__(
        self,
        verifier: Verifier,
        *,
        pod: Callable[[str, str], Object | None],
        enqueue: Callable[[str], None],
        leading: Callable[[], bool],
        leader: Callable[[], Replica | None],
        clock: Callable[[], datetime] = _now,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """``pod``: from our cache, by namespace and name; ``enqueue`` is told the job's key, ``namespace/name``.

        ``leader``: where it is reached, None while nobody leads or it has not said.
        """
        self._verifier = verifier
        self._pod = pod
        self._enqueue = enqueue
        self._leading = leading
        self._leader = leader
        self._clock = clock
        self._ticks = ticks
        self._pods: OrderedDict[str, _Pod] = OrderedDict()
        self._session: aiohttp.ClientSession | None = None

    @property
    def kept(self) -> int:
        """How many pods' latest updates are kept."""
        return len(self._pods)

    def reported(self, pod_uid: str) -> Reported:
        """What that pod said last; nothing if it said nothing, or we forgot."""
        found = self._pods.get(pod_uid)
        if found is None or not found.text:
            return Reported()
        update = Update.model_validate_json(found.text)
        return Reported(Progress(**update.model_dump(exclude={"checkpoint"})), update.checkpoint)

    def on_pod(self, old: Object | None, new: Object | None) -> None:
        """A handler for the reflector of pods: one that is gone is forgotten."""
        if new is None and old is not None:
            self._pods.pop(uid_of(old), None)

    @asynccontextmanager
    async def serving(self, host: str, port: int, tls: ssl.SSLContext) -> AsyncGenerator[int]:
        """Serve for as long as the block lasts; gives the port, which for 0 is a free one. An empty host means all."""
        app = web.Application(client_max_size=BODY_BYTES)
        app.router.add_post(PATH, self._handle)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        connector = aiohttp.TCPConnector(limit=64, force_close=True)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
            self._session = session
            await runner.setup()
            server = runner.server
            if server is None:
                raise RuntimeError("aiohttp gave no server")
            sweeper = asyncio.create_task(_sweep(server))
            try:
                listener = await asyncio.get_running_loop().create_server(
                    server,
                    host,
                    port,
                    ssl=tls,
                    ssl_handshake_timeout=_TLS_SECONDS,
                    ssl_shutdown_timeout=_TLS_SECONDS,
                )
                try:
                    yield listener.sockets[0].getsockname()[1]
                finally:
                    listener.close()
            finally:
                sweeper.cancel()
                await runner.cleanup()
                self._session = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                answer = await self._answer(request)
        except web.HTTPException as error:  # a body that is too long
            answer = web.Response(status=error.status, text=error.text)
        except (KubeError, TimeoutError, aiohttp.ClientError) as error:
            _log.debug("progress was not taken: %s", error or "timed out")
            answer = _refusal(503, "not now")
        answer.force_close()  # one request a connection: what is open is at work, or is swept away
        return answer

    async def _answer(self, request: web.Request) -> web.Response:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return _refusal(401, "a bearer token is needed")
        try:
            identity = await self._verifier.verify(token.strip())
        except InvalidTokenError as error:
            return _refusal(401, str(error))
        body = await request.read()
        if not self._leading():
            return await self._pass_on(request, body)
        return self._take(identity, body)

    def _take(self, identity: PodIdentity, body: bytes) -> web.Response:
        pod = self._pod(identity.namespace, identity.name)
        labels = (pod or {}).get("metadata", {}).get("labels") or {}
        job = labels.get(JOB_LABEL)
        if pod is None or uid_of(pod) != identity.uid or not job:
            return _refusal(403, f"pod {identity.namespace}/{identity.name} is no stage that runs")
        if labels.get("app.kubernetes.io/managed-by") != MANAGED_BY:
            return _refusal(403, f"pod {identity.namespace}/{identity.name} is not the operator's")
        known = self._pods.get(identity.uid) or _Pod(float("-inf"))
        if self._ticks() < known.taken + UPDATE_SECONDS:
            return _refusal(429, "one update a second", {"Retry-After": "1"})
        known.taken = self._ticks()
        self._pods[identity.uid] = known
        self._pods.move_to_end(identity.uid)
        while len(self._pods) > PODS:
            self._pods.popitem(last=False)
        try:
            update = Update.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            return _refusal(400, f"{where}: {first['msg']}")
        # The time is ours: a status must not depend on a node's clock.
        update = update.model_copy(update={"updated_time": self._clock()})
        known.text = update.model_dump_json(exclude_defaults=True)
        self._enqueue(f"{identity.namespace}/{job}")
        return web.Response(status=204)

    async def _pass_on(self, request: web.Request, body: bytes) -> web.Response:
        leader = self._leader()
        if PASSED_ON in request.headers or leader is None or self._session is None:
            return _refusal(503, "nobody leads just now")
        sent = self._session.post(
            leader.url + PATH,
            data=body,
            headers={"Authorization": request.headers["Authorization"], PASSED_ON: "1"},
            ssl=leader.trust,
            timeout=aiohttp.ClientTimeout(total=_PASS_ON_SECONDS),
            allow_redirects=False,
        )
        async with sent as answer:
            words = (await answer.content.read(_ANSWER_BYTES)).decode(errors="replace")
            after = {"Retry-After": answer.headers["Retry-After"]} if "Retry-After" in answer.headers else {}
            return web.Response(status=answer.status, text=words or None, headers=after)


def _refusal(status: int, words: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=f"{words}\n", headers=headers)


async def _sweep(server: web.Server) -> None:
    """Close connections that last longer than a request may, and the oldest of too many."""
    since: dict[object, float] = {}
    while True:
        now = time.monotonic()
        since = {connection: since.get(connection, now) for connection in server.connections}
        for number, connection in enumerate(reversed(server.connections)):
            if number >= CONNECTIONS or now - since[connection] > 2 * REQUEST_SECONDS:
                connection.force_close()
        await asyncio.sleep(1.0)
