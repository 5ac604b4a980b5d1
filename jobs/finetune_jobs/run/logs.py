"""One JSON object a line on standard error, each with job, stage and attempt; at the end the same lines in the store.

A pod's log goes with the pod. The copy in the store is what ``kubectl finetune logs`` shows afterwards; it is never
load-bearing: an attempt that is killed, or whose store is away, leaves none.
"""

import json
import logging
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from finetune_api.stage import StageRun

if TYPE_CHECKING:
    from finetune_jobs.store.client import Store

_KEPT_BYTES = 8 << 20
_UPLOAD_SECONDS = 5.0
"""Of the grace period at most: whoever was told to stop has more important things to save before."""


class Kept(logging.Handler):
    """The last 8 MiB of this process's lines, in memory: a full disk, of which they may tell, does not lose them."""

    def __init__(self, limit: int = _KEPT_BYTES) -> None:
        super().__init__()
        self._limit = limit
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._place: tuple[Store, str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line; the oldest go when there is no room."""
        line = f"{self.format(record)}\n".encode(errors="replace")[-self._limit :]
        self._lines.append(line)
        self._size += len(line)
        while self._size > self._limit:
            self._size -= len(self._lines.popleft())

    def belongs_at(self, store: "Store", key: str) -> None:
        """Where the lines go at the end; the last word counts, without one they go nowhere."""
        self._place = (store, key)

    def upload(self, seconds: float = _UPLOAD_SECONDS) -> bool:
        """Bring them to the store; whether that was done in so many seconds. Never raises."""
        if self._place is None or not self._lines:
            return False
        store, key = self._place
        self.acquire()
        data = b"".join(self._lines)
        self.release()
        given_up, done = threading.Event(), threading.Event()

        def put() -> None:
            try:
                store.put_bytes(key, data, abandoned=given_up.is_set)
                done.set()
            except Exception as error:
                if not given_up.is_set():
                    logging.getLogger("finetune.logs").warning("the log was not brought to the store: %s", error)

        # A thread of its own, since a request to a store that is away cannot be broken off; it ends with the process.
        thread = threading.Thread(target=put, name="log-upload", daemon=True)
        thread.start()
        thread.join(seconds)
        given_up.set()
        return done.is_set()


class _Json(logging.Formatter):
    def __init__(self, run: StageRun) -> None:
        super().__init__()
        self._fixed = {"job": f"{run.job.namespace}/{run.job.name}", "stage": run.stage, "attempt": run.attempt}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._fixed,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(run: StageRun, kept: Kept, level: int = logging.INFO) -> None:
    """Send everything from ``level`` up to standard error and to ``kept``; libraries speak from WARNING up only."""
    handlers = [logging.StreamHandler(sys.stderr), kept]
    for handler in handlers:
        handler.setFormatter(_Json(run))
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(logging.WARNING)
    logging.getLogger("finetune").setLevel(level)
    logging.captureWarnings(True)
