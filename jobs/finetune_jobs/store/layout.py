"""Where things are in the bucket. Pure; made to be read by people and ``aws s3 ls``.

::

    <prefix>/<namespace>/<name>/<stage>/<digest12>/manifest.json
                                                  /artifacts/<writer>/<path>
                                                  /checkpoints/step-00000200/manifest.json
                                                                            /<writer>/<path>
                                                  /logs/attempt-2-<writer>.jsonl
    <prefix>/<namespace>/<name>/<stage>/logs/attempt-1-<writer>.jsonl
    <prefix>/<namespace>/<name>/<stage>/latest.json
    <prefix>/<namespace>/.reuse/<digest>.json

The writer is unique to an attempt: one that should be dead cannot overwrite its successor's files, and the manifest
says whose count. No job can be called ``.reuse``. An attempt's log lies beside the result that it worked for, or above
all results if the attempt ended before it knew its inputs.
"""

import re

from finetune_api.stage import JobRef


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def job_prefix(prefix: str, job: JobRef) -> str:
    """Below it is all that a job ever made."""
    return _join(prefix, job.namespace, job.name)


def result_prefix(prefix: str, job: JobRef, stage: str, digest: str) -> str:
    """One result of a stage: its inputs, not the time, tell it from another."""
    return _join(job_prefix(prefix, job), stage, digest[:12])


def manifest_key(result: str) -> str:
    """The result below that prefix exists when, and only when, this object does."""
    return f"{result}/manifest.json"


def latest_key(prefix: str, job: JobRef, stage: str) -> str:
    """Names the manifest of the result made last; for people."""
    return _join(job_prefix(prefix, job), stage, "latest.json")


def reuse_key(prefix: str, namespace: str, digest: str) -> str:
    """Names a manifest of any job of the namespace with that digest."""
    return _join(prefix, namespace, ".reuse", f"{digest}.json")


def stage_prefix(prefix: str, job: JobRef, stage: str) -> str:
    """All results of a stage are below it."""
    return _join(job_prefix(prefix, job), stage)


def log_key(below: str, attempt: int, writer: str) -> str:
    """What an attempt said; ``below`` is its result's prefix, or its stage's."""
    return f"{below}/logs/attempt-{attempt}-{writer}.jsonl"


def attempt_of_log(key: str) -> tuple[int, str] | None:
    """Attempt and writer of the log with that key; None for any other object."""
    found = re.search(r"/logs/attempt-(\d+)-([^/]+)\.jsonl$", key)
    return (int(found[1]), found[2]) if found else None


def checkpoints_prefix(result: str) -> str:
    """All checkpoints of a result; ends in ``/``."""
    return f"{result}/checkpoints/"


def checkpoint_prefix(result: str, step: int) -> str:
    """One checkpoint. Padded, so that listings are in order of steps."""
    return f"{result}/checkpoints/step-{step:08d}"


def step_of(key: str) -> int | None:
    """The step of the checkpoint that a key belongs to."""
    found = re.search(r"/checkpoints/step-(\d{8,})/", key)
    return int(found[1]) if found else None
