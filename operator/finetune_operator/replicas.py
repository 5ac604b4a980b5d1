"""What the operator's replicas tell each other: where each is reached, and which certificates it shows.

One ConfigMap in the operator's namespace, a key for each replica, written by that replica alone and watched by all. It
holds nothing secret.
"""

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from finetune_operator.certificates import OwnCertificate, trusting, valid_until
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import KubeError, NotFoundError
from finetune_operator.kube.objects import Object
from finetune_operator.kube.reflector import Reflector

_log = logging.getLogger("finetune.progress")

CONFIG_MAPS = Resource("", "v1", "configmaps")
REPLICAS = "finetune-operator-replicas"
LABELS = {"app.kubernetes.io/managed-by": "finetune-operator", "app.kubernetes.io/component": "replicas"}
MOST = 32
"""Entries that are kept. A replica that was killed leaves its own, until its certificates end."""
_LOOK_SECONDS = 1.0
_PUBLISH_SECONDS = 5.0
"""Between two attempts to write our entry: our own write must come back first."""
_FAREWELL_SECONDS = 2.0


@dataclass(frozen=True)
class Replica:
    """What one has published."""

    url: str
    """``https://10.1.2.3:9443``: its pod, not the Service."""
    certificates: tuple[tuple[str, datetime], ...]
    """As PEM, with the end of each."""

    @property
    def ends(self) -> datetime:
        """Of its youngest certificate."""
        return max(end for _, end in self.certificates)

    @cached_property
    def trust(self) -> ssl.SSLContext:
        """A client that accepts this replica and no other."""
        return trusting("".join(pem for pem, _ in self.certificates))


def url_of(address: str, port: int) -> str:
    """Of a pod's server, by the pod's IP address."""
    return f"https://[{address}]:{port}" if ":" in address else f"https://{address}:{port}"


def parse(text: str) -> Replica:
    """An entry as it stands in the ConfigMap. Raises ValueError."""
    try:
        said = json.loads(text)
        certificates = tuple((str(pem), valid_until(str(pem))) for pem in said["certificates"])
        url = str(said["url"])
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not an entry: {error!r}") from None
    if not certificates or not url.startswith("https://"):
        raise ValueError("not an entry: a url and certificates are needed")
    return Replica(url, certificates)


def _now() -> datetime:
    return datetime.now(UTC)


class Replicas:
    """All replicas, this one included. ``reflector`` is the caller's to run, on leader and followers alike."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        pod: str,
        url: str,
        own: OwnCertificate,
        *,
        clock: Callable[[], datetime] = _now,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """``client``: one without a fence; ``url``: where this pod's server is reached."""
        selector = ",".join(f"{name}={value}" for name, value in LABELS.items())
        self.reflector = Reflector(client, CONFIG_MAPS, namespace, selector, self._on_change)
        self._client = client
        self._namespace = namespace
        self._pod = pod
        self._url = url
        self._own = own
        self._clock = clock
        self._ticks = ticks
        self._texts: dict[str, str] = {}
        self._replicas: dict[str, Replica] = {}
        self._tried = float("-inf")

    def get(self, pod: str) -> Replica | None:
        """The replica in that pod, if it has published itself."""
        return self._replicas.get(pod)

    def bundle(self) -> str:
        """All certificates that are valid now, as PEM; ours even before it is published. The same at every replica."""
        now = self._clock()
        valid = {pem for replica in self._replicas.values() for pem, end in replica.certificates if end > now}
        return "".join(sorted({*valid, *self._own.published}))

    async def run(self) -> None:
        """Until cancelled: keep our certificate young and our entry true; in the end take it out."""
        try:
            while True:
                self._own.renew(self._clock())
                wished = self._entry()
                unlike = self.reflector.synced and self._texts.get(self._pod) != wished
                if unlike and self._ticks() >= self._tried + _PUBLISH_SECONDS:
                    self._tried = self._ticks()
                    await self._publish(wished)
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            with suppress(KubeError, TimeoutError):
                async with asyncio.timeout(_FAREWELL_SECONDS):
                    await self._patch(self._client, {self._pod: None})

    async def prune(self, client: Client) -> None:
        """The leader's: take out entries that are over, cannot be read, or are too many. ``client``: the fenced one."""
        now = self._clock()
        valid = sorted((n for n, r in self._replicas.items() if r.ends > now), key=lambda n: self._replicas[n].ends)
        over = set(self._texts) - set(valid[-MOST:]) - {self._pod}
        if over:
            await self._patch(client, dict.fromkeys(sorted(over)))

    def _entry(self) -> str:
        return json.dumps({"url": self._url, "certificates": self._own.published})

    async def _publish(self, text: str) -> None:
        try:
            try:
                await self._patch(self._client, {self._pod: text})
            except NotFoundError:
                made = {
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {"name": REPLICAS, "namespace": self._namespace, "labels": LABELS},
                    "data": {self._pod: text},
                }
                # Applied, not created: the right to that is limited to this name. Another replica may be as fast, and
                # each, as a manager of its own, only adds its key.
                await self._client.apply(CONFIG_MAPS, self._namespace, made, self._pod)
        except KubeError as error:
            _log.warning("cannot publish our certificate, progress may not arrive: %s", error)

    async def _patch(self, client: Client, data: dict[str, str | None]) -> None:
        # The labels too: without them nobody would see it.
        await client.patch(CONFIG_MAPS, self._namespace, REPLICAS, {"metadata": {"labels": LABELS}, "data": data})

    def _on_change(self, old: Object | None, new: Object | None) -> None:
        if (new or old or {})["metadata"]["name"] != REPLICAS:
            return
        texts = {str(k): str(v) for k, v in ((new or {}).get("data") or {}).items()}
        same = {name for name in texts if texts[name] == self._texts.get(name)}
        replicas = {name: self._replicas[name] for name in same if name in self._replicas}
        for name in texts.keys() - same:
            try:
                replicas[name] = parse(texts[name])
            except ValueError as error:
                _log.warning("ConfigMap %s: %s: %s", REPLICAS, name, error)
        self._texts, self._replicas = texts, replicas
