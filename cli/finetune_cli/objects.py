"""A job's objects in the store: its checkpoints, and how to remove what nobody else uses."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_api.stage import JobRef
from finetune_api.types import FineTuneJob
from finetune_cli.ledger import JobLedger

if TYPE_CHECKING:
    from finetune_jobs.store.checkpoints import CheckpointInfo
    from finetune_jobs.store.client import Store


def reference(job: FineTuneJob) -> JobRef:
    """Whose objects they are."""
    return JobRef(namespace=job.metadata.namespace, name=job.metadata.name, uid=job.metadata.uid)


def checkpoints(store: "Store", job: FineTuneJob) -> list[tuple[str, str, "CheckpointInfo"]]:
    """(stage, digest12, checkpoint) of every whole checkpoint of the job, whatever spec it is of."""
    from finetune_jobs.store import layout
    from finetune_jobs.store.checkpoints import Checkpoints

    found = []
    for stage in job.spec.pipeline:
        if stage.sft is None and stage.preference is None:
            continue
        below = f"{layout.job_prefix(store.prefix, reference(job))}/{stage.name}/"
        keys = [item.key for item in store.list(below) if layout.step_of(item.key) is not None]
        for digest in dict.fromkeys(key.removeprefix(below).partition("/")[0] for key in keys):
            listed = Checkpoints(store, f"{below}{digest}", writer="", keep=1).list()
            found += [(stage.name, digest, info) for info in listed]
    return found


def used_by_others(own: JobLedger, others: Iterable[JobLedger]) -> set[str]:
    """Keys of the manifests that other jobs of this machine took their results from."""
    manifests = (
        s.result.manifest for other in others if other.name != own.name for s in other.status().stages if s.result
    )
    return set(manifests)


@dataclass(frozen=True)
class Removal:
    """What goes, in this order, so that never a manifest stands without its files: pointers, manifests, the rest."""

    pointers: list[str]
    manifests: list[str]
    rest: list[str]
    size_bytes: int

    @property
    def count(self) -> int:
        """How many objects."""
        return len(self.pointers) + len(self.manifests) + len(self.rest)


def removable(store: "Store", job: FineTuneJob, used: set[str]) -> Removal:
    """The job's objects, but those of results whose manifest is in ``used``."""
    from finetune_jobs.store import layout, manifest

    objects = list(store.list(f"{layout.job_prefix(store.prefix, reference(job))}/"))
    kept: set[str] = set()
    pointers: list[str] = []
    for key in (o.key for o in objects if o.key.endswith("/manifest.json") and layout.step_of(o.key) is None):
        result = manifest.load(store, key)
        if key in used:
            kept |= {key, *(file.key for file in result.files)}
            continue
        pointer = layout.reuse_key(store.prefix, job.metadata.namespace, result.digest)
        if _points_to(store, pointer, key):
            pointers.append(pointer)
    gone = [o for o in objects if o.key not in kept]
    manifests = [o.key for o in gone if o.key.endswith("/manifest.json")]
    rest = [o.key for o in gone if not o.key.endswith("/manifest.json")]
    return Removal(pointers, manifests, rest, sum(o.size for o in gone))


def _points_to(store: "Store", pointer: str, manifest: str) -> bool:
    from finetune_jobs.run.errors import InputMissingError

    try:
        return bool(json.loads(store.get_bytes(pointer)).get("manifest") == manifest)
    except (InputMissingError, ValueError):
        return False


def remove(store: "Store", job: FineTuneJob, removal: Removal) -> None:
    """Delete the objects, and what no listing shows: the parts of uploads that were broken off."""
    from finetune_jobs.store import layout

    for keys in (removal.pointers, removal.manifests, removal.rest):
        store.delete(keys)
    store.abort_uploads(f"{layout.job_prefix(store.prefix, reference(job))}/")
