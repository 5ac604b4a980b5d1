"""Rules on what a pod can be told."""

from collections.abc import Iterator

from pydantic import BaseModel

from finetune_api.types import FineTuneJobSpec, Template
from finetune_api.validate import FieldError
from finetune_operator.plan.rules.walk import stages

ROOM = (256 - 32) << 10
"""Bytes: Kubernetes takes 256 KiB of annotations of a pod, all together. Some are left for inputs, networks, queues."""


def task_fits(spec: FineTuneJobSpec) -> Iterator[FieldError]:
    """The whole spec goes with each pod as an annotation, beside the user's own."""
    whole = _size(spec) + max(_annotations(spec.template, stage.template) for _, stage in stages(spec))
    if whole <= ROOM:
        return
    parts = {"spec.model": _size(spec.model), "spec.data": _size(spec.data), "spec.template": _size(spec.template)}
    parts |= {path: _size(stage) for path, stage in stages(spec)}
    path = max(parts, key=lambda part: parts[part])
    words = f"the job is {whole >> 10} KiB as JSON, and a pod can be told at most {ROOM >> 10}"
    mend = "name a folder instead of many files, a ConfigMap instead of long values, or make several jobs"
    yield FieldError(path, f"{words}; {parts[path] >> 10} of them are here: {mend}")


def _size(part: BaseModel) -> int:
    return len(part.model_dump_json(by_alias=True, exclude_unset=True).encode())


def _annotations(general: Template, own: Template) -> int:
    found = own.annotations if own.annotations is not None else general.annotations
    return sum(len(key.encode()) + len(value.encode()) for key, value in (found or {}).items())
