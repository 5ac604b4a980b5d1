"""Jobs, children and results for tests: valid unless a test says otherwise, short to write."""

import copy
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.stage import Artifact, FoundResult, StageResult, Termination
from finetune_api.status import JobStatus, StageStatus
from finetune_api.types import FineTuneJob
from finetune_api.validate import parse
from finetune_operator.plan.children import Child

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
SFT: dict[str, Any] = {"name": "sft", "sft": {}}
DPO: dict[str, Any] = {"name": "dpo", "preference": {}}
MERGE: dict[str, Any] = {"name": "merge", "merge": {}}
GGUF: dict[str, Any] = {"name": "gguf", "quantize": {"gguf": ["Q4_K_M", "Q8_0"]}}
PIPELINE = [SFT, MERGE, GGUF]


def after(seconds: float) -> datetime:
    """So many seconds after ``NOW``."""
    return NOW + timedelta(seconds=seconds)


def raw_job(*stages: dict[str, Any], generation: int = 1, **spec: Any) -> dict[str, Any]:
    """A job as YAML gives it; ``spec`` replaces whole fields of the spec."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "bot", "namespace": "team", "uid": "u-1", "generation": generation},
        "spec": {
            "model": {"source": "hf://org/model"},
            "data": {
                "train": [{"source": "s3://data/train.jsonl"}],
                "preference": [{"source": "s3://data/pairs.jsonl"}],
                "prompts": [{"source": "s3://data/prompts.jsonl"}],
            },
            "storage": {"bucket": "finetune"},
            "pipeline": list(stages or PIPELINE),
            **spec,
        },
    }


def broken(path: str, value: Any) -> dict[str, Any]:
    """A valid job with one place changed; ``path`` may name fields that are not there yet."""
    job = copy.deepcopy(raw_job())
    at: Any = job
    *parents, last = path.replace("[", ".").replace("]", "").split(".")
    for part in parents:
        at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
    at[int(last) if last.isdigit() else last] = value
    return job


def a_job(*stages: dict[str, Any], generation: int = 1, **spec: Any) -> FineTuneJob:
    """The same, parsed."""
    return parse(raw_job(*stages, generation=generation, **spec))


def a_result(stage: str, *, artifacts: Iterable[str] = (), **figures: float | str) -> StageResult:
    """What a stage leaves; every stage's digest and manifest are its own."""
    made = [
        Artifact(stage=stage, name=name, uri=f"s3://b/{stage}/{name}", size_bytes=1, sha256="0") for name in artifacts
    ]
    return StageResult(
        digest=f"digest-{stage}", manifest=f"{stage}/manifest.json", artifacts=made, figures=dict(figures)
    )


def found(*stages: str) -> list[FoundResult]:
    """What ``prepare`` found for these stages."""
    return [FoundResult(stage=stage, **a_result(stage).model_dump()) for stage in stages]


def running(stage: str, attempt: int = 1, **more: Any) -> Child:
    """A child at work since ``NOW``."""
    return Child(
        **{"name": f"{stage}-{attempt}", "stage": stage, "attempt": attempt, "state": "Running", "start": NOW, **more}
    )


def pending(stage: str, attempt: int = 1, **more: Any) -> Child:
    """A child that has not begun."""
    return running(stage, attempt, **{"state": "Pending", "start": None, **more})


def succeeded(stage: str, attempt: int = 1, *, result: StageResult | None = None, **more: Any) -> Child:
    """A child that committed its result, ten seconds after ``NOW``."""
    message = Termination(result=result or a_result(stage), found=more.pop("found", []))
    return running(
        stage, attempt, **{"state": "Succeeded", "exit_code": 0, "termination": message, "end": after(10), **more}
    )


def failed(stage: str, attempt: int = 1, *, code: int | None = 70, words: str | None = None, **more: Any) -> Child:
    """A child that ended without a result, ten seconds after ``NOW``."""
    message = Termination(error=words) if words else None
    return running(
        stage, attempt, **{"state": "Failed", "exit_code": code, "termination": message, "end": after(10), **more}
    )


def done(*stages: str) -> JobStatus:
    """A status in which these stages are recorded as Complete."""
    return JobStatus(
        stages=[StageStatus(name=s, state="Complete", attempt=1, job=f"{s}-1", result=a_result(s)) for s in stages]  # type: ignore[arg-type]
    )


def stage_of(status: JobStatus, name: str) -> StageStatus:
    """That stage's line."""
    return next(stage for stage in status.stages if stage.name == name)


def condition_of(status: JobStatus, kind: str) -> tuple[str, str] | None:
    """(status, reason) of the condition, None if it was never set."""
    return next(((c.status, c.reason) for c in status.conditions if c.type == kind), None)
