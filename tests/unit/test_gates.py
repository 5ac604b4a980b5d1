from typing import Any

import pytest
from tests.builders import a_job

from finetune_api.pipeline import targets
from finetune_jobs.evaluation.gates import judge


def judged(gates: dict[str, Any], tuned: dict[str, float], divergence: dict[str, float] | None = None) -> list[Any]:
    """The gates of a job with targets merge, gguf/Q4_K_M and gguf/Q8_0, which all scored the same."""
    spec = a_job(evaluation={"gates": gates}).spec
    base = {"general": 0.9, "refusals": 0.8, "exactMatch": 0.1, "loss": 2.0}
    scores = {"base": base, **{t.name: tuned for t in targets(spec)}}
    return judge(spec, targets(spec), scores, divergence or {})


@pytest.mark.parametrize(
    ("after", "passed"),
    [(0.9, True), (1.0, True), (0.85, True), (0.8499, False), (0.0, False)],
    ids=["same", "better", "just within", "just beyond", "all lost"],
)
def test_a_fall_by_exactly_the_bound_passes(after: float, passed: bool) -> None:
    """0.9 - 0.85 is more than 0.05 in floating point; the gate does not stumble over that."""
    found = judged({}, {"general": after, "refusals": 0.8})
    general = [g for g in found if g.gate == "maxRegression.general"]
    assert [g.target for g in general] == ["merge", "gguf/Q4_K_M", "gguf/Q8_0"]
    assert all(g.passed is passed and g.bound == 0.05 for g in general)
    assert general[0].value == pytest.approx(0.9 - after)


def test_every_target_stands_at_every_gate() -> None:
    """Score and regression gates are applied to each model, a divergence gate to the GGUF of its type."""
    found = judged(
        {"minScore": {"exactMatch": 0.8}, "maxGGUFDivergence": {"Q4_K_M": 0.01}},
        {"general": 0.9, "refusals": 0.8, "exactMatch": 0.8},
        {"gguf/Q4_K_M": 0.02, "gguf/Q8_0": 0.5},
    )
    assert [g.name for g in found] == [
        *(f"minScore.exactMatch of {t}" for t in ("merge", "gguf/Q4_K_M", "gguf/Q8_0")),
        *(f"maxRegression.general of {t}" for t in ("merge", "gguf/Q4_K_M", "gguf/Q8_0")),
        *(f"maxRegression.refusals of {t}" for t in ("merge", "gguf/Q4_K_M", "gguf/Q8_0")),
        "maxGGUFDivergence of gguf/Q4_K_M",
    ]
    assert [g.name for g in found if not g.passed] == ["maxGGUFDivergence of gguf/Q4_K_M"]


@pytest.mark.parametrize(
    ("gates", "tuned"),
    [
        ({"minScore": {"exactMatch": 0.8}}, {"exactMatch": 0.79}),
        ({"minScore": {"tokenF1": 0.0}}, {}),
        ({"minScore": {"loss": 0.5}}, {"loss": 0.51}),
        ({"maxGGUFDivergence": {"Q8_0": 0.1}}, {}),
        ({}, {"general": None}),
    ],
    ids=["too low", "score missing", "loss too high", "divergence missing", "general missing"],
)
def test_a_bound_that_is_missed_or_was_not_measured_fails(gates: dict[str, Any], tuned: dict[str, Any]) -> None:
    """What was not measured is not passed."""
    scores = {"general": 0.9, "refusals": 0.8, **tuned}
    found = judged(gates, {k: v for k, v in scores.items() if v is not None})
    assert any(not g.passed for g in found)


def test_a_loss_below_its_bound_passes() -> None:
    """For a loss the bound is the highest, not the lowest."""
    found = judged({"minScore": {"loss": 0.5}}, {"general": 0.9, "refusals": 0.8, "loss": 0.2})
    assert all(g.passed for g in found)


def test_without_general_rows_there_is_no_gate_on_them() -> None:
    """A job without such rows is not failed for them; the lab's row says that they are missing."""
    spec = a_job().spec
    found = judge(spec, targets(spec), {n: {} for n in ("base", "merge", "gguf/Q4_K_M", "gguf/Q8_0")}, {})
    assert found == []


def test_a_conversion_of_the_base_is_no_tuned_model() -> None:
    """It need not score, nor keep anything; how near it comes to the base is a gate for it too."""
    stages = [{"name": "plain", "quantize": {"gguf": ["Q8_0"]}}, {"name": "sft", "from": "base", "sft": {}}]
    gates = {"minScore": {"exactMatch": 0.8}, "maxGGUFDivergence": {"Q8_0": 0.1}}
    spec = a_job(*stages, evaluation={"gates": gates}).spec
    base = {"general": 0.9, "refusals": 0.8, "exactMatch": 0.1}
    scores = {"base": base, "plain/Q8_0": base, "sft": {**base, "exactMatch": 0.9}}
    found = judge(spec, targets(spec), scores, {"plain/Q8_0": 0.2})
    assert {gate.target for gate in found if gate.gate != "maxGGUFDivergence"} == {"sft"}
    assert [gate.name for gate in found if not gate.passed] == ["maxGGUFDivergence of plain/Q8_0"]
