from typing import Any

import pytest
from tests.builders import a_job

from finetune_jobs.evaluation.preferences import held_out

SFT: dict[str, Any] = {"name": "sft", "sft": {}}
MERGE: dict[str, Any] = {"name": "merge", "merge": {}}


def stage(loss: str = "dpo", **more: Any) -> dict[str, Any]:
    """A preference stage named ``p``."""
    return {"name": "p", "preference": {"loss": loss, **more.pop("block", {})}, **more}


def log(accuracy: float = 0.9, reward: float = -0.05, good: str = "chosen") -> dict[str, Any]:
    """What its training left: another step is better, but is not the result."""
    here = {"step": 4, "eval/rewards/accuracies": accuracy, "eval/rewards/margins": 0.3, f"eval/rewards/{good}": reward}
    return {
        "stage": "p",
        "resultStep": 4,
        "examples": {"eval": 5},
        "evaluations": [here, {**here, "step": 8, "eval/rewards/accuracies": 1.0}],
    }


def passed(found: dict[str, Any]) -> list[bool | None]:
    """Accuracy, log-probability, exactMatch."""
    return [criterion["passed"] for criterion in found["success"]]


SCORES = {"base": {"exactMatch": 0.5}, "merge": {"exactMatch": 0.96}, "p": {"exactMatch": 0.9}}


def test_measures_of_success() -> None:
    """Each against its bound, at the step that is the result; a reward is beta times nats."""
    pipeline = [SFT, MERGE, stage(**{"from": "sft"})]
    found = held_out(a_job(*pipeline).spec, log(), SCORES)
    assert (found["rewardAccuracy"], found["rewardMargin"], found["pairs"]) == (0.9, 0.3, 5)
    assert found["chosenLogProbChange"] == pytest.approx(-0.5)
    assert found["success"][2]["value"] == pytest.approx(0.06)
    assert passed(found) == [True, True, False]
    assert passed(held_out(a_job(*pipeline).spec, log(0.79, -0.11), SCORES)) == [False, False, False]
    better = {**SCORES, "p": {"exactMatch": 0.92}}
    assert passed(held_out(a_job(*pipeline).spec, log(0.8, -0.09), better)) == [True, True, True]


def test_beta_turns_rewards_into_nats() -> None:
    """The one that is written, or the loss's own."""
    spec = a_job(SFT, stage("ipo", block={"beta": 0.5})).spec
    assert held_out(spec, log(), {})["chosenLogProbChange"] == pytest.approx(-0.1)


def test_kto_is_judged_by_its_desirable_answers() -> None:
    """Of which there may be none."""
    spec = a_job(SFT, stage("kto")).spec
    assert held_out(spec, log(good="desirable"), {})["chosenLogProbChange"] == pytest.approx(-0.5)
    assert held_out(spec, log(good="undesirable"), {})["chosenLogProbChange"] is None


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_without_a_reference_no_change_is_told(loss: str) -> None:
    """Their rewards are no change against another model."""
    found = held_out(a_job(SFT, stage(loss)).spec, log(), {})
    assert found["chosenLogProbChange"] is None
    assert passed(found) == [True, None, None]


def test_the_model_that_came_in_must_be_scored() -> None:
    """An adapter that is trained on is not, unless a merge of it is; the base model always is."""
    assert passed(held_out(a_job(SFT, stage(), MERGE).spec, log(), SCORES))[2] is None
    assert passed(held_out(a_job(stage("orpo"), MERGE).spec, log(), SCORES))[2] is True


def test_nothing_is_told_without_held_out_rows() -> None:
    """Nothing was evaluated."""
    assert held_out(a_job(SFT, stage()).spec, {**log(), "evaluations": []}, SCORES) == {}
