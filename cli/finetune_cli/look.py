"""Jobs of this machine as they are now, for the commands."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.status import JobStatus, StageState
from finetune_api.types import FineTuneJob
from finetune_cli.access import opened
from finetune_cli.errors import CommandError
from finetune_cli.job import LogLine, Told
from finetune_cli.ledger import JobLedger
from finetune_operator.plan.status import holds

if TYPE_CHECKING:
    from finetune_jobs.store.client import Store

_TURN_SECONDS = 0.5


def truthful(ledger: JobLedger) -> JobStatus:
    """The status; where it says that something runs although nobody runs it, it says so instead."""
    status = ledger.status()
    ended = any(holds(status, kind) for kind in ("Complete", "Failed", "Suspended"))
    if ended or ledger.running:
        return status
    stages = [
        s.model_copy(update={"state": StageState.SUSPENDED, "message": "the runner is gone"})
        if s.state in _ACTIVE
        else s
        for s in status.stages
    ]
    words = f"Stopped; `finetune run {ledger.record().file}` goes on"
    return status.model_copy(update={"summary": words, "eta": "", "stages": stages})


_ACTIVE = (StageState.QUEUED, StageState.PENDING, StageState.RUNNING, StageState.RETRYING)


class LocalJob:
    """A job whose records are on this machine."""

    command = "finetune"

    def __init__(self, ledger: JobLedger) -> None:
        self._ledger = ledger

    @property
    def name(self) -> str:
        """``metadata.name``."""
        return self._ledger.name

    @property
    def downloads(self) -> Path:
        """Beside its records, and gone with them."""
        return self._ledger.directory

    def definition(self) -> FineTuneJob:
        """As it last ran."""
        return self._ledger.record().job

    def resource(self) -> dict[str, Any]:
        """As a cluster would show it."""
        status = self.status().model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return {**self.definition().model_dump(mode="json", by_alias=True, exclude_unset=True), "status": status}

    def status(self) -> JobStatus:
        """See ``truthful``."""
        return truthful(self._ledger)

    def since(self) -> datetime | None:
        """Its first stage's start."""
        return min((s.start_time for s in self._ledger.status().stages if s.start_time is not None), default=None)

    def updates(self) -> Iterator[JobStatus]:
        """Until its runner ends it."""
        while self._ledger.running:
            yield self._ledger.status()
            time.sleep(_TURN_SECONDS)
        yield self.status()

    def log_lines(self, stage: str, *, follow: bool) -> Iterator[LogLine]:
        """See ``log_lines``."""
        return map(LogLine, log_lines(self._ledger, stage, follow=follow))

    @contextmanager
    def store(self, told: Told | None) -> "Iterator[Store]":
        """The one that the spec names, or the embedded one."""
        with opened(self.definition().spec.storage, self._ledger.root) as access, access.store(told) as store:
            yield store


def log_lines(ledger: JobLedger, stage: str, *, follow: bool) -> Iterator[str]:
    """The lines of every attempt of a stage, or of all, in the order of running; ``follow`` waits for more of them."""
    known = [s.name for s in ledger.status().stages]
    if stage and stage not in known and not ledger.logs(stage):
        raise CommandError(f"no stage {stage!r} in {ledger.name}; its stages: {', '.join(known)}")
    read: dict[Path, int] = {}
    while True:
        alive = follow and ledger.running  # asked before reading: what is written until then is not missed
        for path in ledger.logs(stage):
            if path not in read:
                yield f"==> {path.stem} <=="
            with path.open("rb") as file:
                file.seek(read.get(path, 0))
                data = file.read()
            whole = data if not alive else data[: data.rfind(b"\n") + 1]
            read[path] = read.get(path, 0) + len(whole)
            yield from whole.decode("utf-8", errors="replace").splitlines()
        if not alive:
            return
        time.sleep(_TURN_SECONDS)
