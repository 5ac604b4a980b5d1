"""Which pod a progress update comes from: what its projected service-account token proves.

Two ways to know: the API server is asked (``TokenReviews``), or its public keys are fetched and the token is checked
here (``SigningKeys``), for an operator that has rights in one namespace only.
"""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from finetune_operator.jwt import (
    LONGEST,
    InvalidTokenError,
    Key,
    expiry,
    key_id,
    keys_of,
    unverified_claims,
    verified_claims,
)
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import KubeError, UnreachableError
from finetune_operator.plan.pods import PROGRESS_AUDIENCE

_log = logging.getLogger("finetune.progress")
_Value = TypeVar("_Value")

TOKEN_REVIEWS = Resource("authentication.k8s.io", "v1", "tokenreviews", namespaced=False)
_ACCOUNT = "system:serviceaccount:"
_EXTRA = "authentication.kubernetes.io/"
_ACCEPTED = 10_000
"""Tokens that are remembered, some 300 bytes each; a token beyond that is asked for again."""
_REFUSED = 1_000
_REFUSED_SECONDS = 10.0
"""Not longer: the API server refuses good tokens, too, while a key has not reached all its replicas."""
_AT_ONCE = 8
"""Reviews under way at a time, whatever arrives."""
_KEYS_SECONDS = 3600.0
"""After which the cluster's keys are fetched anew, so that one that was withdrawn is trusted no longer."""
_FETCH_SECONDS = 30.0
"""Between two fetches, however many unknown keys are named."""


@dataclass(frozen=True)
class PodIdentity:
    """A pod, as a token names it. That it still runs, and is a stage's, the token does not say."""

    namespace: str
    name: str
    uid: str


class Verifier(Protocol):
    """Tells whose a token is."""

    async def verify(self, token: str) -> PodIdentity:
        """Raises InvalidTokenError, or KubeError if the API server is needed and does not answer."""


class TokenReviews:
    """Asks the API server, once for each token until it ends. Needs the right to create ``tokenreviews``."""

    def __init__(self, client: Client, *, clock: Callable[[], float] = time.time) -> None:
        """``client``: one without a fence, since followers verify, too."""
        self._client = client
        self._clock = clock
        self._accepted: OrderedDict[bytes, tuple[PodIdentity, float]] = OrderedDict()
        self._refused: OrderedDict[bytes, float] = OrderedDict()
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def verify(self, token: str) -> PodIdentity:
        """As ``Verifier`` says."""
        if len(token) > LONGEST:
            raise InvalidTokenError("not a token")
        key = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        if (found := self._accepted.get(key)) is not None and self._clock() < found[1]:
            self._accepted.move_to_end(key)
            return found[0]
        if self._clock() < self._refused.get(key, 0.0):
            raise InvalidTokenError("the token was refused a moment ago")
        # What is no token for us at all is not worth a request; that it is true only the API server can say.
        ends = expiry(unverified_claims(token))
        try:
            identity = await self._review(token)
        except InvalidTokenError:
            _remember(self._refused, key, self._clock() + _REFUSED_SECONDS, _REFUSED)
            raise
        _remember(self._accepted, key, (identity, ends), _ACCEPTED)
        return identity

    async def _review(self, token: str) -> PodIdentity:
        wanted = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [PROGRESS_AUDIENCE]},
        }
        async with self._slots:
            answer = await self._client.create(TOKEN_REVIEWS, None, wanted)
        return _reviewed(answer.get("status") or {})


def _reviewed(status: Mapping[str, Any]) -> PodIdentity:
    if not status.get("authenticated"):
        raise InvalidTokenError("the API server does not know the token")
    # Without ours among them the token was only held against the API server's own audience.
    if PROGRESS_AUDIENCE not in (status.get("audiences") or ()):
        raise InvalidTokenError(f"the token is not for the audience {PROGRESS_AUDIENCE}")
    user = status.get("user") or {}
    extra = user.get("extra") or {}
    account = str(user.get("username", ""))
    namespace = account.removeprefix(_ACCOUNT).partition(":")[0] if account.startswith(_ACCOUNT) else ""
    name, uid = ([*(extra.get(f"{_EXTRA}{key}") or ()), ""][0] for key in ("pod-name", "pod-uid"))
    return _identity(namespace, name, uid)


class SigningKeys:
    """Checks tokens here, against the API server's public keys, which every service account may read."""

    def __init__(
        self, client: Client, *, clock: Callable[[], float] = time.time, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        """``clock`` is compared with tokens, ``ticks`` measures the age of the keys."""
        self._client = client
        self._clock = clock
        self._ticks = ticks
        self._issuer = ""
        self._keys: dict[str, Key] = {}
        self._fetched = self._tried = float("-inf")
        self._lock = asyncio.Lock()

    async def verify(self, token: str) -> PodIdentity:
        """As ``Verifier`` says."""
        named = key_id(token)
        if self._wants(named):
            async with self._lock:
                if self._wants(named):  # not if another has just fetched them
                    await self._fetch()
        if not self._keys:
            raise UnreachableError("the cluster's keys could not be fetched yet")
        claims = verified_claims(token, self._keys, issuer=self._issuer, audience=PROGRESS_AUDIENCE, now=self._clock())
        about = claims.get("kubernetes.io")
        pod = about.get("pod") if isinstance(about, dict) else None
        if not isinstance(about, dict) or not isinstance(pod, dict):
            raise InvalidTokenError("the token is not bound to a pod")
        return _identity(about.get("namespace"), pod.get("name"), pod.get("uid"))

    def _wants(self, named: str) -> bool:
        if self._ticks() < self._tried + _FETCH_SECONDS:
            return False
        return named not in self._keys or self._ticks() >= self._fetched + _KEYS_SECONDS

    async def _fetch(self) -> None:
        self._tried = self._ticks()
        try:
            # The key set of the API server itself: ``jwks_uri`` may name a place that we cannot reach.
            found = await self._client.transport.request("GET", "/.well-known/openid-configuration")
            keys = keys_of(await self._client.transport.request("GET", "/openid/v1/jwks"))
        except KubeError as error:
            _log.warning("cannot fetch the cluster's keys, going on with those that are known: %s", error)
            return
        self._issuer, self._keys = str(found.get("issuer", "")), keys
        self._fetched = self._tried


def _identity(namespace: object, name: object, uid: object) -> PodIdentity:
    if not (
        isinstance(namespace, str) and isinstance(name, str) and isinstance(uid, str) and namespace and name and uid
    ):
        raise InvalidTokenError("the token is not bound to a pod")
    return PodIdentity(namespace, name, uid)


def _remember(memory: OrderedDict[bytes, _Value], key: bytes, value: _Value, most: int) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > most:
        memory.popitem(last=False)
