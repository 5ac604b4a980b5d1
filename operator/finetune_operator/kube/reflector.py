"""Keeps a store true to the apiserver: one paged LIST, then a WATCH for as long as it holds.

Whatever ends a watch, it goes on from the last version that it saw; only when the server has forgotten that version, or
stumbles again and again, everything is listed again and told as the difference. So every handler sees every object's
latest state, though not every state in between, and the last state of each that was deleted.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import aclosing

from finetune_operator.kube.backoff import Backoff
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import GoneError, KubeError, RetryableError, SilentError, UnreachableError
from finetune_operator.kube.objects import Object, key_of
from finetune_operator.kube.settings import ReflectorSettings
from finetune_operator.kube.store import Change, IndexFunction, Store

_log = logging.getLogger(__name__)
_random = random.Random()

OnChange = Callable[[Object | None, Object | None], None]
"""Called with the object before and after; None for not there. Quick, and it does not raise: put a key in a queue."""

_BRIEF_SECONDS = 1.0
"""A watch that ends sooner than this without an event did not work, whatever the server says."""
_PATIENCE = 3
"""After so many failures more, in a row, our version itself may be what the server stumbles over: list again."""


def _ignore(old: Object | None, new: Object | None) -> None:
    """For whoever only reads the store."""


class Reflector:
    """One resource, in one namespace or all, with one label selector."""

    def __init__(
        self,
        client: Client,
        resource: Resource,
        namespace: str | None = None,
        label_selector: str = "",
        on_change: OnChange = _ignore,
        *,
        indexes: Mapping[str, IndexFunction] | None = None,
        transform: Callable[[Object], Object] | None = None,
        settings: ReflectorSettings | None = None,
    ) -> None:
        """``indexes``: for ``store.by_index``. ``transform`` drops what nobody needs: a Job takes 24 KB with its pod
        template and 8 KB without. It may change the object that it is given, and must leave its metadata.
        """
        self.store = Store(indexes)
        self._client = client
        self._resource = resource
        self._namespace = namespace
        self._selector = label_selector
        self._on_change = on_change
        self._transform = transform
        self._settings = settings or ReflectorSettings()
        self._backoff = Backoff(self._settings.first_wait, self._settings.longest_wait)
        self._synced = asyncio.Event()
        self._version = ""
        """Where the watch goes on; empty: list first."""

    @property
    def synced(self) -> bool:
        """Whether the store has held everything at least once."""
        return self.store.synced

    async def wait_synced(self) -> None:
        """Return once it has."""
        await self._synced.wait()

    async def run(self) -> None:
        """Until cancelled. No apiserver error ends it: it tries again, backing off while nothing at all arrives."""
        async with asyncio.TaskGroup() as tasks:
            if self._settings.resync > 0:
                tasks.create_task(self._resync())
            await self._reflect()

    async def _reflect(self) -> None:
        words: KubeError
        while True:
            try:
                if not self._version:
                    await self._list()
                if await self._watch():
                    continue
            except GoneError as error:
                cause, words = "gone", error
                self._version = ""
            except SilentError:
                # Half-open, or nothing happened: the silence was wait enough, and a dead server refuses the next one.
                self._count("silent")
                continue
            except RetryableError as error:
                cause, words = ("unreachable" if isinstance(error, UnreachableError) else "refused"), error
                if self._backoff.failures >= _PATIENCE:
                    self._version = ""
            except KubeError as error:
                cause, words = "refused", error
                self._version = ""
            else:
                cause, words = "brief", UnreachableError("the watch ended at once, without an event")
            self._count(cause)
            wait = self._backoff.next()
            _log.log(
                logging.INFO if self._backoff.failures == 1 else logging.WARNING,
                "%s: %s; again in %.1f s",
                self._resource,
                words,
                wait,
            )
            await asyncio.sleep(wait)

    async def _list(self) -> None:
        """Take in everything, page by page, so that no second copy of it all is ever held; then drop what is gone."""
        seen: set[str] = set()
        self._client.transport.metrics.lists.labels(str(self._resource)).inc()
        pages = self._client.pages(
            self._resource, self._namespace, label_selector=self._selector, limit=self._settings.page
        )
        version = ""
        async with aclosing(pages):
            async for page in pages:
                version = page.resource_version
                for obj in page.items:
                    seen.add(key_of(obj))
                    self._tell(self.store.put(self._slim(obj)))
                # A page is a lot of work at once.
                await asyncio.sleep(0)
        for key in self.store.keys() - seen:
            self._tell(self.store.remove(key))
        self._version = version
        self.store.synced = True
        self._synced.set()

    async def _watch(self) -> bool:
        """Follow one watch to its end; whether that was an end in order."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        arrived = False
        events = self._client.watch(
            self._resource,
            self._namespace,
            resource_version=self._version,
            label_selector=self._selector,
            timeout=_random.uniform(self._settings.shortest_watch, self._settings.longest_watch),
        )
        async with aclosing(events):
            async for kind, obj in events:
                # Here, not when the stream ends: a stream may last for hours, and the next failure is a new one.
                arrived = True
                self._backoff.reset()
                self._version = obj["metadata"]["resourceVersion"]
                if kind in ("ADDED", "MODIFIED"):
                    self._tell(self.store.put(self._slim(obj)))
                elif kind == "DELETED":
                    self._tell(self.store.remove(key_of(obj), self._slim(obj)))
        in_order = arrived or loop.time() - started >= _BRIEF_SECONDS
        if in_order:
            self._count("ended")
        return in_order

    def _slim(self, obj: Object) -> Object:
        """managedFields are a third of many objects, and nobody here reads them."""
        obj["metadata"].pop("managedFields", None)
        return self._transform(obj) if self._transform else obj

    def _tell(self, changes: list[Change]) -> None:
        for old, new in changes:
            self._on_change(old, new)
        self._client.transport.metrics.cached.labels(str(self._resource)).set(len(self.store))

    def _count(self, cause: str) -> None:
        self._client.transport.metrics.watch_restarts.labels(str(self._resource), cause).inc()

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self._settings.resync)
            if self.synced:
                for number, key in enumerate(self.store.keys()):
                    if (obj := self.store.at(key)) is not None:
                        self._on_change(obj, obj)
                    if number % 500 == 499:
                        await asyncio.sleep(0)
