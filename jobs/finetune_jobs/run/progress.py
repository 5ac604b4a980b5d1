"""How far a stage is, for people. Never load-bearing: if it cannot be written, the work goes on."""

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.status import CheckpointStatus, MetricValue
from finetune_api.status import Progress as ProgressStatus
from finetune_jobs.run.poster import Poster

_log = logging.getLogger("finetune.progress")


class Progress:
    """Writes the latest state to a file that is replaced as a whole, at most twice a second, and tells the operator."""

    def __init__(self, path: Path | None, poster: Poster | None = None, *, interval: float = 0.5) -> None:
        self._path = path
        self._poster = poster
        self._interval = interval
        self._written = float("-inf")
        self._lock = threading.Lock()  # checkpoints are reported by the thread that uploads them
        self._first: tuple[float, int] | None = None
        self._status = ProgressStatus()
        self._checkpoint: CheckpointStatus | None = None

    def report(
        self,
        step: int,
        total_steps: int,
        metrics: Mapping[str, float] | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Say where the stage is: ``step`` of ``total_steps`` (any unit), with figures worth a look."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, step)
        if now - self._written < self._interval and step < total_steps:
            return
        since, first = self._first
        done = step - first
        eta = round((now - since) / done * (total_steps - step)) if done > 0 else None
        self._status = ProgressStatus(
            step=step,
            total_steps=total_steps,
            percent=int(100 * step / total_steps) if total_steps else 0,
            eta_seconds=eta,
            tokens_per_second=round(tokens_per_second) if tokens_per_second else None,
            metrics=[MetricValue(name=k, value=f"{v:.4g}") for k, v in list((metrics or {}).items())[:16]],
            updated_time=datetime.now(UTC),
        )
        self._write(now)

    def checkpoint(self, step: int, uri: str) -> None:
        """A checkpoint is committed."""
        self._checkpoint = CheckpointStatus(step=step, uri=uri)
        self._write(time.monotonic())

    def close(self) -> None:
        """Let the last update out; two seconds at most."""
        if self._poster is not None:
            self._poster.close()

    def _write(self, now: float) -> None:
        self._written = now
        if self._path is None and self._poster is None:
            return
        content = self._status.model_dump(mode="json", by_alias=True)
        content["checkpoint"] = self._checkpoint.model_dump(mode="json", by_alias=True) if self._checkpoint else None
        text = json.dumps(content)
        if self._poster is not None:
            self._poster.offer(text.encode())
        if self._path is None:
            return
        temporary = self._path.with_suffix(".tmp")
        try:
            with self._lock:
                temporary.write_text(text)
                os.replace(temporary, self._path)
        except OSError as error:
            _log.debug("progress was not written: %s", error)
