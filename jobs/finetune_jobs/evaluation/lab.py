"""The lab's five requirements (the lesson's pass/fail gate), each judged on what the stages left. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.pipeline import TRAINING, kind, training_block
from finetune_api.stage import Manifest
from finetune_api.types import BASE, FineTuneJobSpec
from finetune_jobs.evaluation.answers import Answer, Scores


@dataclass(frozen=True)
class Requirement:
    """One row of the table."""

    requirement: str
    standard: str
    """The lab's own words."""
    passed: bool
    evidence: list[str]
    """What was found, or what is missing."""
    files: list[str]
    """Where to look, relative to the evidence folder."""


@dataclass(frozen=True)
class Facts:
    """What the five rows are judged on."""

    spec: FineTuneJobSpec
    manifests: Mapping[str, Manifest]
    environments: Mapping[str, Mapping[str, Any]]
    """Of every stage that recorded one."""
    model_version: str
    """Source and revision or digest of the base model; empty if unknown."""
    hyperparameters: Mapping[str, Any]
    """Of every training stage, defaults filled in."""
    answers: Mapping[str, Sequence[Answer]]
    """By target, ``base`` among them."""
    scores: Mapping[str, Scores]
    data_digests: Mapping[str, str]
    """sha256 of every data file, by name."""
    regressions: Sequence[str]
    """Gates ``maxRegression`` that failed, in words."""


def judge(facts: Facts) -> list[Requirement]:
    """The five rows in the lab's order."""
    return [_environment(facts), _baseline(facts), _evaluation(facts), _regression(facts), _reproducibility(facts)]


def _environment(facts: Facts) -> Requirement:
    # prepare loads no model; where it ran changes nothing.
    models = [name for name in facts.manifests if name != "prepare"]
    missing = [name for name in models if not facts.environments.get(name, {}).get("packages")]
    silent = [name for name, scores in facts.scores.items() if not scores.get("generatedTokens")]
    known = len(models) - len(missing)
    found = [f"package versions and hardware of {known} of {len(models)} stages that load a model are on record"]
    trained = [name for name in facts.manifests if kind(facts.spec, name) in TRAINING]
    found.append(f"every stage ran by itself from one YAML: model loaded, {', '.join(trained) or 'nothing'} trained")
    if missing:
        found.append(f"without a record: {', '.join(missing)}")
    if silent:
        found.append(f"generated nothing: {', '.join(silent)}")
    else:
        found.append(f"{len(facts.scores)} models generated answers")
    return Requirement(
        "Environment",
        "Runtime can load model, train, and generate without manual hidden steps",
        not missing and not silent,
        found,
        ["environment.json"],
    )


def _baseline(facts: Facts) -> Requirement:
    asked = [a for a in facts.answers[BASE] if a.prompt]
    answered = sum(a.answer is not None for a in asked)
    taken = facts.manifests["baseline"]
    found = [
        f"the base model's answers to {answered} of {len(asked)} rows",
        f"taken {taken.started} to {taken.finished}",
    ]
    late = []
    for name, manifest in facts.manifests.items():
        if kind(facts.spec, name) in TRAINING and manifest.started < taken.finished:
            late.append(name)
    if late:
        # A result of an earlier run was reused. The base model is named by digest, so it is the one that was trained.
        same = taken.inputs.get("prepare:base") == facts.manifests["prepare"].outputs.get("base")
        found.append(
            f"{', '.join(late)} trained earlier and was reused; the answers come from the untouched base model, "
            + ("the same files by digest" if same else "but its digest is not the one that was trained")
        )
    else:
        same = True
        found.append("before any training stage started")
    files = [f"answers/{BASE}/{role}.jsonl" for role in _roles(facts.answers[BASE])]
    return Requirement(
        "Baseline", "Base model output is captured before training", answered == len(asked) and same, found, files
    )


def _evaluation(facts: Facts) -> Requirement:
    rows = {a.id: a.prompt for a in facts.answers[BASE] if a.role == "test"}
    found = [f"{len(rows)} held-out rows, locked before training"]
    other = [n for n, answers in facts.answers.items() if {a.id: a.prompt for a in answers if a.role == "test"} != rows]
    tuned = [name for name in facts.answers if name != BASE]
    if other:
        found.append(f"other rows or prompts: {', '.join(other)}")
    else:
        found.append(f"{', '.join(tuned)}: the same rows and prompts, row by row beside the base model's answers")
    return Requirement(
        "Evaluation",
        "Tuned model is compared against baseline on held-out examples",
        bool(rows) and bool(tuned) and not other,
        found,
        ["scores.json", *(f"diffs/{name}.txt" for name in tuned)],
    )


def _regression(facts: Facts) -> Requirement:
    counts = {role: sum(a.role == role for a in facts.answers[BASE]) for role in ("general", "refusals")}
    models = len(facts.scores)
    missing = [f"{name} on {role}" for name, scores in facts.scores.items() for role in counts if role not in scores]
    found = [
        f"{counts['general']} general questions and {counts['refusals']} to refuse or to answer, put to {models} models"
    ]
    if missing:
        found.append(f"not checked: {', '.join(missing)}")
    found.append(
        f"beyond maxRegression: {', '.join(facts.regressions)}" if facts.regressions else "no fall beyond maxRegression"
    )
    return Requirement(
        "Regression check",
        "General capability and refusal behavior are spot-checked",
        not missing and all(counts.values()),
        found,
        ["gates.json", *(f"answers/{BASE}/{role}.jsonl" for role in counts if counts[role])],
    )


def _reproducibility(facts: Facts) -> Requirement:
    training = [s.name for s in facts.spec.pipeline if training_block(s)]
    parts = {
        f"dataset: sha256 of {len(facts.data_digests)} files": bool(facts.data_digests)
        and all(facts.data_digests.values()),
        f"model: {facts.model_version}": bool(facts.model_version),
        f"hyperparameters: {', '.join(training) or 'nothing trained'}": all(
            facts.hyperparameters.get(n) for n in training
        ),
        f"seed: {facts.spec.seed}": True,  # it has a default, so it is always there
        f"input digest of {len(facts.manifests)} stages": all(m.digest for m in facts.manifests.values()),
    }
    found = [name if there else f"missing: {name}" for name, there in parts.items()]
    return Requirement(
        "Reproducibility",
        "Dataset version, model version, hyperparameters, and seed are recorded",
        all(parts.values()),
        found,
        ["report.json", "datacard.json"],
    )


def _roles(answers: Sequence[Answer]) -> list[str]:
    return list(dict.fromkeys(a.role for a in answers))
