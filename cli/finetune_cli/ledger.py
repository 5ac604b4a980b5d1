"""What this machine remembers of its jobs, below ``$FINETUNE_HOME``.

::

    jobs/<namespace>/<name>/job.json                  the job as it runs, with its uid and generation
                            status.json               the same status that a cluster shows
                            lock                      held by the one `finetune run` of this job
                            attempts/<child>/         stage.json, and what the stage's process leaves (processes.py)
                            logs/<stage>-<attempt>.log
    work/<namespace>/<name>/<child>/                  scratch of an attempt, gone after it
    cache/                                            files by sha256

Every file is replaced as a whole, so that a reader, or the next run after a crash, sees the old state or the new one.
"""

import contextlib
import difflib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_api.stage import Record, StageRun
from finetune_api.status import JobStatus, StageStatus
from finetune_api.types import FineTuneJob
from finetune_cli.checks import signatures
from finetune_cli.errors import CommandError
from finetune_operator.plan.status import holds


def home() -> Path:
    """``$FINETUNE_HOME``, by default ``finetune`` in the XDG data directory."""
    if path := os.environ.get("FINETUNE_HOME"):
        return Path(path).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "finetune"


def write_atomic(path: Path, text: str) -> None:
    """Replace the file as a whole; on return it survives a crash of the machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk has no name otherwise
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JobRecord(Record):
    """``job.json``."""

    job: FineTuneJob
    """With uid and generation; ``storage.endpoint`` as given, empty for the embedded store."""
    file: str
    """Absolute path of the YAML."""
    files: dict[str, str] = {}
    """Signatures of the local sources, ``checks.signatures``."""

    def changed(self, job: FineTuneJob, files: dict[str, str]) -> str:
        """What tells this job from that one, in words; empty for the same."""
        if self.job.spec.model_copy(update={"suspend": job.spec.suspend}) != job.spec:
            return "the spec has"
        return ", ".join(s for s in files if files[s] != self.files.get(s)) + " has" if files != self.files else ""


@dataclass(frozen=True)
class Attempt:
    """The files of one attempt of a stage; it exists as long as its ``stage.json`` does."""

    directory: Path
    run: StageRun
    log: Path
    workspace: Path

    @property
    def name(self) -> str:
        """The child's name in the plan."""
        return self.directory.name

    @property
    def stage_file(self) -> Path:
        """What the stage is given."""
        return self.directory / "stage.json"

    @property
    def process(self) -> Path:
        """Locked by the stage's process, which writes its process id there."""
        return self.directory / "process"

    @property
    def progress(self) -> Path:
        """Written by the stage."""
        return self.directory / "progress.json"

    @property
    def termination(self) -> Path:
        """Written by the stage."""
        return self.directory / "termination.json"

    @property
    def exit(self) -> Path:
        """Written by the runner that saw the process end; missing if none did."""
        return self.directory / "exit"

    @property
    def deleting(self) -> Path:
        """There as soon as the plan wants the attempt gone."""
        return self.directory / "deleting"

    def remove(self) -> None:
        """Forget the attempt; its log stays."""
        self.stage_file.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.workspace, ignore_errors=True)


class JobLedger:
    """One job's records."""

    def __init__(self, root: Path, namespace: str, name: str) -> None:
        self.root = root
        self.namespace = namespace
        self.name = name
        self.directory = root / "jobs" / namespace / name
        self._work = root / "work" / namespace / name

    @property
    def known(self) -> bool:
        """A job of this name has run here."""
        return (self.directory / "job.json").exists()

    def record(self) -> JobRecord:
        """The job as it last ran; raises CommandError if it cannot be read."""
        path = self.directory / "job.json"
        try:
            return JobRecord.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CommandError(
                f"cannot read {path}: {error}\n`finetune delete {self.name}` forgets the job; its results stay stored"
            ) from error

    def status(self) -> JobStatus:
        """The last recorded status, empty before the first."""
        path = self.directory / "status.json"
        try:
            return JobStatus.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return JobStatus()
        except (OSError, ValueError) as error:
            raise CommandError(
                f"cannot read {path}: {error}\nremove it: the next run finds the committed results again"
            ) from error

    def save_status(self, status: JobStatus) -> None:
        """Record the status; on return it survives a crash."""
        write_atomic(
            self.directory / "status.json", status.model_dump_json(by_alias=True, exclude_defaults=True, indent=1)
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the job: one run at a time. Raises CommandError if another process has it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise CommandError(
                    f"{self.name} is already running here (process {file.read().strip() or 'unknown'}): "
                    f"`finetune watch {self.name}` shows it, Ctrl-C in its terminal stops it"
                ) from None
            with contextlib.suppress(OSError):  # on a full disk: whoever is refused is then not told the process
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), str(os.getpid()).encode())
            yield

    @property
    def running(self) -> bool:
        """A `finetune run` holds this job now."""
        try:
            with (self.directory / "lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def adopt(self, job: FineTuneJob, file: Path) -> tuple[FineTuneJob, JobStatus, str]:
        """Take the job in: with uid and generation, the status to go on from, and a word on that for the user.

        The uid stays for as long as the name does; another spec is another generation, and so are other local files
        under the same names. It starts with an empty status: what did not change is found again among the committed
        results. A failed job starts another round: its finished stages stay, the others' failures are forgotten.
        Attempts are numbered on in either case. No attempt may be running.
        """
        old = self.record() if self.known else None
        status = self.status() if old is not None else JobStatus()
        generation = old.job.metadata.generation if old is not None else 1
        files = signatures(job)
        changed = old.changed(job, files) if old is not None else ""
        news = "going on with the run before" if status.stages else ""
        if changed:
            generation += 1
            news = f"{changed} changed: what does not depend on that is taken over"
            status = JobStatus(stages=[_again(stage) for stage in status.stages])
            self._forget_attempts()
        elif holds(status, "Failed"):
            news = "the job had failed: what is done stays, the rest is tried again"
            conditions = [c for c in status.conditions if c.type != "Failed"]
            stages = [stage if stage.state.done else _again(stage) for stage in status.stages]
            status = status.model_copy(update={"conditions": conditions, "stages": stages})
            self._forget_attempts()
        elif holds(status, "Complete"):
            news = "the job is complete already: nothing to do"
        uid = old.job.metadata.uid if old is not None else str(uuid.uuid4())
        job = job.model_copy(
            update={"metadata": job.metadata.model_copy(update={"uid": uid, "generation": generation})}
        )
        self.save_status(status)
        record = JobRecord(job=job, file=str(file.absolute()), files=files)
        write_atomic(self.directory / "job.json", record.model_dump_json(by_alias=True, exclude_unset=True, indent=1))
        return job, status, news

    def _forget_attempts(self) -> None:
        for attempt in self.attempts():
            attempt.remove()

    def attempts(self) -> list[Attempt]:
        """Every attempt that is not yet forgotten, in the order of their making."""
        found = []
        files = (self.directory / "attempts").glob("*/stage.json")
        for path in sorted(files, key=lambda p: p.stat().st_mtime_ns):
            run = StageRun.model_validate_json(path.read_bytes())
            found.append(self._attempt(path.parent.name, run))
        return found

    def add(self, name: str, run: StageRun) -> Attempt:
        """Record an attempt that is to start."""
        attempt = self._attempt(name, run)
        attempt.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(attempt.stage_file, run.model_dump_json(by_alias=True, exclude_unset=True, indent=1))
        return attempt

    def _attempt(self, name: str, run: StageRun) -> Attempt:
        log = self.directory / "logs" / f"{run.stage}-{run.attempt}.log"
        return Attempt(self.directory / "attempts" / name, run, log, self._work / name)

    def sweep(self) -> None:
        """Remove what a killed run may have left in scratch. Only while no attempt runs."""
        shutil.rmtree(self._work, ignore_errors=True)

    def logs(self, stage: str = "") -> list[Path]:
        """Log files of all stages or one, in the order in which they were last written: that of running."""
        found = [p for p in (self.directory / "logs").glob("*.log") if not stage or p.stem.rpartition("-")[0] == stage]
        return sorted(found, key=lambda p: p.stat().st_mtime_ns)

    def forget(self) -> None:
        """Remove every record of the job here. Its objects stay in the store."""
        (self.directory / "job.json").unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.sweep()


def _again(stage: StageStatus) -> StageStatus:
    return StageStatus(name=stage.name, attempt=stage.attempt)


def all_jobs(root: Path, namespace: str) -> list[JobLedger]:
    """Every job of the namespace that has run here, by name."""
    return [
        JobLedger(root, namespace, path.parent.name) for path in sorted((root / "jobs" / namespace).glob("*/job.json"))
    ]


def find_job(root: Path, namespace: str, name: str) -> JobLedger:
    """That job; an unknown name is a CommandError with the nearest known ones."""
    ledger = JobLedger(root, namespace, name)
    if ledger.known:
        return ledger
    names = [known.name for known in all_jobs(root, namespace)]
    elsewhere = [p.parent.parent.name for p in (root / "jobs").glob(f"*/{name}/job.json")]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if elsewhere:
        hint = f"there is one in the namespace {elsewhere[0]}: -n {elsewhere[0]}"
    elif near:
        hint = f"did you mean {' or '.join(near)}?"
    elif names:
        hint = f"known: {', '.join(names[:10])}"
    else:
        hint = "no job has run here yet: `finetune run FILE` starts one"
    raise CommandError(f"no job {name!r} in the namespace {namespace}; {hint}")
