"""Adapters among what stages have committed: a result's own, one of its checkpoints', another job's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetune_api.stage import File, Manifest
from finetune_api.types import Storage
from finetune_jobs.run.errors import ConfigurationError, InputMissingError
from finetune_jobs.store import layout, manifest
from finetune_jobs.store.checkpoints import Checkpoints
from finetune_jobs.store.client import Store

FOLDER = "adapter"
"""Where results and checkpoints have it."""
Wanted = int | Literal["best", "last"] | None
"""A checkpoint; None is the result."""


@dataclass(frozen=True)
class Found:
    """An adapter's committed files, below ``adapter/``."""

    store: Store
    files: Sequence[File]
    step: int | None
    """Of the checkpoint; None for the result."""


@dataclass(frozen=True)
class Elsewhere:
    """A result that a ``uri`` names."""

    store: Store
    prefix: str
    manifest: Manifest

    @property
    def bases(self) -> set[str]:
        """Digests of the weights that the adapter can belong to: the model that the stage made, or those it read, which
        are two where a reward model has weights of its own."""
        if "model" in self.manifest.outputs:
            return {self.manifest.outputs["model"]}
        return {d for name, d in self.manifest.inputs.items() if name.rpartition(":")[2] in ("base", "model")}


def of_stage(store: Store, made: Manifest, wanted: Wanted, field: str) -> Found:
    """The adapter of a stage of this job. ``field``: of the entry, for messages.

    Raises InputMissingError for a checkpoint that is not there, ConfigurationError for a stage without an adapter.
    """
    return _found(store, layout.result_prefix(store.prefix, made.job, made.stage, made.digest), made, wanted, field)


def open_uri(uri: str, storage: Storage, field: str) -> Elsewhere:
    """The result at ``s3://bucket/.../stage/digest``, read with the job's own credentials and endpoint.

    Raises InputMissingError if nothing is committed there.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    prefix = key.removesuffix("manifest.json").strip("/")
    store = Store.of(storage.model_copy(update={"bucket": bucket, "prefix": ""}))
    try:
        return Elsewhere(store, prefix, manifest.load(store, layout.manifest_key(prefix)))
    except InputMissingError:
        raise InputMissingError(
            f"{field}.uri: no result is committed at {uri}; name the folder of one, as in "
            "s3://bucket/namespace/job/sft/3c561901eae3: `finetune get JOB --json` has its key as `manifest`"
        ) from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{field}.uri: {uri} cannot be read: {error}") from error


def of_uri(place: Elsewhere, wanted: Wanted, field: str) -> Found:
    """The adapter there; raises as ``of_stage``."""
    return _found(place.store, place.prefix, place.manifest, wanted, field)


def _found(store: Store, prefix: str, made: Manifest, wanted: Wanted, field: str) -> Found:
    if FOLDER not in made.outputs:
        outputs = ", ".join(name for name in made.outputs if name != "log" and "/" not in name)
        raise ConfigurationError(f"{field}: stage {made.stage} left {outputs}, no adapter; name one that trains one")
    if wanted is None:
        return Found(store, _inside(made.files), None)
    checkpoints = Checkpoints(store, prefix, writer="", keep=1)
    there = checkpoints.list()
    info = (
        checkpoints.best()
        if wanted == "best"
        else checkpoints.newest()
        if wanted == "last"
        else next((c for c in there if c.step == wanted), None)
    )
    if info is None:
        steps = ", ".join(f"{c.step}" for c in there) or "none"
        evaluated = "with an evaluation loss " if wanted == "best" else ""
        what = f"of step {wanted} " if isinstance(wanted, int) else evaluated
        raise InputMissingError(
            f"{field}.checkpoint: stage {made.stage} has no whole checkpoint {what}(there: {steps}); name one of them, "
            "or leave it out for the stage's result"
        )
    return Found(store, _inside(info.files), info.step)


def _inside(files: Sequence[File]) -> list[File]:
    return [file for file in files if file.path.startswith(f"{FOLDER}/")]
