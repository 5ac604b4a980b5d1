"""The life of one attempt, the same for every stage.

Look for a committed result with the same inputs; otherwise work, upload, commit the manifest last, and say so in the
termination message. Whatever happens, the exit code tells the operator what to do next (``errors.py``).
"""

import errno
import gc
import importlib
import logging
import os
import resource
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.pipeline import kind, training_block
from finetune_api.stage import Artifact, File, FoundResult, Manifest, StageResult, StageRun, Termination
from finetune_api.types import TrainingBlock
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.digest import digest_of, find_done, inputs_of
from finetune_jobs.run.errors import ConfigurationError, StageError
from finetune_jobs.run.logs import Kept
from finetune_jobs.run.poster import Poster
from finetune_jobs.run.preemption import Stop
from finetune_jobs.run.progress import Progress
from finetune_jobs.store import layout, manifest
from finetune_jobs.store.checkpoints import Checkpoints
from finetune_jobs.store.client import Store
from finetune_jobs.store.transfer import upload_tree
from finetune_jobs.training import unsloth

_log = logging.getLogger("finetune.lifecycle")
TERMINATION_BYTES = 4000
"""The kubelet keeps the last 4,096 bytes of a termination message; JSON without its head is worthless."""


def execute(
    run: StageRun, stop: Stop, environment: Mapping[str, str] = os.environ, log: Kept | None = None
) -> Termination:
    """Run one attempt to its committed result. Raises the errors of ``errors.py``. ``log`` is told where it belongs."""
    log = log or Kept()
    writer = environment.get("FINETUNE_WRITER") or uuid.uuid4().hex
    store = Store.of(run.spec.storage, _Transfers())
    log.belongs_at(store, layout.log_key(layout.stage_prefix(store.prefix, run.job, run.stage), run.attempt, writer))
    manifests = {name: manifest.load(store, key) for name, key in run.inputs.items()}
    inputs = (
        _module(run).fingerprint(run.spec, store)
        if run.stage == "prepare"
        else inputs_of(run.spec, run.stage, {name: m.outputs for name, m in manifests.items()})
    )
    digest = digest_of(run.spec, run.job, run.stage, inputs)
    prefix = layout.result_prefix(store.prefix, run.job, run.stage, digest)
    log.belongs_at(store, layout.log_key(prefix, run.attempt, writer))
    committed = manifest.find_committed(store, run.job, run.stage, digest)
    if committed is not None:
        _log.info("found a committed result with the same inputs: %s", digest[:12])
        return _termination(store, run, committed, reused=True)
    progress_file = Path(path) if (path := environment.get("FINETUNE_PROGRESS_FILE")) else None
    progress = Progress(progress_file, Poster.of(environment))
    workspace = Path(environment.get("FINETUNE_WORKSPACE") or tempfile.mkdtemp(prefix="finetune-"))
    workspace.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(store, prefix, writer, keep=_keep(run), on_commit=progress.checkpoint)
    cache = Path(path) if (path := environment.get("FINETUNE_CACHE")) else None
    context = Context(run, store, workspace, cache, progress, stop, manifests, checkpoints)
    started = datetime.now(UTC)
    clock = time.monotonic()
    try:
        outcome: Outcome = _module(run).run(context)
        if int(environment.get("RANK", "0")) > 0:
            return Termination()
        stop.check()
        figures = {**outcome.figures, **_usage(time.monotonic() - clock)}
        files = upload_tree(store, outcome.directory, f"{prefix}/artifacts/{writer}")
        result = Manifest(
            job=run.job,
            stage=run.stage,
            attempt=run.attempt,
            digest=digest,
            inputs=inputs,
            outputs={name: manifest.content_digest(files, under=path) for name, path in outcome.outputs.items()},
            files=files,
            artifacts=_artifacts(store, run, files, outcome.artifacts),
            figures=figures,
            started=started.isoformat(timespec="seconds"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return _termination(store, run, manifest.commit(store, result), reused=False)
    finally:
        checkpoints.close()
        progress.close()
        if "FINETUNE_WORKSPACE" not in environment:
            shutil.rmtree(workspace, ignore_errors=True)


def _module(run: StageRun) -> Any:
    """The stage's code, and before it what must be imported first."""
    if (block := _training(run)) is not None and block.training.backend == "unsloth":
        unsloth.start()
    # Nothing that is made while libraries load is garbage, and looking for some takes a fifth of the time.
    gc.disable()
    try:
        return importlib.import_module(f"finetune_jobs.stages.{kind(run.spec, run.stage)}")
    finally:
        gc.enable()


class _Transfers:
    """Says how far a transfer of several parts is, at most every 10 s."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last >= 10:
            self._last = now
            _log.info("transfer of %s: %d of %d MiB", name, done >> 20, total >> 20)


def _training(run: StageRun) -> TrainingBlock | None:
    return next((training_block(stage) for stage in run.spec.pipeline if stage.name == run.stage), None)


def _keep(run: StageRun) -> int:
    block = _training(run)
    return block.checkpoint.keep if block is not None else 1


def _usage(seconds: float) -> dict[str, float | int | str]:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return {
        "seconds": round(seconds, 1),
        "cpuSeconds": round(cpu, 1),
        "peakMemoryBytes": 1024 * max(own.ru_maxrss, children.ru_maxrss),  # Linux counts in KiB
    }


def _artifacts(store: Store, run: StageRun, files: list[File], named: Mapping[str, str]) -> list[Artifact]:
    by_path = {f.path: f for f in files}
    return [
        Artifact(
            stage=run.stage,
            name=name,
            uri=f"s3://{store.bucket}/{by_path[path].key}",
            size_bytes=by_path[path].size_bytes,
            sha256=by_path[path].sha256,
        )
        for name, path in named.items()
    ]


def _short(store: Store, found: Manifest, *, reused: bool) -> StageResult:
    key = f"{layout.result_prefix(store.prefix, found.job, found.stage, found.digest)}/manifest.json"
    return StageResult(
        digest=found.digest, manifest=key, reused=reused, artifacts=found.artifacts, figures=found.figures
    )


def _termination(store: Store, run: StageRun, committed: Manifest, *, reused: bool) -> Termination:
    result = _short(store, committed, reused=reused)
    if run.stage != "prepare":
        return Termination(result=result)
    done = find_done(store, run.job, run.spec, committed.outputs)
    found = [
        FoundResult(
            stage=name, **_short(store, m, reused=True).model_dump(exclude={"artifacts"}), artifacts=m.artifacts
        )
        for name, m in done.items()
    ]
    return Termination(result=result, found=found)


def write_termination(message: Termination, path: Path | None) -> None:
    """Leave the message where the kubelet, or the local runner, reads it: whole, within 4,000 bytes."""
    if path is None:
        return
    while len(text := message.model_dump_json(by_alias=True, exclude_defaults=True).encode()) > TERMINATION_BYTES:
        if message.found:
            message = message.model_copy(update={"found": message.found[:-1]})
        elif message.error is not None:
            message = message.model_copy(update={"error": message.error[: len(message.error) - 200].rstrip() + " ..."})
        elif message.result is not None and message.result.artifacts:
            # The manifest has them all; status will show fewer.
            shorter = message.result.model_copy(update={"artifacts": message.result.artifacts[:-1]})
            message = message.model_copy(update={"result": shorter})
        else:
            break
    try:
        path.write_bytes(text)
    except OSError as error:  # a full disk: the exit code must not change for it, half a message would mislead
        _log.error("no termination message: %s", error)
        with suppress(OSError):
            path.write_bytes(b"")


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code and the words for whatever a stage raised."""
    if isinstance(error, StageError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # they have no class of their own
        where = error.filename or f"the workspace {os.environ.get('FINETUNE_WORKSPACE') or tempfile.gettempdir()}"
        return StageError.exit_code, f"the disk is full ({where}): free space there or give it more"
    return StageError.exit_code, f"{type(error).__name__}: {error}"


def termination_path(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where the termination message goes: FINETUNE_TERMINATION_LOG, else the kubelet's file if there is one."""
    if path := environment.get("FINETUNE_TERMINATION_LOG"):
        return Path(path)
    kubelet = Path("/dev/termination-log")
    return kubelet if kubelet.exists() else None


def load(path: Path) -> StageRun:
    """Read ``stage.json``; a file that is not one is a ConfigurationError."""
    try:
        return StageRun.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is not a stage file: {error}") from error
