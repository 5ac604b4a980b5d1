"""The local shell round ``plan()``: it does what the cluster's controller does, with processes instead of Jobs.

Each turn: see how the attempts are, plan, record the new status, then act on it. Since the status is on disk before
anything is done for it, the runner may be killed at any moment; the next one sees the same attempts and goes on.
"""

import contextlib
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Literal, TypeVar

from finetune_api.stage import Record, StageRun, Termination
from finetune_api.status import CheckpointStatus, JobStatus, Progress
from finetune_api.types import FineTuneJob, Storage
from finetune_cli import words
from finetune_cli.cache import bound, prune
from finetune_cli.display import View
from finetune_cli.errors import CommandError, no_space
from finetune_cli.ledger import Attempt, JobLedger, write_atomic
from finetune_cli.processes import Running
from finetune_operator.plan.children import Child
from finetune_operator.plan.plan import plan
from finetune_operator.plan.status import holds

STAGE_COMMAND = (sys.executable, "-m", "finetune_jobs")
GRACE_SECONDS = 120.0
"""Between SIGTERM and SIGKILL, as for pods."""
_TURN_SECONDS = 0.25
_REVIVE_SECONDS = 5.0
_TAIL_LINES = 12
_SIGTERM_CODE = 128 + signal.SIGTERM
_SAVED_CODES = (75, _SIGTERM_CODE)
_R = TypeVar("_R", bound=Record)


class Exit(Record):
    """How an attempt's process ended, by the runner that saw it."""

    code: int
    time: datetime


class Saved(Record):
    """What stands in a stage's progress file beside its ``Progress``."""

    checkpoint: CheckpointStatus | None = None


def _now() -> datetime:
    return datetime.now(UTC)


class Runner:
    """Runs one job whose ledger the caller has locked, and of whose earlier attempts none is running."""

    def __init__(
        self,
        ledger: JobLedger,
        job: FineTuneJob,
        status: JobStatus,
        *,
        storage: Storage,
        environment: Mapping[str, str],
        view: View,
        command: Sequence[str] = STAGE_COMMAND,
        grace: float = GRACE_SECONDS,
        clock: Callable[[], datetime] = _now,
        revive: Callable[[], None] = lambda: None,
    ) -> None:
        """``storage``, ``environment`` and ``revive`` as ``access.opened`` gives them; ``command`` runs a stage, given
        its file."""
        self._ledger = ledger
        self._job = job
        self._storage = storage
        self._environment = environment
        self._view = view
        self._command = command
        self._grace = grace
        self._clock = clock
        self._revive = revive
        self._revive_at = 0.0
        self._attempts = {attempt.name: attempt for attempt in ledger.attempts()}
        self._seen: dict[str, datetime | None] = {}
        """When the progress that was last planned with was written."""
        self._running: tuple[Attempt, Running] | None = None
        self._kill_at = float("inf")
        self._signals: list[int] = []
        self.status = status
        self.interrupted: int | None = None
        """The signal that asked for the end."""

    def run(self) -> JobStatus:
        """Go on until the job is Complete, Failed or, after a signal, Suspended; the last status is recorded.

        To be called from the main thread: signals are handled meanwhile.
        """
        with self._noting_signals(), self._leaving_nothing_behind():
            while True:
                self._heed_signals()
                now = self._clock()
                planned = plan(self._wish(), self.status, [self._observe(a) for a in self._attempts.values()], now)
                if planned.status != self.status:
                    self.status = planned.status
                    self._ledger.save_status(self.status)
                self._view.show(self.status)
                for name in planned.delete:
                    self._delete(name)
                for child in planned.create:
                    if child.name not in self._attempts:
                        self._attempts[child.name] = self._ledger.add(child.name, self._filled(child.run))
                if self._running is None:
                    if self._start_next():
                        continue  # so that the status says so
                    if any(holds(self.status, kind) for kind in ("Complete", "Failed", "Suspended")):
                        return self.status
                    if planned.look_again is None and not planned.delete:
                        raise CommandError(f"nothing is left to do, yet the job is {self.status.summary}")
                self._wait(now + planned.look_again if planned.look_again is not None else None)

    def _wish(self) -> FineTuneJob:
        """Whoever presses Ctrl-C wants what ``suspend: true`` says."""
        if self.interrupted is None:
            return self._job
        return self._job.model_copy(update={"spec": self._job.spec.model_copy(update={"suspend": True})})

    def _observe(self, attempt: Attempt) -> Child:
        state: Literal["Pending", "Running", "Succeeded", "Failed"] = "Pending"
        start, ended = _modified(attempt.process), None
        if self._running is not None and self._running[0] is attempt:
            state = "Running"
        elif start is not None:
            ended = _read(Exit, attempt.exit) or _unwatched(attempt, start)
            state = "Succeeded" if ended.code == 0 else "Failed"
        self._seen[attempt.name] = _modified(attempt.progress)
        progress, saved = _read(Progress, attempt.progress), _read(Saved, attempt.progress)
        return Child(
            name=attempt.name,
            stage=attempt.run.stage,
            attempt=attempt.run.attempt,
            state=state,
            exit_code=ended.code if ended else None,
            termination=_read(Termination, attempt.termination) if ended else None,
            start=start,
            end=ended.time if ended else None,
            progress=progress,
            checkpoint=saved.checkpoint if saved else None,
            deleting=attempt.deleting.exists(),
        )

    def _filled(self, run: StageRun) -> StageRun:
        """With the endpoint of the embedded store, which only this machine knows."""
        return run.model_copy(update={"spec": run.spec.model_copy(update={"storage": self._storage})})

    def _start_next(self) -> bool:
        """Start the attempt that has waited longest, if one waits. One at a time: two would only slow each other."""
        attempt = next((a for a in self._attempts.values() if not a.process.exists()), None)
        if attempt is None:
            return False
        cache = self._ledger.root / "cache"
        prune(cache, bound(cache))
        shutil.rmtree(attempt.workspace, ignore_errors=True)
        attempt.workspace.mkdir(parents=True)
        environment = {
            # llama.cpp's idle threads spin otherwise and take the cores from the ones that work.
            "OMP_WAIT_POLICY": "passive",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            **self._environment,
            "FINETUNE_WORKSPACE": str(attempt.workspace),
            "FINETUNE_CACHE": str(cache),
            "FINETUNE_WRITER": uuid.uuid4().hex,
            "FINETUNE_TERMINATION_LOG": str(attempt.termination),
            "FINETUNE_PROGRESS_FILE": str(attempt.progress),
        }
        command = [*self._command, str(attempt.stage_file)]
        self._running = attempt, Running(command, lock=attempt.process, log=attempt.log, environment=environment)
        return True

    def _delete(self, name: str) -> None:
        """Ask the attempt to save and end; one that has not started is forgotten."""
        attempt = self._attempts[name]
        if self._running is None or self._running[0] is not attempt:
            del self._attempts[name]
            attempt.remove()
            return
        attempt.deleting.touch()
        self._kill_at = time.monotonic() + self._grace
        self._running[1].terminate()

    def _wait(self, until: datetime | None) -> None:
        """Until the stage ends or makes progress, a signal comes, or it is time to look again."""
        if self._running is None:
            while not self._signals and until is not None and self._clock() < until:
                self._keep_store()
                time.sleep(_TURN_SECONDS)
            return
        attempt, process = self._running
        seen = self._seen.get(attempt.name)
        while not self._signals and (until is None or self._clock() < until) and _modified(attempt.progress) == seen:
            self._keep_store()
            code = process.wait(_TURN_SECONDS)
            if code is not None:
                self._ended(attempt, code)
                return
            if time.monotonic() > self._kill_at:
                self._view.say(f"{attempt.run.stage} did not stop in {words.duration(self._grace)} and is killed")
                self._kill_at = float("inf")
                process.kill()

    def _keep_store(self) -> None:
        """Have the embedded store looked after every few seconds, soon enough for a stage that waits for it."""
        if time.monotonic() >= self._revive_at:
            self._revive_at = time.monotonic() + _REVIVE_SECONDS
            self._revive()

    def _ended(self, attempt: Attempt, code: int) -> None:
        self._running = None
        self._kill_at = float("inf")
        if code not in (0, *_SAVED_CODES) and not attempt.deleting.exists():
            # While the scratch is there, and before anything is written: a full disk is seen and told.
            self._view.say("\n".join([_failure(attempt, code), *no_space(self._ledger.root)]))
        shutil.rmtree(attempt.workspace, ignore_errors=True)
        write_atomic(attempt.exit, Exit(code=code, time=self._clock()).model_dump_json())

    @contextlib.contextmanager
    def _leaving_nothing_behind(self) -> Iterator[None]:
        """Should the runner itself fail (a full disk, a bug), its stage still saves before the store is stopped."""
        try:
            yield
        except BaseException:
            if self._running is not None:
                process = self._running[1]
                process.terminate()
                if process.wait(self._grace) is None:
                    process.kill()
            raise

    @contextlib.contextmanager
    def _noting_signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heed_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if self.interrupted is None:
                self.interrupted = number
                if self._running is not None:
                    self._view.say(f"stopping: {self._running[0].run.stage} saves what it has; once more kills it")
            elif self._running is not None:
                attempt, process = self._running
                self._view.say(f"{attempt.run.stage} is killed")
                attempt.deleting.touch()  # so that the kill does not count as a failure of the stage
                process.kill()


def _unwatched(attempt: Attempt, start: datetime) -> Exit:
    """How an attempt ended whose runner died: its own message is the best witness. Without one it heeded the SIGTERM
    that the kernel sent, or had no time to; neither counts as a failure."""
    termination = _read(Termination, attempt.termination)
    succeeded = termination is not None and termination.result is not None
    signs = [_modified(path) for path in (attempt.progress, attempt.termination)]
    end = max([start, *(sign for sign in signs if sign is not None)])
    return Exit(code=0 if succeeded else _SIGTERM_CODE, time=end)


def _failure(attempt: Attempt, code: int) -> str:
    """What a failed attempt leaves to be read: its own words, its exit code and the end of its log."""
    termination = _read(Termination, attempt.termination)
    said = termination.error if termination and termination.error else "it left no message"
    log = attempt.log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [f"{attempt.run.stage}, attempt {attempt.run.attempt}, ended with exit code {code}: {said}"]
    lines += [f"  | {line}" for entry in log[-_TAIL_LINES:] for line in words.log_line(entry).splitlines()]
    return "\n".join([*lines, f"  whole log: {attempt.log}"])


def _read(kind: type[_R], path: Path) -> _R | None:
    """A file that a stage or a runner left; None if there is none, or half of one."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _modified(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return None
