"""One request to the apiserver: sent with fresh credentials, in bounded time, again where that is safe."""

import asyncio
import json
import logging
import socket
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_writer import StreamWriter
from aiohttp.payload import BytesPayload
from yarl import URL

from finetune_operator.kube.backoff import Backoff, jitter
from finetune_operator.kube.credentials import Access, Credentials
from finetune_operator.kube.errors import (
    KubeError,
    NotLeadingError,
    RetryableError,
    SilentError,
    ThrottledError,
    UnauthorizedError,
    UnreachableError,
    from_status,
)
from finetune_operator.kube.metrics import Metrics
from finetune_operator.kube.settings import HTTPSettings

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from aiohappyeyeballs import AddrInfoType

_log = logging.getLogger(__name__)
Fence = Callable[[], None]
"""Raises ``NotLeadingError`` where a write must not go out."""

_LONGEST_LINE = 64 << 20  # etcd takes 1.5 MiB: what is longer than this is no event


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    params: Mapping[str, str]
    body: bytes | None = None
    content_type: str = ""
    fence: Fence | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class Transport:
    """The connections to one apiserver."""

    def __init__(self, credentials: Credentials, settings: HTTPSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self._credentials = credentials
        self._sockets: weakref.WeakValueDictionary[int, _FencedSocket] = weakref.WeakValueDictionary()
        # The apiserver is near: compressing would cost both sides more than it saves.
        # As client-go asks: what is not offered as plain JSON (/openid/v1/jwks) is refused otherwise.
        accept = "application/json, */*"
        headers = {"User-Agent": settings.user_agent, "Accept": accept, "Accept-Encoding": "identity"}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.connections, socket_factory=self._socket),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def _socket(self, address: "AddrInfoType") -> socket.socket:
        family, kind, protocol, _, _ = address
        made = _FencedSocket(family, kind, protocol)
        made.setblocking(False)
        self._sockets[made.fileno()] = made
        return made

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def access(self) -> Access:
        """Where and as whom requests are made."""
        return await self._credentials.current()

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        fence: Fence | None = None,
        attempts: int | None = None,
    ) -> dict[str, Any]:
        """The answer, decoded. ``fence`` is asked before each attempt, and before each of the kernel's sends for it.

        Raises KubeError in its kinds. Reads are tried again after any RetryableError; writes only where the server
        surely did not carry them out.
        """
        attempts = attempts or self.settings.attempts
        backoff = Backoff(self.settings.first_wait, self.settings.longest_wait)
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        wanted = _Request(method, path, params or {}, data, content_type, fence)
        access = await self._credentials.current()
        rejected = False
        while True:
            if fence is not None:
                fence()
            try:
                return await self._once(wanted, access)
            except UnauthorizedError:
                if rejected:
                    raise
                rejected = True
                access = await self._credentials.current(rejected=access)
            except RetryableError as error:
                harmless = method == "GET" or isinstance(error, ThrottledError) or not _sent(error)
                if not harmless or backoff.failures + 1 >= attempts:
                    raise
                wait = backoff.next()
                if isinstance(error, ThrottledError) and error.retry_after is not None:
                    wait = max(wait, min(jitter(error.retry_after, 0.2), self.settings.longest_wait))
                _log.debug("%s, again in %.1f s", error, wait)
                await asyncio.sleep(wait)
                access = await self._credentials.current()

    async def lines(self, path: str, params: Mapping[str, str], silence: float) -> AsyncGenerator[bytes, None]:
        """The lines of an endless answer, until the server ends it.

        Raises SilentError once nothing has come for ``silence`` seconds, UnreachableError if it breaks off, also in
        mid-line.
        """
        access = await self._credentials.current()
        wanted = _Request("GET", path, params)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.settings.connect_timeout, sock_read=silence)
        rest = bytearray()
        opened = False
        try:
            async with self._send(wanted, access, timeout) as answer:
                if answer.status >= 400:
                    raise await self._refused(answer, wanted)
                opened = True
                async for chunk in answer.content.iter_any():
                    rest += chunk
                    if b"\n" in chunk:
                        *whole, rest = rest.split(b"\n")
                        for line in whole:
                            yield bytes(line)
                        # A flood of events must not keep everything else waiting.
                        await asyncio.sleep(0)
                    elif len(rest) > _LONGEST_LINE:
                        raise UnreachableError(f"{wanted}: a line of over {_LONGEST_LINE} bytes")
        except aiohttp.SocketTimeoutError as error:
            if opened:
                raise SilentError(f"{wanted}: silent for {silence:g} s") from error
            raise self._broken(error, wanted) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken(error, wanted) from error
        except UnauthorizedError:
            await self._credentials.current(rejected=access)
            raise
        if rest.strip():
            raise UnreachableError(f"{wanted}: the server broke off in the middle of a line")

    async def _once(self, wanted: _Request, access: Access) -> dict[str, Any]:
        # No limit on the whole: time spent in our own line for a connection is not the server's fault.
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self.settings.connect_timeout, sock_read=self.settings.request_timeout
        )
        body = None if wanted.body is None else _FencedBody(wanted, self._sockets)
        try:
            async with self._send(wanted, access, timeout, body) as answer:
                if answer.status >= 400:
                    raise await self._refused(answer, wanted)
                decoded = json.loads(await answer.read())
                self.metrics.requests.labels(wanted.method, str(answer.status)).inc()
        except (aiohttp.ClientError, OSError) as error:
            if body is not None and body.refused is not None:  # that is what broke the connection
                raise NotLeadingError(str(body.refused)) from error
            raise self._broken(error, wanted) from error
        except ValueError as error:
            raise UnreachableError(f"{wanted}: the answer is not JSON: {error}") from error
        finally:
            if body is not None and body.socket is not None:
                body.socket.fence = None  # the connection is somebody else's next
        if not isinstance(decoded, dict):
            raise UnreachableError(f"{wanted}: the answer is not a JSON object")
        return decoded

    def _send(
        self, wanted: _Request, access: Access, timeout: aiohttp.ClientTimeout, body: "_FencedBody | None" = None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._session.request(
            wanted.method,
            URL(access.server + wanted.path, encoded=True).with_query(wanted.params),
            data=body,
            headers={"Authorization": access.authorization} if access.authorization else {},
            timeout=timeout,
            ssl=access.tls if access.tls is not None else True,
            server_hostname=access.server_name,
            proxy=access.proxy,
            allow_redirects=False,
        )

    async def _refused(self, answer: aiohttp.ClientResponse, wanted: _Request) -> KubeError:
        self.metrics.requests.labels(answer.method, str(answer.status)).inc()
        text = await answer.text(errors="replace")
        try:
            status = json.loads(text)
        except ValueError:
            status = {"message": text.strip()[:500]}
        after = answer.headers.get("Retry-After", "")
        return from_status(
            answer.status,
            status if isinstance(status, dict) else {},
            str(wanted),
            float(after) if after.isdecimal() else None,
        )

    def _broken(self, error: BaseException, wanted: _Request) -> KubeError:
        self.metrics.requests.labels(wanted.method, type(error).__name__).inc()
        return UnreachableError(f"{wanted}: {str(error) or type(error).__name__}")


class _FencedBody(BytesPayload):
    """Asks the fence when everything else (a free connection, TLS) has been waited for, and arms the socket."""

    def __init__(self, wanted: _Request, sockets: Mapping[int, "_FencedSocket"]) -> None:
        super().__init__(wanted.body or b"", content_type=wanted.content_type)
        self.socket: _FencedSocket | None = None
        self.refused: NotLeadingError | None = None
        """What the fence said, if it objected."""
        self._fence = wanted.fence
        self._sockets = sockets

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Write it, unless the fence objects: the server then gets no whole request and does nothing."""
        if self._fence is not None:
            self._ask()
            assert isinstance(writer, StreamWriter)
            assert writer.transport is not None
            self.socket = self._sockets[writer.transport.get_extra_info("socket").fileno()]
            self.socket.fence = self._ask
        await super().write_with_length(writer, content_length)

    def _ask(self) -> None:
        assert self._fence is not None
        try:
            self._fence()
        except NotLeadingError as error:
            self.refused = error
            # Of this kind, asyncio and aiohttp give up the connection without a word.
            raise ConnectionAbortedError(str(error)) from error


class _FencedSocket(socket.socket):
    """Asks again right before the kernel: a process may be stopped anywhere between building a request and sending."""

    fence: Fence | None = None

    def send(self, data: "ReadableBuffer", flags: int = 0, /) -> int:
        """As ever, unless the fence objects."""
        if self.fence is not None:
            self.fence()
        return super().send(data, flags)

    def sendmsg(self, buffers: Iterable["ReadableBuffer"], /, *more: Any) -> int:
        """The same; newer versions of asyncio send so."""
        if self.fence is not None:
            self.fence()
        return super().sendmsg(buffers, *more)


def _sent(error: RetryableError) -> bool:
    """Whether the server may have seen the request."""
    return not isinstance(error.__cause__, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
