"""The children: their names, and what each attempt is told."""

import hashlib

from finetune_api.pipeline import waits_for
from finetune_api.stage import JobRef, StageRun
from finetune_api.status import StageStatus
from finetune_api.types import FineTuneJob
from finetune_operator.plan.children import NewChild
from finetune_operator.plan.nodes import service_name
from finetune_operator.plan.sizes import resources_of

_LONGEST_NAME = 60
"""A Job's name may have 63 characters; an Indexed Job's pods add their index."""


def child_name(job: FineTuneJob, stage: str, attempt: int) -> str:
    """``<job>-<stage>-<attempt>-<hash>``, the same whenever asked, another for another job of the same name."""
    meta = job.metadata
    # Not of the generation: a spec that changes before an attempt shows, such as by `suspend`, must not make it twice.
    identity = "/".join([meta.namespace, meta.name, meta.uid, stage, str(attempt)])
    tail = f"-{attempt}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    readable = f"{meta.name}-{stage}"[: _LONGEST_NAME - len(tail)].rstrip("-")
    return readable + tail


def new_child(job: FineTuneJob, stages: dict[str, StageStatus], stage: str) -> NewChild:
    """The attempt that the stage's status names; all that the stage waits for must be done."""
    status = stages[stage]
    results = {name: stages[name].result for name in waits_for(job.spec, stage)}
    run = StageRun(
        job=JobRef(namespace=job.metadata.namespace, name=job.metadata.name, uid=job.metadata.uid),
        stage=stage,
        attempt=status.attempt,
        spec=job.spec,
        inputs={name: result.manifest for name, result in results.items() if result is not None},
    )
    prepared = results.get("prepare")
    parameters = prepared.figures.get("parameters") if prepared else None
    return NewChild(
        status.job,
        run,
        int(parameters) if parameters is not None else None,
        service_name(job) if resources_of(job.spec, stage).nodes > 1 else "",
    )
