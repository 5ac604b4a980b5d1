"""What the tests of progress share: tokens as an API server signs them, and a server that runs beside the test."""

import asyncio
import base64
import http.client
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from finetune_operator.certificates import OwnCertificate, trusting
from finetune_operator.kube.client import Client
from finetune_operator.kube.errors import KubeError, UnreachableError
from finetune_operator.plan.pods import PROGRESS_AUDIENCE
from finetune_operator.progress import PATH, ProgressServer

ISSUER = "https://kubernetes.default.svc"
NOW = 1_800_000_000.0
UPDATE = json.dumps(
    {"step": 3, "totalSteps": 12, "percent": 25, "metrics": [{"name": "loss", "value": "1.3"}]}
).encode()


def encoded(part: bytes | Mapping[str, Any]) -> str:
    """base64url as tokens have it."""
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def number(value: int) -> str:
    """A number as key sets have it."""
    return encoded(value.to_bytes((value.bit_length() + 7) // 8, "big"))


@dataclass
class Signer:
    """A cluster's key, as an API server uses it."""

    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    kid: str = "k1"

    @property
    def algorithm(self) -> str:
        """As in a token's header."""
        if isinstance(self.key, rsa.RSAPrivateKey):
            return "RS256"
        return {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}[self.key.curve.name]

    @property
    def entry(self) -> dict[str, str]:
        """As in a key set."""
        base = {"use": "sig", "kid": self.kid, "alg": self.algorithm}
        public = self.key.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            numbers = public.public_numbers()
            return {**base, "kty": "RSA", "n": number(numbers.n), "e": number(numbers.e)}
        point = public.public_numbers()
        curve = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}[public.curve.name]
        return {**base, "kty": "EC", "crv": curve, "x": number(point.x), "y": number(point.y)}

    def sign(self, message: bytes) -> bytes:
        """As tokens want it."""
        if isinstance(self.key, rsa.RSAPrivateKey):
            return self.key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        size = (self.key.key_size + 7) // 8
        chosen = {32: hashes.SHA256(), 48: hashes.SHA384(), 66: hashes.SHA512()}[size]
        r, s = decode_dss_signature(self.key.sign(message, ec.ECDSA(chosen)))
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")

    def token(self, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
        """One for pod ``team/bot-sft-1``, except as told."""
        head = {"alg": self.algorithm, "kid": self.kid, **(header or {})}
        signed = f"{encoded(head)}.{encoded({**pod_claims(), **claims})}"
        return f"{signed}.{encoded(self.sign(signed.encode()))}"


def pod_claims(name: str = "bot-sft-1", uid: str = "pod-uid", namespace: str = "team") -> dict[str, Any]:
    """What a projected token of a pod says."""
    return {
        "iss": ISSUER,
        "aud": [PROGRESS_AUDIENCE],
        "exp": NOW + 3600,
        "nbf": NOW,
        "sub": f"system:serviceaccount:{namespace}:default",
        "kubernetes.io": {"namespace": namespace, "pod": {"name": name, "uid": uid}},
    }


def a_pod(name: str = "bot-sft-1", uid: str = "pod-uid", job: str = "bot", **labels: str) -> dict[str, Any]:
    """A stage's pod, as in the operator's cache."""
    own = {"finetune.dev/job": job, "finetune.dev/stage": "sft", "app.kubernetes.io/managed-by": "finetune-operator"}
    return {"metadata": {"namespace": "team", "name": name, "uid": uid, "labels": {**own, **labels}}}


@dataclass
class API:
    """The little of an API server that tokens need: reviews, and the public keys."""

    reviews: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Status by token; any other is refused."""
    keys: list[dict[str, str]] = field(default_factory=list)
    down: KubeError | None = None
    asked: int = 0

    @property
    def client(self) -> Client:
        """In place of a real one."""
        return cast(Client, self)

    @property
    def transport(self) -> "API":
        """Of that client."""
        return self

    async def create(self, resource: object, namespace: str | None, obj: dict[str, Any]) -> dict[str, Any]:
        """Review a token."""
        self.asked += 1
        if self.down:
            raise self.down
        assert obj["spec"]["audiences"] == [PROGRESS_AUDIENCE]
        return {"status": self.reviews.get(obj["spec"]["token"], {"authenticated": False})}

    async def request(self, method: str, path: str) -> dict[str, Any]:
        """Give the issuer or the keys."""
        self.asked += 1
        if self.down:
            raise self.down
        return {"issuer": ISSUER} if path == "/.well-known/openid-configuration" else {"keys": self.keys}

    def accept(self, token: str, name: str = "bot-sft-1", uid: str = "pod-uid", **changes: Any) -> None:
        """Know that token as that pod's."""
        extra = {"authentication.kubernetes.io/pod-name": [name], "authentication.kubernetes.io/pod-uid": [uid]}
        user = {"username": "system:serviceaccount:team:default", "extra": extra}
        self.reviews[token] = {"authenticated": True, "audiences": [PROGRESS_AUDIENCE], "user": user, **changes}


DOWN = UnreachableError("POST tokenreviews: refused")


def own_certificate(now: datetime | None = None) -> OwnCertificate:
    """A server's on this machine."""
    return OwnCertificate(["finetune-operator.test.svc", "localhost"], "127.0.0.1", now or datetime.now(UTC))


@contextmanager
def running(server: ProgressServer, own: OwnCertificate) -> Iterator[int]:
    """Serve in a thread of its own; gives the port."""
    ready = threading.Event()
    at: list[int] = []
    stopped: list[Callable[[], None]] = []

    async def serve() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        stopped.append(lambda: loop.call_soon_threadsafe(done.set))
        async with server.serving("127.0.0.1", 0, own.tls) as port:
            at.append(port)
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(60)
        yield at[0]
    finally:
        for stop in stopped:
            stop()
        thread.join()


def post(
    port: int, bundle: str, body: bytes, token: str | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Status and words of the answer."""
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=trusting(bundle))
    given = {"Authorization": f"Bearer {token}"} if token is not None else {}
    try:
        connection.request("POST", PATH, body, {**given, **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read().decode().strip()
    finally:
        connection.close()


class Server:
    """In the operator's place: notes what is posted; ``answer`` gives the status, and may take its time."""

    def __init__(self, own: OwnCertificate) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.answer: Callable[[], int] = lambda: 204
        self.own = own
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.posts.append((self.headers["Authorization"], body))
                self.send_response(outer.answer())
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing."""

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                """A client that went away is what some tests are about."""

        self._server = Quiet(("127.0.0.1", 0), Handler)
        # Shaken hands by the thread of the request, so that one that hangs does not stop the others.
        self._server.socket = own.tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self._server.server_port}/v1/progress"

    @contextmanager
    def running(self) -> Iterator[None]:
        """For as long as the block."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    @property
    def steps(self) -> list[int]:
        """Of the updates that came."""
        return [body["step"] for _, body in self.posts]
