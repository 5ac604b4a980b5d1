"""One leader among replicas, by a Lease; and a fence for whoever does not know yet that it is not the leader any more.

A Lease does not stop a frozen leader from writing once it thaws. Three things do: ``check``, which compares the clock
with the last renewal before each write, whatever the tasks of a thawed process run first; the cancelling of the leading
task at the renew deadline, well before others may take over; and the preconditions on the writes themselves.

Other machines' clocks are never compared with ours: a candidate takes over when it has itself seen the same record for
as long as the record says.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from finetune_operator.kube.backoff import jitter
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import LeaseLostError, NotFoundError, NotLeadingError
from finetune_operator.kube.objects import Object
from finetune_operator.kube.settings import LeaseSettings

_log = logging.getLogger(__name__)
LEASES = Resource("coordination.k8s.io", "v1", "leases")

Clock = Callable[[], float]


def boottime() -> float:
    """Seconds that pass while the machine sleeps, too (CLOCK_BOOTTIME), where there are such."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Elector:
    """Takes part in one election. ``identity`` must differ between replicas, restarts included."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        name: str,
        identity: str,
        settings: LeaseSettings | None = None,
        *,
        clock: Clock = boottime,
    ) -> None:
        self._client = client.without_retries()
        self._namespace = namespace
        self._name = name
        self.identity = identity
        self._settings = settings or LeaseSettings()
        self._clock = clock
        self._lease: Object | None = None
        """As last read or written by us."""
        self._seen: tuple[object, float] = (None, 0.0)
        """The record (holder, renewal), and when we first saw it so."""
        self._renewed: float | None = None
        """When our last successful renewal was sent; None: we do not lead."""
        client.transport.metrics.is_leader.labels(name).set_function(lambda: float(self.leading))

    @property
    def leading(self) -> bool:
        """Whether we may write at this moment."""
        return self._renewed is not None and self._clock() < self._renewed + self._settings.renew_deadline

    @property
    def holder(self) -> str:
        """Who led when we last looked; empty if nobody did, or we never saw."""
        return str(_spec(self._lease).get("holderIdentity") or "")

    def check(self) -> None:
        """Raise NotLeadingError unless we may write at this moment. Cheap: meant to be called before every write."""
        if not self.leading:
            raise NotLeadingError(f"{self.identity} does not hold the lease {self._namespace}/{self._name}")

    async def run(self, on_leading: Callable[[], Awaitable[None]]) -> None:
        """Wait for our turn, then run ``on_leading`` for as long as we lead.

        Returns when ``on_leading`` does, and raises what it raises. Raises LeaseLostError when the lease could not be
        renewed in time: ``on_leading`` has been cancelled then, and the process should end. Cancel this to stop in
        order: ``on_leading`` is cancelled and waited for, then the lease is given back, so that the next leader starts
        at once.
        """
        while not await self._attempt():
            await asyncio.sleep(jitter(self._settings.retry, 0.2))
        _log.info("%s leads (%s/%s)", self.identity, self._namespace, self._name)
        try:
            await self._lead(on_leading)
        finally:
            await self._release()

    async def _lead(self, on_leading: Callable[[], Awaitable[None]]) -> None:
        work = asyncio.ensure_future(on_leading())
        renewing = asyncio.create_task(self._renew())
        try:
            await asyncio.wait((work, renewing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Renewed until the work has ended: it may still have something to write.
            for task in (work, renewing):
                task.cancel()
                await asyncio.wait((task,))
        failed = None if work.cancelled() else work.exception()
        if not renewing.cancelled() and (lost := renewing.exception()) is not None:
            raise lost from failed
        if failed is not None:
            raise failed

    async def _renew(self) -> None:
        """Renew until that fails for longer than the deadline, then raise LeaseLostError: no later, no attempt more."""
        while True:
            left = self._left()
            await asyncio.sleep(min(jitter(self._settings.retry, 0.2), max(0.0, left)))
            if self._left() <= 0:
                break
            await self._attempt()
            if self._renewed is None:  # somebody else holds it: no need to wait for the deadline
                break
        self._renewed = None
        raise LeaseLostError(
            f"{self.identity} lost the lease {self._namespace}/{self._name}; {self.holder or 'nobody'} holds it"
        )

    def _left(self) -> float:
        """Seconds to the renew deadline."""
        if self._renewed is None:
            return 0.0
        return self._renewed + self._settings.renew_deadline - self._clock()

    async def _attempt(self) -> bool:
        """Take the lease or renew it, in bounded time. Whatever goes wrong, it is one failed attempt."""
        limit = self._settings.attempt_timeout
        if self._renewed is not None:
            limit = min(limit, max(0.0, self._left()))
        try:
            async with asyncio.timeout(limit):
                return await self._take_or_renew()
        except Exception as error:
            _log.warning(
                "%s: no lease %s/%s: %s", self.identity, self._namespace, self._name, str(error) or "timed out"
            )
            return False

    async def _take_or_renew(self) -> bool:
        try:
            lease = await self._client.get(LEASES, self._namespace, self._name)
        except NotFoundError:
            sent = self._clock()
            self._lease = await self._client.create(LEASES, self._namespace, self._wished(None))
            self._renewed = sent
            return True
        self._lease = lease
        if self.holder != self.identity:
            led, self._renewed = self._renewed is not None, None
            if led or not self._expired(lease):
                return False
        # Counted from before it is sent: others count from when they see it, which is later.
        sent = self._clock()
        if self._renewed is not None and self._left() <= 0:
            return False  # frozen between reading and now
        self._lease = await self._client.replace(LEASES, self._namespace, self._name, self._wished(lease))
        self._renewed = sent
        return True

    def _expired(self, lease: Object) -> bool:
        """Whether nobody holds it, or we have seen it unchanged for as long as its holder asked for."""
        spec = _spec(lease)
        record = (spec.get("holderIdentity"), spec.get("renewTime"), spec.get("leaseTransitions"))
        now = self._clock()
        if self._seen[0] != record:
            self._seen = (record, now)
        if not spec.get("holderIdentity"):
            return True
        duration = float(spec.get("leaseDurationSeconds") or self._settings.duration)
        return now >= self._seen[1] + duration

    def _wished(self, lease: Object | None) -> Object:
        """The Lease as ours; with the version that we read, so that of two who try one fails."""
        old = _spec(lease)
        ours = old.get("holderIdentity") == self.identity
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": lease["metadata"] if lease else {"name": self._name, "namespace": self._namespace},
            "spec": {
                **old,
                "holderIdentity": self.identity,
                "leaseDurationSeconds": int(self._settings.duration),
                "acquireTime": old.get("acquireTime", now) if ours else now,
                "renewTime": now,
                "leaseTransitions": int(old.get("leaseTransitions") or 0) + (0 if ours or lease is None else 1),
            },
        }

    async def _release(self) -> None:
        """Give it back if it is surely still ours; if that fails, it runs out by itself."""
        ours, self._renewed = self.leading, None
        if not ours:
            return
        try:
            async with asyncio.timeout(self._settings.attempt_timeout):
                # Read anew: a renewal may have been cancelled after the server had carried it out.
                lease = await self._client.get(LEASES, self._namespace, self._name)
                if _spec(lease).get("holderIdentity") == self.identity:
                    spec = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
                    await self._client.replace(LEASES, self._namespace, self._name, {**lease, "spec": spec})
        except Exception as error:
            _log.warning("%s could not give the lease back: %s", self.identity, str(error) or "timed out")


def _spec(lease: Object | None) -> dict[str, Any]:
    return (lease or {}).get("spec") or {}
