"""Keys that wait for a worker: each once, none with two workers, failing ones ever later.

The event loop is the clock: its ``time()`` decides when something is due.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from finetune_operator.kube.backoff import exponential, jitter
from finetune_operator.kube.metrics import Metrics
from finetune_operator.kube.settings import QueueSettings

K = TypeVar("K", bound=Hashable)


class QueueClosedError(Exception):
    """Nothing will be handed out any more."""


class WorkQueue(Generic[K]):
    """client-go's rate-limiting queue, for one event loop.

    Memory is bounded by the number of different keys: adding one that waits changes nothing, and of two times at which
    the same key is due the earlier counts.
    """

    def __init__(self, name: str = "", settings: QueueSettings | None = None, metrics: Metrics | None = None) -> None:
        self.name = name
        self.settings = settings or QueueSettings()
        self.metrics = metrics or Metrics()
        self._loop = asyncio.get_running_loop()
        self._ready: deque[K] = deque()
        self._urgent: deque[K] = deque()
        """Ready too, and taken first."""
        self._added: dict[K, float] = {}
        """When each key that is ready, or dirty while it is being worked on, was added."""
        self._working: set[K] = set()
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        """May hold times that ``_due`` has overruled."""
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._failures: dict[K, int] = {}
        self._bucket = (float(self.settings.burst), self._loop.time())
        """Tokens at that time; negative: retries that already wait for one."""
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._closed = False

    def __len__(self) -> int:
        """Keys that a worker could take now."""
        return len(self._ready) + len(self._urgent)

    def add(self, key: K, *, urgent: bool = False) -> None:
        """Have it worked on soon; once more, if it is being worked on now.

        ``urgent``: before all that is not. One that waits already, or is being worked on, keeps its place.
        """
        if self._closed or key in self._added:
            return
        self._added[key] = self._loop.time()
        self.metrics.adds.labels(self.name).inc()
        if key not in self._working:
            self._make_ready(key, urgent)

    def add_after(self, key: K, seconds: float) -> None:
        """Have it worked on in so many seconds."""
        if seconds <= 0:
            self.add(key)
            return
        due = self._loop.time() + seconds
        if self._closed or self._due.get(key, due + 1) <= due:
            return
        self._due[key] = due
        self._number += 1
        heapq.heappush(self._heap, (due, self._number, key))
        if len(self._heap) > 2 * len(self._due) + 64:  # mostly overruled times
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
        self._set_timer()

    def retry(self, key: K) -> float:
        """Have it worked on again after a failure; in how many seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        own = jitter(exponential(self.settings.first_wait, self.settings.longest_wait, failures), 0.1)
        wait = max(own, self._wait_for_token())
        self.metrics.retries.labels(self.name).inc()
        self.add_after(key, wait)
        return wait

    def forget(self, key: K) -> None:
        """It worked: its next failure is its first."""
        self._failures.pop(key, None)

    def failures(self, key: K) -> int:
        """In a row, until now."""
        return self._failures.get(key, 0)

    @asynccontextmanager
    async def take(self) -> AsyncIterator[K]:
        """The next key, ours alone until the block ends. Raises QueueClosedError once the queue is closed."""
        while not len(self) and not self._closed:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                waiter.cancel()
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif len(self):
                    self._wake()  # it was told, but does not take it: somebody else must
                raise
        if self._closed:
            raise QueueClosedError
        key = (self._urgent or self._ready).popleft()
        self.metrics.depth.labels(self.name).set(len(self))
        self.metrics.queue_time.labels(self.name).observe(self._loop.time() - self._added.pop(key))
        self._working.add(key)
        try:
            yield key
        finally:
            self._working.discard(key)
            if key in self._added:
                self._make_ready(key)

    def close(self) -> None:
        """Hand out nothing more: whoever waits in ``take``, or comes to it, gets QueueClosedError."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        while self._waiters:
            self._wake()

    def _make_ready(self, key: K, urgent: bool = False) -> None:
        (self._urgent if urgent else self._ready).append(key)
        self.metrics.depth.labels(self.name).set(len(self))
        self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wait_for_token(self) -> float:
        """Seconds until this retry's turn: a token bucket that may be overdrawn, so that turns are spaced out."""
        tokens, then = self._bucket
        now = self._loop.time()
        tokens = min(float(self.settings.burst), tokens + (now - then) * self.settings.rate) - 1
        self._bucket = (tokens, now)
        return max(0.0, -tokens / self.settings.rate)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._heap[0][0], self._move_due) if self._heap else None

    def _move_due(self) -> None:
        now = self._loop.time()
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)
        self._set_timer()
