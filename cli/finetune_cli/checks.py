"""What only this machine can tell about a job: whether the files that it names are here, and whether they changed."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from finetune_api.pipeline import named_adapters
from finetune_api.types import Data, DataSource, FineTuneJob
from finetune_api.validate import FieldError
from finetune_jobs.data.template import syntax_error
from finetune_jobs.run.errors import StageError


class NotHereError(Exception):
    """A ``file://`` or ``package://`` source is not there; the message says what is missing and how to get it."""


def located(source: str) -> Path | None:
    """Where a source's file or folder is; None for one that is not of this machine. Raises NotHereError."""
    if source.startswith("file://"):
        path = Path(source.removeprefix("file://"))
        try:
            there = path.exists()
        except OSError as error:  # a name too long, a folder that may not be looked into
            raise NotHereError(f"{path}: {error.strerror}") from error
        if not there:
            raise NotHereError(f"no such file or directory: {path}")
        return path
    if not source.startswith("package://"):
        return None
    package, _, inside = source.removeprefix("package://").partition("/")
    # Of a package's name alone; for a dotted one the search would run the code of its parents.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise NotHereError(f"the Python package {package} is not installed: `pip install {package.replace('_', '-')}`")
    found = [Path(place) / inside for place in spec.submodule_search_locations if (Path(place) / inside).exists()]
    if not found:
        raise NotHereError(f"the package {package} has no file {inside!r}")
    return found[0]


def unusable_files(job: FineTuneJob) -> list[FieldError]:
    """One error for every source of this machine that is not there, or whose kind of file cannot serve, and for a
    chat template that is not Jinja.
    """
    errors = []
    for field, source in _sources(job):
        try:
            if located(source) is not None:
                _check_kind(job, field, source)
        except NotHereError as error:
            errors.append(FieldError(field, str(error)))
    if words := syntax_error(job.spec.model.chat_template):
        errors.append(FieldError("spec.model.chatTemplate", words))
    return errors


def _check_kind(job: FineTuneJob, field: str, source: str) -> None:
    """What ``prepare`` would say of the file or folder, in its words."""
    from finetune_jobs import models
    from finetune_jobs.data import sources
    from finetune_jobs.merging import incoming

    try:
        if field == models.FIELD:
            models.check_local(job.spec.model)
        elif field.endswith(".uri"):
            incoming.local(source, field.removesuffix(".uri"))
        else:
            sources.check_local(DataSource(source=source), field.removesuffix(".source"))
    except StageError as error:
        raise NotHereError(str(error).removeprefix(f"{field}: ")) from error


def signatures(job: FineTuneJob) -> dict[str, str]:
    """For each local source what changes when its files do: how many, how large, when last written. None may miss."""
    return {source: _signature(path) for _, source in _sources(job) if (path := located(source)) is not None}


def _signature(path: Path) -> str:
    states = [file.stat() for file in _files(path)]
    newest = max((state.st_mtime_ns for state in states), default=0)
    return f"{len(states)} files, {sum(state.st_size for state in states)} bytes, {newest}"


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names if (Path(folder) / name).is_file())


def _sources(job: FineTuneJob) -> Iterator[tuple[str, str]]:
    yield "spec.model.source", job.spec.model.source
    yield from _data("spec.data", job.spec.data)
    for index, stage in enumerate(job.spec.pipeline):
        yield from _data(f"spec.pipeline[{index}].data", stage.data)
        for place, adapter in enumerate(named_adapters(stage)):
            if adapter.uri is not None:
                yield f"spec.pipeline[{index}].merge.adapters[{place}].uri", adapter.uri


def _data(field: str, data: Data) -> Iterator[tuple[str, str]]:
    for role in Data.model_fields:
        for index, entry in enumerate(getattr(data, role)):
            yield f"{field}.{role}[{index}].source", entry.source
