"""A store's bad days: an HTTP proxy in front of a real S3 server that breaks what it is told to break.

Requests are passed on with the client's own ``Host`` header, which the signature covers, so they verify behind the
proxy. Headers cannot be taken away for the same reason: a store that ignores conditions is played by deleting the
object just before the conditional write, one that ignores ranges by fetching the whole object with a client of our own.
"""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CHUNK = 64 << 10


class Kind(Enum):
    """What goes wrong."""

    CUT_DOWN = auto()
    """The connection breaks after so many bytes of the answer's body."""
    CUT_UP = auto()
    """The connection breaks after so many bytes of the request's body; the server never sees the request."""
    LOSE_ANSWER = auto()
    """The server does what it was asked to do, but the connection breaks before its answer comes."""
    UNAVAILABLE = auto()
    """503 SlowDown instead of an answer."""
    SLOW = auto()
    """Each 64 KiB of a body take so many seconds (``amount``)."""
    WRONG_DOWN = auto()
    """One bit of the answer's body is flipped."""
    WRONG_UP = auto()
    """One bit of the request's body is flipped."""
    IGNORE_CONDITIONS = auto()
    """A write with If-None-Match succeeds although the object is there."""
    IGNORE_RANGE = auto()
    """A ranged GET is answered with status 200 and the whole object."""


@dataclass
class Fault:
    """One fault: which requests it hits, how many of them, and how hard."""

    kind: Kind
    method: str = ""
    """Only requests of this method; empty: all."""
    path: str = ""
    """Only where the path and query contain this."""
    times: int = 1
    """So many requests, then never again."""
    amount: float = 0
    """Bytes (cuts), seconds (SLOW)."""


@dataclass
class Seen:
    """A request that arrived."""

    method: str
    path: str
    range: str
    status: int = 0
    """0: not answered, or cut."""
    up: int = 0
    down: int = 0
    """Bytes of the bodies that were passed on."""


@dataclass
class FaultProxy:
    """Listens at ``endpoint`` while ``running``; ``faults`` may be changed at any time."""

    upstream: str
    client: "S3Client"
    """Speaks to the store itself."""
    endpoint: str = ""
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def running(self) -> Iterator["FaultProxy"]:
        """Serve in the background."""
        proxy = self

        class Handler(_Handler):
            owner = proxy

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def add(self, kind: Kind, *, method: str = "", path: str = "", times: int = 1, amount: float = 0) -> Fault:
        """Begin to break things."""
        fault = Fault(kind, method, path, times, amount)
        with self.lock:
            self.faults.append(fault)
        return fault

    def forget(self) -> None:
        """No faults any more, nothing seen."""
        with self.lock:
            self.faults.clear()
            self.seen.clear()

    def count(self, method: str, path: str = "") -> int:
        """Requests seen, of a method, with that in the path."""
        return len(self.requests(method, path))

    def requests(self, method: str, path: str = "") -> list[Seen]:
        """Requests seen, of a method, with that in the path."""
        with self.lock:
            return [seen for seen in self.seen if seen.method == method and path in seen.path]

    def take(self, method: str, path: str) -> dict[Kind, Fault]:
        """The faults that hit this request, each counted."""
        with self.lock:
            hit = {
                f.kind: f for f in self.faults if f.times > 0 and f.method in ("", method) and f.path in unquote(path)
            }
            for fault in hit.values():
                fault.times -= 1
            return hit


class _CutError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    _seen: Seen
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        self._seen = Seen(self.command, unquote(self.path), self.headers.get("Range", ""))
        faults = self.owner.take(self.command, self.path)
        with self.owner.lock:
            self.owner.seen.append(self._seen)
        try:
            self._pass_on(faults)
        except _CutError:
            self._seen.status = 0
            self._cut()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 - the names http.server looks for

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the tests look at ``seen``."""

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, faults: dict[Kind, Fault]) -> None:
        body = self._body(faults)
        if Kind.UNAVAILABLE in faults:
            words = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self._answer(503, {"Content-Type": "application/xml"}, words, faults)
            return
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        if Kind.IGNORE_CONDITIONS in faults and "If-None-Match" in self.headers:
            self.owner.client.delete_object(Bucket=bucket, Key=key)
        if Kind.IGNORE_RANGE in faults and "Range" in self.headers:
            whole = self.owner.client.get_object(Bucket=bucket, Key=key)
            self._answer(200, {"ETag": whole["ETag"]}, whole["Body"].read(), faults)
            return
        store = http.client.HTTPConnection(urlsplit(self.owner.upstream).netloc, timeout=60)
        try:
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")
            }
            store.request(self.command, self.path, body, headers)
            answer = store.getresponse()
            data = answer.read()
            if Kind.LOSE_ANSWER in faults:
                raise _CutError
            drop = ("connection", "transfer-encoding", "content-length", "keep-alive")
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in drop}
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(answer.status, kept, data, faults, length)
        finally:
            store.close()

    def _body(self, faults: dict[Kind, Fault]) -> bytes:
        cut = faults.get(Kind.CUT_UP)
        left = int(self.headers.get("Content-Length", 0))
        received = bytearray()
        while left > 0:
            if cut is not None and len(received) >= cut.amount:
                raise _CutError
            data = self.rfile.read(min(left, _CHUNK))
            if not data:
                raise _CutError
            received += data
            self._seen.up += len(data)
            left -= len(data)
            self._wait(faults)
        if cut is not None:
            raise _CutError
        if Kind.WRONG_UP in faults and received:
            received[len(received) // 2] ^= 1
        return bytes(received)

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, faults: dict[Kind, Fault], length: str | None = None
    ) -> None:
        self._seen.status = status
        cut = faults.get(Kind.CUT_DOWN)
        if Kind.WRONG_DOWN in faults and body:
            damaged = bytearray(body)
            damaged[len(body) // 2] ^= 1
            body = bytes(damaged)
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(body), _CHUNK):
            data = body[start : start + _CHUNK]
            if cut is not None and start + len(data) > cut.amount:
                self._seen.down += int(cut.amount) - start
                self.wfile.write(data[: int(cut.amount) - start])
                raise _CutError
            self._seen.down += len(data)
            self.wfile.write(data)
            self._wait(faults)

    def _wait(self, faults: dict[Kind, Fault]) -> None:
        if Kind.SLOW in faults:
            time.sleep(faults[Kind.SLOW].amount)
