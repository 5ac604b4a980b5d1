"""Fetch committed files: verified, resumable, and never twice."""

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from finetune_api.stage import File, Manifest
from finetune_api.status import JobStatus
from finetune_api.types import BASE
from finetune_cli import words
from finetune_cli.checks import NotHereError, located
from finetune_cli.errors import INVALID, CommandError
from finetune_cli.job import Job
from finetune_cli.results import Wanted, over_base, select, tuned

if TYPE_CHECKING:
    from finetune_jobs.store.client import Store


@contextmanager
def store_of(job: Job) -> "Iterator[Store]":
    """The store of a job, with progress on stderr."""
    with progress(sys.stderr) as told, job.store(told) as store:
        yield store


def committed(store: "Store", status: JobStatus) -> list[Manifest]:
    """The manifests of the finished stages, in the order of running."""
    from finetune_jobs.store import manifest

    return [
        manifest.load(store, stage.result.manifest)
        for stage in status.stages
        if stage.result is not None and stage.state.done
    ]


def fetch(store: "Store", wanted: Sequence[Wanted], into: Path) -> tuple[list[Path], int]:
    """Bring every file below ``into``; the paths, and how many were there already with the right content."""
    from finetune_jobs.store.transfer import download_files

    needed = [item for item in wanted if not _is_there(into / item.path, item.file)]
    download_files(store, [item.file.model_copy(update={"path": item.path}) for item in needed], into)
    for item in needed:
        os.utime(into / item.path)  # the store dates what it verified; people expect the time of fetching
    return [into / item.path for item in wanted], len(wanted) - len(needed)


def _is_there(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes and sha256(path) == file.sha256


def sha256(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def progress(stream: IO[str]) -> Iterator[Callable[[str, int, int], None]]:
    """A callback for a store's transfers: bars on a terminal; elsewhere a line for each file that is done."""
    lock = threading.Lock()
    if not stream.isatty():

        def line(name: str, done: int, total: int) -> None:
            if done >= total:
                with lock:
                    print(f"fetched {name.rpartition('/')[2]} ({words.size(total)})", file=stream, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(file=stream)) as bars:

        def draw(name: str, done: int, total: int) -> None:
            with lock:
                if name not in tasks:
                    tasks[name] = bars.add_task(name.rpartition("/")[2], total=total)
            bars.update(tasks[name], completed=done)

        yield draw


def gguf(job: Job, kind: str = "") -> Path:
    """A local copy of one of the job's GGUFs: that type, else Q4_K_M, else the first."""
    with store_of(job) as store:
        spec = job.definition().spec
        manifests = tuned(spec, committed(store, job.status()))
        if kind:
            wanted = [w for w in select(spec, manifests, [kind]) if w.path.endswith(".gguf")]
        else:
            wanted = [w for w in select(spec, manifests, []) if w.path.endswith(".gguf")]
            wanted.sort(key=lambda w: "Q4_K_M" not in w.path)
        if not wanted:
            raise CommandError(f"{kind} is no GGUF of {job.name}", INVALID)
        return fetch(store, wanted[:1], job.downloads / "gguf")[0][0]


def adapter_over_base(job: Job, name: str, kind: str = "") -> tuple[Path, Path]:
    """Local copies of a GGUF of the model that the adapter of the stage ``name`` was trained on, and of the adapter.

    A base model that is a GGUF of this machine serves where the job made none.
    """
    with store_of(job) as store:
        spec = job.definition().spec
        found = over_base(spec, committed(store, job.status()), name, kind)
        source, here = spec.model.source, None
        if found.base is None and found.weights == BASE and not kind and source.endswith(".gguf"):
            with suppress(NotHereError):
                here = located(source)
        if found.base is None and here is None:
            of_type = f"{kind} " if kind else ""
            example = f"- {{name: base-gguf, from: {found.weights}, quantize: {{gguf: [{kind or 'Q8_0'}]}}}}"
            raise CommandError(
                f"{job.name} makes no {of_type}GGUF of {found.weights}, over which the adapter of {name} is laid: "
                f"add `{example}`, or name one of your own: `{job.command} chat BASE.gguf --adapter "
                f"{found.adapter.path}` after `{job.command} pull {job.name}`",
                INVALID,
            )
        wanted = [one for one in (found.base, found.adapter) if one is not None]
        paths, _ = fetch(store, wanted, job.downloads / "gguf")
        return here or paths[0], paths[-1]


def report(job: Job) -> tuple[Path, Path]:
    """Local copies of ``index.html`` and ``report.json``."""
    with store_of(job) as store:
        spec, manifests = job.definition().spec, committed(store, job.status())
        if not any(m.stage == "report" for m in manifests):
            why = (
                "evaluation.skip is set"
                if spec.evaluation.skip
                else f"it is made by the last stage; see `{job.command} get {job.name}`"
            )
            raise CommandError(f"{job.name} has no report: {why}")
        wanted = select(spec, manifests, ["report/index.html", "report/report.json"])
        page, data = fetch(store, wanted, job.downloads / "report")[0]
        return page, data
