"""When is an earlier result as good as a new one? When the digest of all that could change it is equal.

A stage's digest covers its block of the spec, the contents of what it reads (not the names of the stages that made it),
the seed and the version of its code. It leaves out what changes only where or how fast it runs: storage, resources,
retries, the image. So a changed hyper-parameter reruns its stage and those after it, a moved bucket reruns nothing.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from finetune_api.defaults import base_quantization, resolve_imatrix
from finetune_api.pipeline import (
    ModelRef,
    Target,
    adapter_stages,
    block,
    data_of,
    find,
    kind,
    merged_adapters,
    model_after,
    model_before,
    order,
    reward_stages,
    targets,
    waits_for,
)
from finetune_api.stage import JobRef, Manifest
from finetune_api.types import BASE, FineTuneJobSpec
from finetune_jobs.store.client import Store
from finetune_jobs.store.manifest import find_committed

CODE_VERSION = {
    "prepare": 2,
    "baseline": 1,
    "sft": 1,
    "preference": 1,
    "reward": 1,
    "rl": 1,
    "merge": 2,
    "quantize": 2,
    "evaluate": 1,
    "report": 1,
}
"""Raised when a stage's code gives other results for the same inputs; earlier results of it are then made anew."""

Outputs = Mapping[str, Mapping[str, str]]
"""Stage name to its outputs' digests by logical name."""


def data_set(spec: FineTuneJobSpec, name: str) -> str:
    """The frozen data set that a stage reads: ``default``, or its own name if it overrides a role."""
    names = [stage.name for stage in spec.pipeline]
    return name if name in names and data_of(spec, name) != spec.data else "default"


def reads(spec: FineTuneJobSpec, name: str) -> list[tuple[str, str]]:
    """What a stage reads, as (stage, logical output). An output that its stage did not make is simply not read."""
    locked = [("prepare", f"data/{rows}") for rows in ("default/test", "general", "refusals")]
    match kind(spec, name):
        case "prepare":
            return []
        case "baseline":
            return [("prepare", "base"), *locked]
        case "sft" | "preference" | "reward" | "rl" as training:
            role = {"sft": "train", "rl": "prompts"}.get(training, "preference")
            roles = (role, "eval" if role == "train" else f"{role}Eval")
            return [
                *_model(model_before(spec, name)),
                *(pair for judge in reward_stages(find(spec, name)) for pair in _judge(spec, judge)),
                *(("prepare", f"data/{data_set(spec, name)}/{role}") for role in roles),
            ]
        case "merge":
            return [
                *_folded(spec, name),
                ("prepare", f"data/{data_set(spec, name)}/eval"),
                ("prepare", "data/default/test"),
            ]
        case "quantize":
            read = [*_model(model_before(spec, name)), *_weighed(spec, name), *_merged(spec, name)]
            return [*read, ("prepare", "data/default/test")]
        case "evaluate":
            tuned = [pair for t in targets(spec) for pair in _target(spec, t)]
            return [("prepare", "base"), *locked, ("baseline", "answers"), ("baseline", "scores"), *tuned]
        case _:  # report: all that was made
            return [(stage, "*") for stage in waits_for(spec, name)]


def _model(model: ModelRef) -> list[tuple[str, str]]:
    weights = ("prepare", "base") if model.weights == BASE else (model.weights, "model")
    return [weights, (model.adapter, "adapter")] if model.adapter else [weights]


def _folded(spec: FineTuneJobSpec, name: str) -> list[tuple[str, str]]:
    """The weights and the adapters of a merge; ``prepare`` brings those from elsewhere."""
    weights = _model(ModelRef(model_before(spec, name).weights))
    named = enumerate(merged_adapters(spec, name))
    return [*weights, *((a.stage, "adapter") if a.stage else ("prepare", f"adapters/{name}/{n}") for n, a in named)]


def _judge(spec: FineTuneJobSpec, name: str) -> list[tuple[str, str]]:
    """A reward model: its own weights, or an adapter with a head and the weights that it belongs to."""
    made = model_after(spec, name)
    return [(name, "reward"), *(_model(ModelRef(made.weights)) if made.adapter else [])]


def _weighed(spec: FineTuneJobSpec, name: str) -> list[tuple[str, str]]:
    """The rows that an importance matrix is measured on."""
    stage = find(spec, name)
    measured = stage.quantize is not None and resolve_imatrix(stage.quantize) is not None
    return [("prepare", f"data/{data_set(spec, name)}/train")] if measured else []


def _merged(spec: FineTuneJobSpec, name: str) -> list[tuple[str, str]]:
    """What the model was merged from, where the adapter is written too."""
    stage, merged = find(spec, name), model_before(spec, name).weights
    written = stage.quantize is not None and stage.quantize.lora_gguf and merged != BASE
    return _folded(spec, merged) if written else []


def _target(spec: FineTuneJobSpec, target: Target) -> list[tuple[str, str]]:
    if target.quantized:
        return [(target.stage, f"{'gguf' if target.gguf else 'bitsandbytes'}/{target.quantized}")]
    return _model(model_after(spec, target.stage))


def inputs_of(spec: FineTuneJobSpec, name: str, outputs: Outputs) -> dict[str, str]:
    """The content digests of what the stage reads, by ``stage:output``; ``outputs`` holds the stages done so far."""
    found: dict[str, str] = {}
    for stage, wanted in reads(spec, name):
        for logical, digest in outputs.get(stage, {}).items():
            if wanted in ("*", logical):
                found[f"{stage}:{logical}"] = digest
    return found


def digest_of(spec: FineTuneJobSpec, job: JobRef, name: str, inputs: Mapping[str, str]) -> str:
    """The hex sha256 under which this stage's result is committed."""
    which = kind(spec, name)
    content = {
        "kind": which,
        "code": CODE_VERSION[which],
        "spec": _settings(spec, job, name),
        "inputs": sorted(f"{_by_content(key, _told_apart(spec, name))}={digest}" for key, digest in inputs.items()),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _by_content(key: str, told_apart: list[str]) -> str:
    """Renaming an earlier stage changes nothing, but where the block tells a weight by that name: of a reward model, or
    of one of several adapters.
    """
    stage, _, output = key.partition(":")
    return key if output == "reward" or (output == "adapter" and stage in told_apart) else output


def _told_apart(spec: FineTuneJobSpec, name: str) -> list[str]:
    """The stages whose adapters the stage knows by name: it merges several, or writes each as a file of its own."""
    match kind(spec, name):
        case "merge":
            return adapter_stages(find(spec, name))
        case "quantize" if (merged := model_before(spec, name).weights) != BASE:
            return adapter_stages(find(spec, merged))
        case _:
            return []


def _settings(spec: FineTuneJobSpec, job: JobRef, name: str) -> Any:
    evaluation = spec.evaluation.model_dump(mode="json", include={"metrics", "max_rows", "max_new_tokens"})
    gates = spec.evaluation.gates.model_dump(mode="json")
    match kind(spec, name):
        case "prepare":
            stages = [
                s.model_dump(mode="json", exclude={"resources", "template", "retries", "active_deadline_seconds"})
                for s in spec.pipeline
            ]
            return [spec.seed, spec.model.model_dump(mode="json"), spec.data.model_dump(mode="json"), stages]
        case "baseline":
            return [spec.seed, evaluation]
        case "evaluate":
            return [spec.seed, evaluation, [t.name for t in targets(spec)]]
        case "report":
            return [job.namespace, job.name, _reported(spec)]
        case "quantize":  # the file names carry the job's name; a stricter bound must be tested anew
            return [job.name, spec.seed, _block(spec, name), gates["max_gguf_divergence"]]
        case "merge":  # what the adapter was trained on decides which bases there are
            return [spec.seed, _block(spec, name), _quantization(spec, name)]
        case _:
            return [spec.seed, _block(spec, name)]


def _quantization(spec: FineTuneJobSpec, name: str) -> Any:
    trained_on = base_quantization(spec, name)
    return trained_on.model_dump(mode="json") if trained_on else None


def _reported(spec: FineTuneJobSpec) -> Any:
    """The report shows the whole spec, but for where it runs and what becomes of its record."""
    where = {"storage", "suspend", "template", "ttl_seconds_after_finished", "pending_deadline_seconds"}
    return spec.model_dump(mode="json", exclude=where | {"pipeline"}) | {
        "pipeline": [s.model_dump(mode="json", exclude={"template"}) for s in spec.pipeline]
    }


def _block(spec: FineTuneJobSpec, name: str) -> Any:
    # How a run is saved and taken up again does not change what it comes to; and `resumeFrom` must meet the
    # checkpoints of the run that it means. `steps` stays: evaluations follow it, and the best is chosen among them.
    # Nor does it matter how the GPUs share the model, or whose kernels compute it: those of another GPU differ as much.
    how = {"checkpoint": {"resume_from", "keep", "minutes"}, "training": {"distributed", "backend"}}
    return block(find(spec, name)).model_dump(mode="json", exclude=how)


def find_done(store: Store, job: JobRef, spec: FineTuneJobSpec, prepared: Mapping[str, str]) -> dict[str, Manifest]:
    """The later stages whose results are already committed for these very inputs, every object of them in place."""
    outputs: dict[str, Mapping[str, str]] = {"prepare": prepared}
    found: dict[str, Manifest] = {}
    for name in order(spec)[1:]:
        if any(stage not in outputs for stage, _ in reads(spec, name)):
            continue  # it will read what is still to be made
        digest = digest_of(spec, job, name, inputs_of(spec, name, outputs))
        manifest = find_committed(store, job, name, digest)
        if manifest is not None:
            outputs[name] = manifest.outputs
            found[name] = manifest
    return found
