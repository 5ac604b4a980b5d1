"""``report.json``: everything that is known of a run, from what its stages left. Pure; the page shows nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from finetune_api.pipeline import Target, kind, model_after, model_before, targets
from finetune_api.stage import JobRef, Manifest
from finetune_api.types import BASE, FineTuneJobSpec
from finetune_jobs.evaluation import failures, gates, lab, precision, rewards
from finetune_jobs.evaluation.answers import Answer
from finetune_jobs.evaluation.diffs import change, pairs
from finetune_jobs.evaluation.preferences import held_out

Json = dict[str, Any]
EXAMPLES = 6


@dataclass(frozen=True)
class Evidence:
    """What the stages left, read into memory."""

    job: JobRef
    spec: FineTuneJobSpec
    manifests: Mapping[str, Manifest]
    """Of every stage, in the order of running."""
    logs: Mapping[str, Mapping[str, Any]]
    """The JSON files at the top of each stage's result, by stage and file name."""
    answers: Mapping[str, Sequence[Answer]]
    """By target, ``base`` first."""


def build(evidence: Evidence) -> Json:
    """The report; its fields are described in docs/stages/report.md."""
    spec, manifests, logs = evidence.spec, evidence.manifests, evidence.logs
    tuned = targets(spec)
    scored = logs["evaluate"]["scores.json"]
    scores = scored["scores"]
    quantized = quantizations(evidence)
    judged = gates.judge(spec, tuned, scores, {name: q["kl"] for name, q in quantized.items() if "kl" in q})
    training = {name: files["training.json"] for name, files in logs.items() if "training.json" in files}
    card = logs["prepare"].get("datacard.json", {})
    environments = {name: env for name, files in logs.items() if (env := _environment(files))}
    requirements = lab.judge(
        lab.Facts(
            spec=spec,
            manifests=manifests,
            environments=environments,
            model_version=model_version(evidence),
            hyperparameters={name: log.get("training") for name, log in training.items()},
            answers=evidence.answers,
            scores=scores,
            data_digests=data_digests(manifests["prepare"]),
            regressions=[g.name for g in judged if g.gate.startswith("maxRegression") and not g.passed],
        )
    )
    merges = {name: files["merge.json"] for name, files in logs.items() if "merge.json" in files}
    main = main_target(tuned).name
    failed = [g.name for g in judged if not g.passed] + [f"lab: {r.requirement}" for r in requirements if not r.passed]
    return {
        "job": {"namespace": evidence.job.namespace, "name": evidence.job.name, "uid": evidence.job.uid},
        "finished": manifests["evaluate"].finished,
        "model": {
            "source": spec.model.source,
            "version": model_version(evidence),
            "digest": manifests["prepare"].outputs.get("base", ""),
            "record": logs["prepare"].get("base.json", {}),
        },
        "seed": spec.seed,
        "spec": spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "data": {"sha256": data_digests(manifests["prepare"]), "card": card},
        "targets": [BASE, *(t.name for t in tuned)],
        "mainTarget": main,
        "scores": scores,
        "settings": scored["settings"],
        "definitions": scored["definitions"],
        "gates": [asdict(gate) for gate in judged],
        "lab": [asdict(row) for row in requirements],
        "gatesPassed": not failed,
        "gatesFailed": failed,
        "training": training,
        "preference": {
            name: held_out(spec, log, scores) for name, log in training.items() if log["kind"] == "preference"
        },
        "reward": {name: rewards.accuracy(log) for name, log in training.items() if log["kind"] == "reward"},
        "rl": {name: rewards.change(log) for name, log in training.items() if log["kind"] == "rl"},
        "merge": merges,
        "quantize": {name: files["quantize.json"] for name, files in logs.items() if "quantize.json" in files},
        "ggufs": quantized,
        "precision": precision.table(
            tuned,
            quantized | packed(evidence),
            scores,
            _score(scored["settings"]["metrics"]),
            wide=[name for name, log in merges.items() if log.get("dtype") == "float32"],
        ),
        "failures": {t.name: _failures(evidence, t.name) for t in tuned},
        "examples": _examples(evidence.answers[BASE], evidence.answers[main]),
        "rollback": rollback(evidence),
        "stages": [_stage(evidence, name, environments.get(name, {})) for name in manifests],
        "environments": environments,
        "artifacts": [a.model_dump(by_alias=True) for m in manifests.values() for a in m.artifacts],
    }


def main_target(tuned: Sequence[Target]) -> Target:
    """The target whose figures stand for the job: the last 16-bit model, else the first GGUF."""
    return next((t for t in reversed(tuned) if t.quantized is None), tuned[0])


def model_version(evidence: Evidence) -> str:
    """Which base model exactly: source with the hub's commit, or with the digest over its files' digests."""
    base = evidence.logs["prepare"].get("base.json", {})
    digest = evidence.manifests["prepare"].outputs.get("base", "")
    if base.get("revision"):
        return f"{evidence.spec.model.source} at revision {base['revision']}"
    return f"{evidence.spec.model.source}, digest {digest}" if digest else ""


def data_digests(prepare: Manifest) -> dict[str, str]:
    """sha256 of every frozen data file by its path."""
    return {f.path: f.sha256 for f in prepare.files if f.path.startswith("data/")}


def quantizations(evidence: Evidence) -> dict[str, Json]:
    """Every GGUF by target: type, file, size, and what the quantize stage measured against the 16-bit model."""
    found: dict[str, Json] = {}
    for target in targets(evidence.spec):
        if target.gguf is None:
            continue
        log = evidence.logs[target.stage].get("quantize.json", {})
        measured = dict(log.get("types", {}).get(target.gguf, {}))
        measured.pop("tensorTypes", None)  # by the hundred; they stand in quantize.json
        artifact = next((a for a in evidence.manifests[target.stage].artifacts if a.name == target.gguf), None)
        if artifact is not None:
            file = artifact.uri.rpartition("/")[2]
            measured |= {"file": file, "sizeBytes": artifact.size_bytes, "sha256": artifact.sha256, "uri": artifact.uri}
        found[target.name] = {"type": target.gguf, **measured}
    return found


def packed(evidence: Evidence) -> dict[str, Json]:
    """Every bitsandbytes model by target, with what the quantize stage measured."""
    return {
        target.name: {"type": target.bitsandbytes}
        | evidence.logs[target.stage].get("quantize.json", {}).get("bitsandbytes", {}).get(target.bitsandbytes, {})
        for target in targets(evidence.spec)
        if target.bitsandbytes is not None
    }


def _score(metrics: Sequence[str]) -> str | None:
    """The first that is the better the higher it is."""
    return next((name for name in metrics if name != "loss"), None)


def _environment(files: Mapping[str, Any]) -> Json:
    return next((log["environment"] for log in files.values() if isinstance(log, dict) and log.get("environment")), {})


def _stage(evidence: Evidence, name: str, environment: Mapping[str, Any]) -> Json:
    manifest = evidence.manifests[name]
    figures = dict(manifest.figures)
    seconds, cpu, memory = (float(figures.pop(key, 0)) for key in ("seconds", "cpuSeconds", "peakMemoryBytes"))
    # From the first byte read to the last one committed: the upload of the result holds the device as the work does.
    held = datetime.fromisoformat(manifest.finished) - datetime.fromisoformat(manifest.started)
    gpus = environment.get("gpus") or []
    cores = environment.get("cpu", {}).get("cores")
    return {
        "name": name,
        "kind": kind(evidence.spec, name),
        "digest": manifest.digest,
        "attempt": manifest.attempt,
        "job": f"{manifest.job.namespace}/{manifest.job.name}",
        "started": manifest.started,
        "finished": manifest.finished,
        "seconds": seconds,
        "cpuSeconds": cpu,
        "peakMemoryBytes": int(memory),
        "device": f"{len(gpus)} x {gpus[0]['name']}" if gpus else f"{cores} CPU cores" if cores else "CPU",
        # A machine without a GPU counts as one device.
        "deviceHours": max(seconds, held.total_seconds()) / 3600 * max(1, len(gpus)),
        "figures": figures,
        "inputs": dict(manifest.inputs),
        "outputs": dict(manifest.outputs),
    }


def _failures(evidence: Evidence, target: str) -> list[Json]:
    found = failures.analyse(evidence.answers[BASE], evidence.answers[target])
    return [{"kind": f.kind, "symptom": f.symptom, **_side_by_side(f.base, f.tuned)} for f in found]


def _examples(base: Sequence[Answer], tuned: Sequence[Answer]) -> list[Json]:
    """The first test rows and one row of each spot check, whatever came of them."""
    both = list(pairs(base, tuned))
    shown = [p for p in both if p[1].role == "test"][: EXAMPLES - 2]
    shown += [
        next(p for p in both if p[1].role == role)
        for role in ("general", "refusals")
        if any(q[1].role == role for q in both)
    ]
    return [_side_by_side(*pair) for pair in shown]


def _side_by_side(base: Answer, tuned: Answer) -> Json:
    return {
        "role": tuned.role,
        "id": tuned.id,
        "prompt": tuned.prompt,
        "expected": tuned.reference if tuned.expect is None else f"({tuned.expect})",
        "base": base.answer,
        "tuned": tuned.answer,
        "change": change(base, tuned),
        "baseScore": base.score,
        "tunedScore": tuned.score,
        "baseLoss": base.loss,
        "tunedLoss": tuned.loss,
    }


def rollback(evidence: Evidence) -> list[Json]:
    """The ways back, nearest first: every adapter and model of the pipeline, then the base model, with digests."""
    spec, job = evidence.spec, evidence.job
    space = "" if job.namespace == "default" else f" -n {job.namespace}"
    ways: list[Json] = []
    for name in reversed(list(evidence.manifests)):
        outputs = evidence.manifests[name].outputs
        for output in ("adapter", "model"):
            if output in outputs and kind(spec, name) in ("sft", "preference", "rl", "merge"):
                # What svd leaves beside the merged model belongs to the weights that the merge started from.
                made = model_before(spec, name) if kind(spec, name) == "merge" else model_after(spec, name)
                ways.append(
                    {
                        "to": f"{output} of stage {name}",
                        "digest": outputs[output],
                        "on": f"{made.weights} model" if output == "adapter" else None,
                        "command": f"finetune pull {job.name} {name}/{output}{space} -o rollback",
                    }
                )
    base = evidence.logs["prepare"].get("base.json", {})
    if "model" in evidence.manifests["prepare"].outputs:
        command = f"finetune pull {job.name} prepare/model{space} -o rollback"
    elif base.get("repository"):
        command = f"hf download {base['repository']} --revision {base['revision']} --local-dir rollback"
    else:
        endpoint = f" --endpoint-url {spec.storage.endpoint}" if spec.storage.endpoint else ""
        command = f"aws s3 cp --recursive {spec.model.source} rollback{endpoint}"
    digest = evidence.manifests["prepare"].outputs.get("model") or evidence.manifests["prepare"].outputs.get("base", "")
    ways.append({"to": f"base model {spec.model.source}", "digest": digest, "on": None, "command": command})
    return ways
