"""Jobs as they are now: ``get``, ``watch`` and ``logs``."""

import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.status import JobStatus, StageState
from finetune_cli import words
from finetune_cli.display import view
from finetune_cli.errors import COMPLETE, FAILED, CommandError
from finetune_cli.ledger import JobLedger
from finetune_operator.plan.status import holds

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


def as_json(ledger: JobLedger) -> dict[str, Any]:
    """A job as ``--json`` prints it: the resource as a cluster would show it."""
    status = truthful(ledger).model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return {**ledger.record().job.model_dump(mode="json", by_alias=True, exclude_unset=True), "status": status}


def overview(ledgers: list[JobLedger]) -> str:
    """The columns of ``kubectl get ftj``."""
    now = datetime.now(UTC)
    rows = []
    for ledger in ledgers:
        status = truthful(ledger)
        started = [s.start_time for s in status.stages if s.start_time is not None]
        age = words.duration((now - min(started)).total_seconds()) if started else ""
        rows.append([ledger.name, status.stage, status.progress, status.eta, status.summary, age])
    return words.table(["name", "stage", "progress", "eta", "status", "age"], rows)


def details(ledger: JobLedger) -> str:
    """One job: its stages and what it has made."""
    status = truthful(ledger)
    now = datetime.now(UTC)
    parts = [
        f"{ledger.name}: {status.summary}",
        words.table(words.STAGE_COLUMNS, [words.stage_row(s, now) for s in status.stages]),
    ]
    parts += [f"{s.name}: {s.message}" for s in status.stages if s.message and not s.state.done]
    if scores := words.scores(status):
        parts.append(f"Scores on the locked test rows, base -> tuned:\n{scores}")
    if status.artifacts:
        parts.append(words.artifacts_table(status))
    return "\n\n".join(parts)


def watch(ledger: JobLedger) -> int:
    """Show the job until its runner ends it; the exit code tells how."""
    with view(sys.stdout, ledger.name) as display:
        while ledger.running:
            display.show(ledger.status())
            time.sleep(_TURN_SECONDS)
        status = truthful(ledger)
        display.show(status)
        display.say(f"{ledger.name}: {status.summary}")
    return COMPLETE if holds(status, "Complete") else FAILED


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
