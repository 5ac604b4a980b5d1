"""Adapters that a merge takes from elsewhere: another job's result, or a folder. ``prepare`` brings them, so that what
does not fit is refused before anything is trained, and the job keeps what it merges.
"""

import json
import re
import shutil
from pathlib import Path

from finetune_api.types import AdapterSource, ModelSource, Storage
from finetune_jobs.merging.adapter import CONFIG, WEIGHTS, read_adapter
from finetune_jobs.merging.updates import LoraUpdate
from finetune_jobs.remote import sha256
from finetune_jobs.run.errors import ConfigurationError, DataError, InputMissingError
from finetune_jobs.store import adapters
from finetune_jobs.store.manifest import content_digest
from finetune_jobs.store.transfer import download_files


def fingerprint(source: AdapterSource, storage: Storage, field: str) -> str:
    """Changes when, and only when, the adapter does; raises as ``bring``."""
    assert source.uri is not None
    if source.uri.startswith("s3://"):
        place = adapters.open_uri(source.uri, storage, field)
        return content_digest(adapters.of_uri(place, source.checkpoint, field).files, under=adapters.FOLDER)
    return ",".join(sha256(local(source.uri, field) / name) for name in (CONFIG, WEIGHTS))


def local(uri: str, field: str) -> Path:
    """The folder of a ``file://`` adapter. InputMissingError if it holds none."""
    directory = Path(uri.removeprefix("file://"))
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise InputMissingError(f"{field}.uri: {directory} holds no {name}, so it is no adapter of PEFT's")
    return directory


def bring(source: AdapterSource, storage: Storage, model: ModelSource, base: str, directory: Path, field: str) -> None:
    """Put the adapter into ``directory``, which must not exist, every file verified. ``base``: digest of this job's.

    Raises:
        InputMissingError: there is none, or not that checkpoint.
        ConfigurationError: it belongs to another base, or cannot be merged. ``field`` is named.
    """
    assert source.uri is not None
    directory.parent.mkdir(parents=True, exist_ok=True)
    if source.uri.startswith("s3://"):
        place = adapters.open_uri(source.uri, storage, field)
        found = adapters.of_uri(place, source.checkpoint, field)
        if place.bases != {base}:
            job, digests = place.manifest.job, ", ".join(sorted(digest[:12] for digest in place.bases))
            raise ConfigurationError(
                f"{field}.uri: {job.namespace}/{job.name} trained this adapter on another model than this job's "
                f"(digest {digests}, not {base[:12]}); name that model, revision and chat template under spec.model, "
                "or train the adapter on this one"
            )
        scratch = directory.with_name(f"{directory.name}.part")
        download_files(found.store, found.files, scratch)
        (scratch / adapters.FOLDER).rename(directory)
        scratch.rmdir()
    else:
        folder = local(source.uri, field)
        _check_name(folder, model, field)
        directory.mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / name, directory / name)


def check(directory: Path, combination: str, field: str) -> None:
    """Refuse, naming ``field``, an adapter that cannot be merged so."""
    try:
        updates = read_adapter(directory)
    except DataError as error:
        raise ConfigurationError(f"{field}: {error}") from error
    plain = all(isinstance(update, LoraUpdate) and update.magnitude is None for update in updates.values())
    if combination == "svd" and not plain:
        raise ConfigurationError(f"{field}: the adapter is not of A and B alone, and svd is; write linear or ties")


def _check_name(folder: Path, model: ModelSource, field: str) -> None:
    """A folder has no digest of its base, only a name of it; the shapes of the tensors are compared at the merge."""
    named = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    ours = model.source.removeprefix("hf://").partition("@")[0]
    if model.source.startswith("hf://") and re.fullmatch(r"[\w.-]+/[\w.-]+", named) and named != ours:
        raise ConfigurationError(
            f"{field}.uri: by its {CONFIG} the adapter was trained on {named}, not on {ours}; name that model under "
            f"spec.model, or mend base_model_name_or_path if the two are the same"
        )
