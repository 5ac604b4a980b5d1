from typing import Any

import numpy as np
import pytest
from tests.stages.training_job import JobMaker, Row, StopAfter, chat_rows, pair_rows

from finetune_api.stage import Manifest
from finetune_api.types import BuiltinReward
from finetune_jobs.run.errors import PreemptedError
from finetune_jobs.training import scoring

ALGORITHMS = ("ppo", "grpo", "rloo")


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of ``length``: the share of an answer's tokens that have an odd number, half of them to begin with."""
    monkeypatch.setitem(scoring.BUILTIN, BuiltinReward.LENGTH, lambda answer: float(np.mean(np.array(answer.ids) % 2)))


def prompts(count: int, seed: int = 0) -> list[Row]:
    """Questions, each with its right answer."""
    made = []
    for row in chat_rows(count, seed):
        *asked, answer = row["messages"]
        made.append({**row, "messages": asked, "reference": answer["content"]})
    return made


def rl(algorithm: str, steps: int = 10, **block: Any) -> dict[str, Any]:
    """A stage that is rewarded by ``length`` and starts from the stage before."""
    training = {"batchSize": 8, "loggingSteps": 1, "maxSteps": steps, "learningRate": 2e-2, "precision": "fp32"}
    settings = {
        "algorithm": algorithm,
        "rewards": [{"builtin": "length", "weight": 3}],
        "generation": {"maxNewTokens": 6, "perPrompt": 8},
        "training": {**training, "scheduler": "constant", "warmupRatio": 0, **block.pop("training", {})},
        "checkpoint": {"steps": 2, "best": False},
    }
    return {"name": "rl", "rl": {**settings, **block}}


def roles() -> dict[str, list[Row]]:
    """Prompts to learn from and held out ones, pairs for a reward model."""
    return {"prompts": prompts(8), "promptsEval": prompts(3, seed=1), "train": chat_rows(8), "preference": pair_rows(8)}


def adapter(result: Manifest) -> str:
    """The sha256 of what was trained."""
    return next(file.sha256 for file in result.files if file.path == "adapter/adapter_model.safetensors")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.usefixtures("odd")
def test_a_reward_rises_while_the_divergence_stays_bounded(make_job: JobMaker, algorithm: str) -> None:
    """What a simple program counts becomes more; the first step is at no distance from the reference."""
    job = make_job(roles(), pipeline=[rl(algorithm, steps=16)])
    log = job.log(job.run("rl"))
    curve, evaluations = log["curve"], log["evaluations"]
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-5)
    early, late = (np.mean([point["rewards/length"] for point in part]) for part in (curve[:4], curve[-4:]))
    assert late > early + 0.07
    assert all(point["kl"] < 12 for point in curve)
    assert curve[0]["reward"] == pytest.approx(3 * curve[0]["rewards/length"]) == pytest.approx(1.5, abs=0.3)
    assert evaluations[-1]["eval/reward"] > evaluations[0]["eval/reward"]
    price = log["objective"]["kl"]["coefficient"]
    assert evaluations[-1]["evalLoss"] == pytest.approx(
        price * evaluations[-1]["eval/kl"] - evaluations[-1]["eval/reward"]
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.usefixtures("odd")
def test_stopped_again_and_again_ends_with_the_same_bits(make_job: JobMaker, algorithm: str) -> None:
    """Weights, values, the price of a nat and the place among the prompts: an interrupted run loses none of them."""
    more: dict[str, Any] = (
        {"kl": {"coefficient": 0.1, "target": 0.5}, "ppo": {"epochs": 2}} if algorithm == "ppo" else {}
    )
    plain = make_job(roles(), pipeline=[rl(algorithm, steps=8, **more)])
    expected = plain.run("rl")
    job = make_job(roles(), pipeline=[rl(algorithm, steps=8, **more)])
    attempts = 0
    while True:
        try:
            result = job.run("rl", StopAfter(9 + 3 * (attempts % 4)))
            break
        except PreemptedError:
            attempts += 1
            assert attempts < 25, "the attempts make no progress"
    log, whole = job.log(result), plain.log(expected)
    assert len(log["resumedFrom"]) >= 2, log["resumedFrom"]
    assert adapter(result) == adapter(expected)
    assert (log["curve"], log["evaluations"]) == (whole["curve"], whole["evaluations"])
    prices = {point["klCoefficient"] for point in log["curve"]}
    assert (len(prices) > 1) is (algorithm == "ppo")
