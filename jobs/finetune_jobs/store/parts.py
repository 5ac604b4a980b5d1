"""What uploads and downloads in parts share."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from finetune_jobs.store.calls import AbandonedError

T = TypeVar("T")
MOST_PARTS = 10_000
"""Of one upload, in S3."""


def part_size(size: int, least: int) -> int:
    """``least`` bytes, raised to whole MiB where ``size`` would else take more than 10,000 parts."""
    needed = -(-size // MOST_PARTS)
    return least if needed <= least else -(-needed // (1 << 20)) << 20


def results(parts: Sequence[Future[T]]) -> list[T]:
    """Wait for all; raises the error that began it, not that of a part which was then given up."""
    errors = [error for part in parts if (error := part.exception()) is not None]
    causes = [error for error in errors if not isinstance(error, AbandonedError)] or errors
    if causes:
        raise causes[0]
    return [part.result() for part in parts]


class Meter:
    """Adds up what several threads have moved and tells the callback after each part."""

    def __init__(self, report: Callable[[str, int, int], None] | None, name: str, total: int) -> None:
        self._report, self._name, self._total = report, name, total
        self._lock = threading.Lock()
        self.done = 0

    def add(self, count: int) -> None:
        """So many bytes more are where they belong."""
        with self._lock:
            self.done += count
            if self._report is not None:
                self._report(self._name, self.done, self._total)
