"""``finetune plan``: what each stage reads, writes and needs, and which ones are done already."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.defaults import resolve_imatrix, shares_model, sharing_processes, uses_imatrix, with_adapter
from finetune_api.pipeline import (
    BLOCKS,
    ModelRef,
    block,
    data_of,
    find,
    kind,
    lora_ggufs,
    model_before,
    named_adapters,
    order,
    reward_stages,
    targets,
    training_block,
)
from finetune_api.types import (
    BASE,
    Data,
    FineTuneJob,
    FineTuneJobSpec,
    Merge,
    Method,
    Quantize,
    Reward,
    TrainingBlock,
)
from finetune_api.validate import FieldError
from finetune_cli import words
from finetune_cli.access import opened
from finetune_cli.checks import signatures
from finetune_cli.errors import InvalidJobError
from finetune_cli.ledger import JobLedger
from finetune_cli.modelconfig import UnknownModelError, architecture
from finetune_cli.objects import reference
from finetune_cli.pull import committed
from finetune_jobs.estimate import (
    Architecture,
    bitsandbytes_bytes,
    disk,
    gguf_bytes,
    lora_parameters,
    saved_parameters,
    trained_parameters,
    training_memory,
    unfit,
)
from finetune_operator.plan.rules import warnings

_ROWS = {
    "sft": "train and eval",
    "preference": "preference",
    "reward": "preference",
    "rl": "prompts",
    "merge": "eval and test",
    "quantize": "test",
}


@dataclass(frozen=True)
class StagePreview:
    """One stage, as far as it can be told beforehand. None: it cannot."""

    name: str
    kind: str
    reads: list[str]
    writes: list[str]
    trainable: int | None = None
    """Parameters that are trained; only of training stages."""
    memory_bytes: int | None = None
    """Of one process at its peak."""
    disk_bytes: int | None = None
    """Of what it writes."""
    reuse: bool = False
    """Its result is committed already, so it would not run."""


@dataclass(frozen=True)
class Preview:
    """A whole job."""

    stages: list[StagePreview]
    parameters: int | None
    """Of the base model."""
    disk_bytes: int | None
    """If one machine does it all: model, merged model, GGUFs."""
    unknown: str = ""
    """Why there are no figures."""
    notes: list[str] = field(default_factory=list)
    warnings: list[FieldError] = field(default_factory=list)


def preview(job: FineTuneJob, file: str, reusable: Callable[[FineTuneJob], tuple[set[str], str]]) -> Preview:
    """What would happen if the job were run now. A target module that the model lacks, or a GGUF
    type that it cannot have, is an InvalidJobError.

    ``reusable``: the stages that would be taken over, and a note on how sure that is.
    """
    spec = job.spec
    model, unknown = None, ""
    try:
        model = architecture(spec.model)
    except UnknownModelError as error:
        unknown = str(error)
    if model is not None and (errors := [*_wrong_targets(spec, model), *_wrong_types(spec, model)]):
        raise InvalidJobError(file, errors)
    done, note = reusable(job)
    stages = [_stage(spec, name, model, name in done) for name in order(spec)]
    total = disk(model, spec).total if model else None
    parameters = model.parameters if model else None
    notes = [*([note] if note else []), *(_sharing(spec, model) if model else [])]
    return Preview(stages, parameters, total, unknown, notes, warnings(job))


def _wrong_targets(spec: FineTuneJobSpec, model: Architecture) -> list[FieldError]:
    found = []
    for index, stage in enumerate(spec.pipeline):
        training = training_block(stage)
        if training is not None and training.ia3 is not None:
            try:
                trained_parameters(model, training)
            except ValueError as error:
                which = kind(spec, stage.name)
                found.append(FieldError(f"spec.pipeline[{index}].{which}.ia3.targetModules", str(error)))
        if training is None or training.lora is None:
            continue
        try:
            lora_parameters(model, training.lora.r, training.lora.target_modules)
        except ValueError as error:
            which = kind(spec, stage.name)
            found.append(FieldError(f"spec.pipeline[{index}].{which}.lora.targetModules", str(error)))
        try:
            saved_parameters(model, training.lora.modules_to_save)
        except ValueError as error:
            which = kind(spec, stage.name)
            found.append(FieldError(f"spec.pipeline[{index}].{which}.lora.modulesToSave", str(error)))
    return found


def _wrong_types(spec: FineTuneJobSpec, model: Architecture) -> Iterator[FieldError]:
    for index, stage in enumerate(spec.pipeline):
        for number, name in enumerate(stage.quantize.gguf if stage.quantize else []):
            if words := unfit(model, name):
                yield FieldError(f"spec.pipeline[{index}].quantize.gguf[{number}]", words)


def _stage(spec: FineTuneJobSpec, name: str, model: Architecture | None, reuse: bool) -> StagePreview:
    figures = _figures(spec, name, model) if model else {}
    return StagePreview(
        name, kind(spec, name), list(_reads(spec, name)), list(_writes(spec, name)), **figures, reuse=reuse
    )


def _reads(spec: FineTuneJobSpec, name: str) -> Iterator[str]:
    match kind(spec, name):
        case "prepare":
            yield spec.model.source
            yield from dict.fromkeys(source for data in _all_data(spec) for source in _sources(data))
            yield from (
                adapter.uri for stage in spec.pipeline for adapter in named_adapters(stage) if adapter.uri is not None
            )
        case "baseline":
            yield from ("base", "rows of test, general, refusals")
        case "evaluate":
            yield from (target.name for target in targets(spec))
            yield "rows of test, general, refusals"
        case "report":
            yield "all of the above"
        case which:
            yield from _model(_started_from(spec, name))
            yield from (f"{adapter.stage}/adapter" for adapter in named_adapters(find(spec, name)) if adapter.stage)
            for judge in reward_stages(find(spec, name)):
                yield f"{judge}/reward"
            own = " of its own" if data_of(spec, name) != spec.data else ""
            stage = find(spec, name)
            weighed = stage.quantize is not None and resolve_imatrix(stage.quantize) is not None
            yield f"rows of {'train and ' if weighed else ''}{_ROWS[which]}{own}"


def _writes(spec: FineTuneJobSpec, name: str) -> Iterator[str]:
    match kind(spec, name):
        case "prepare":
            yield from ("base", "frozen rows", "data card")
        case "baseline" | "evaluate":
            yield from ("answers", "scores")
        case "report":
            yield from ("index.html", "report.json", "evidence")
        case _:
            match block(find(spec, name)):
                case Reward():
                    yield "reward model"
                case Merge(combination="svd"):
                    yield from ("model", "adapter")
                case Merge() | TrainingBlock(method=Method.FULL):
                    yield "model"
                case Quantize(gguf=types, bitsandbytes=others):
                    yield from (*(str(t) for t in types), *lora_ggufs(spec, name), *others)
                    yield from ["Modelfile"] if types else []
                case TrainingBlock(start="merge"):
                    yield from ("model", "adapter")
                case _:
                    yield "adapter"


def _started_from(spec: FineTuneJobSpec, name: str) -> ModelRef:
    """What comes before, but for an adapter that a merge names, or leaves out."""
    model = model_before(spec, name)
    return ModelRef(model.weights) if named_adapters(find(spec, name)) else model


def _model(model: ModelRef) -> Iterator[str]:
    yield model.weights if model.weights == BASE else f"{model.weights}/model"
    if model.adapter:
        yield f"{model.adapter}/adapter"


def _all_data(spec: FineTuneJobSpec) -> Iterator[Data]:
    yield spec.data
    for stage in spec.pipeline:
        yield stage.data


def _sources(data: Data) -> Iterator[str]:
    for role in Data.model_fields:
        for entry in getattr(data, role):
            yield entry.source


def _figures(spec: FineTuneJobSpec, name: str, model: Architecture) -> Mapping[str, int]:
    if kind(spec, name) not in BLOCKS:
        return {}
    stage = find(spec, name)
    match block(stage):
        case TrainingBlock() as training:
            trained = with_adapter(spec, name)
            shards = sharing_processes(stage) if training.training.distributed == "fsdp" else 1
            memory = training_memory(model, trained, on_gpu=stage.resources.gpus > 0, shards=shards)
            full = training.method is Method.FULL
            # An adapter is kept in float32, a fully trained model in 16 bits.
            trainable = model.parameters if full else memory.adapter // 4
            kept = (2 if full else 4) * trainable
            if training.start == "merge" and not full:  # the model that the adapter belongs to
                kept += 2 * model.parameters
            return {"trainable": trainable, "memory_bytes": memory.total, "disk_bytes": kept}
        case Merge():
            largest = max([model.vocabulary * model.hidden, *(one.inputs * one.outputs for one in model.linears)])
            held = sum(_adapter_bytes(spec, adapter.stage, model) for adapter in named_adapters(stage) if adapter.stage)
            return {"memory_bytes": 2 * 4 * largest + held + 2**30, "disk_bytes": 2 * model.parameters}
        case Quantize(gguf=types, bitsandbytes=others) as quantize:
            files = sum(gguf_bytes(model, t, imatrix=uses_imatrix(quantize, t)) for t in types)
            loras = [adapter.stage for adapter in lora_ggufs(spec, name).values() if adapter.stage]
            files += sum(4 * trained_parameters(model, with_adapter(spec, stage)) for stage in loras)
            return {"disk_bytes": files + sum(bitsandbytes_bytes(model, kind) for kind in others)}


def _adapter_bytes(spec: FineTuneJobSpec, name: str, model: Architecture) -> int:
    """In float32: its own numbers, and those in what it is joined with."""
    return 2 * 4 * trained_parameters(model, with_adapter(spec, name))


def _sharing(spec: FineTuneJobSpec, model: Architecture) -> Iterator[str]:
    """What `distributed: auto` chooses between, for the stages where it has a choice."""
    for stage in spec.pipeline:
        training = training_block(stage)
        if training is None or not shares_model(training) or training.training.distributed != "auto":
            continue
        if (shards := sharing_processes(stage)) > 1 and stage.resources.gpus:
            whole, share = (words.size(training_memory(model, training, shards=n).total) for n in (1, shards))
            yield (
                f"{stage.name}: a GPU needs {whole} to hold the model, {share} to hold a share of it among {shards}; "
                "the stage shares it where it must"
            )


def done_here(job: FineTuneJob, root: Path) -> tuple[set[str], str]:
    """The stages that would be taken over from this job's earlier runs, and a note on how sure that is.

    Exact for what is on this machine; a model or data set of the hub may have changed since, only prepare looks.
    """
    ledger = JobLedger(root, job.metadata.namespace, job.metadata.name)
    if not ledger.known:
        return set(), ""
    record, status = ledger.record(), ledger.status()
    files = signatures(job)
    if not record.changed(job, files):
        return {s.name for s in status.stages if s.state.done}, "the spec is that of the run before"
    if _given(record.job.spec) != _given(job.spec) or record.files != files:
        return set(), "model, data or storage changed since the run before: prepare finds out what can be reused"
    try:
        with opened(job.spec.storage, root) as access, access.store() as store:
            from finetune_jobs.run.digest import find_done

            prepared = next((m for m in committed(store, status) if m.stage == "prepare"), None)
            if prepared is None:
                return set(), ""
            found = find_done(store, reference(job), job.spec, prepared.outputs)
            return set(found), ""
    except Exception as error:  # a plan without this is better than none
        return set(), f"what can be reused is not known: {error}"


def _given(spec: FineTuneJobSpec) -> object:
    own = {stage.name: stage.data for stage in spec.pipeline if stage.data != Data()}
    elsewhere = {(s.name, n): a for s in spec.pipeline for n, a in enumerate(named_adapters(s)) if a.uri is not None}
    return spec.model, spec.data, spec.seed, spec.storage, own, elsewhere


def as_text(job: FineTuneJob, planned: Preview) -> str:
    """For people."""
    size = f", {planned.parameters:,} parameters" if planned.parameters else ""
    head = f"{job.metadata.name}: valid; {job.spec.model.source}{size}"
    rows = []
    for stage in planned.stages:
        share = f" ({stage.trainable / planned.parameters:.2%})" if stage.trainable and planned.parameters else ""
        rows.append(
            [
                stage.name,
                stage.kind if stage.kind != stage.name else "",
                "reuse" if stage.reuse else "run",
                f"{stage.trainable:,}{share}" if stage.trainable else "",
                words.size(stage.memory_bytes) if stage.memory_bytes else "",
                words.size(stage.disk_bytes) if stage.disk_bytes else "",
                ", ".join(_short(source) for source in stage.reads),
                ", ".join(stage.writes),
            ]
        )
    parts = [head, words.table(["stage", "kind", "", "trainable", "memory", "disk", "reads", "writes"], rows)]
    notes = list(planned.notes)
    if planned.unknown:
        notes.insert(0, f"sizes are not known: {planned.unknown}")
    if planned.disk_bytes:
        notes.insert(0, f"disk for models, if one machine does it all: {words.size(planned.disk_bytes)}")
    parts += ["\n".join(notes)] if notes else []
    parts += ["\n".join(f"warning: {w}" for w in planned.warnings)] if planned.warnings else []
    return "\n\n".join(parts)


def _short(source: str) -> str:
    """A local file by its name alone: a table of whole paths is wider than any terminal."""
    return source.rpartition("/")[2] if source.startswith("file://") else source


def as_json(planned: Preview) -> dict[str, Any]:
    """For programs."""
    return {
        "valid": True,
        "parameters": planned.parameters,
        "diskBytes": planned.disk_bytes,
        "unknown": planned.unknown,
        "stages": [
            {
                "name": s.name,
                "kind": s.kind,
                "reads": s.reads,
                "writes": s.writes,
                "trainableParameters": s.trainable,
                "memoryBytes": s.memory_bytes,
                "diskBytes": s.disk_bytes,
                "reuse": s.reuse,
            }
            for s in planned.stages
        ],
        "notes": planned.notes,
        "warnings": [{"path": w.path, "message": w.message} for w in planned.warnings],
    }
