import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.stages.training_job import JobMaker, Row, StopAfter, chat_rows, environment, pair_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from finetune_api.stage import Manifest, Termination
from finetune_api.types import BuiltinReward
from finetune_jobs.run.errors import PreemptedError
from finetune_jobs.training import reinforcement, scoring
from finetune_jobs.training.rollout import draws

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


def test_a_pass_keeps_nothing_of_the_one_before(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of one micro-batch are all that there are, when answers are read too: 8B would fit no 80 GB GPU."""
    real, passes = reinforcement.token_figures, []

    class Kept:
        """What autograd keeps for the way back."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def watched(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        alive: weakref.WeakSet[Kept] = weakref.WeakSet()
        passes.append((alive, sum(len(before) for before, _ in passes)))

        def keep(tensor: torch.Tensor) -> Kept:
            kept = Kept(tensor.detach())  # whole, it would hold itself
            alive.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            found = real(*given)
        assert alive
        return found

    monkeypatch.setattr(reinforcement, "token_figures", watched)
    job = make_job(roles(), pipeline=[rl("ppo", steps=1, training={"microBatchSize": 4, "batchSize": 2})])
    job.run("rl")
    assert len(passes) > 8
    assert {left for _, left in passes} == {0}


def drawn_by_hand(model: Any, ids: list[int], uniform: np.ndarray[Any, Any], temperature: float) -> list[int]:
    """An answer token by token, each from a whole pass over the text so far."""
    answer: list[int] = []
    for number in uniform:
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0, -1].double()
        probabilities = (logits / temperature).softmax(-1).cumsum(-1)
        answer.append(int((probabilities > number).nonzero()[0]))
        if answer[-1] == model.config.eos_token_id:
            break
    return answer


def test_recorded_rewards_and_divergence_are_those_of_the_files(make_job: JobMaker, tiny_model: Path) -> None:
    """The policy's adapter, on top of which it learned, and the reward model's give what is recorded by the formulas:
    the reference is the model that came in, with its adapter.
    """
    training = {"batchSize": 8, "maxSteps": 3, "learningRate": 1e-2, "precision": "fp32"}
    block = rl("ppo", steps=2, rewards=[{"stage": "judge", "weight": 2}, {"builtin": "length", "weight": -0.5}])
    block["rl"]["generation"] = {"maxNewTokens": 6, "temperature": 0.7}
    stages = [
        {"name": "sft", "sft": {"training": training}},
        {"name": "judge", "from": "base", "reward": {"training": training}},
        block,
    ]
    job = make_job(roles(), pipeline=stages)
    reference_dir, judge_dir = job.files(job.run("sft")) / "adapter", job.files(job.run("judge")) / "reward"
    result = job.run("rl")
    recorded = job.log(result)["evaluations"][-1]

    def adapted(directory: Path, kind: Any, **settings: Any) -> Any:
        base = kind.from_pretrained(tiny_model, dtype=torch.float32, **settings)
        return PeftModel.from_pretrained(base, str(directory)).eval()

    policy = adapted(job.files(result) / "adapter", AutoModelForCausalLM)
    reference = adapted(reference_dir, AutoModelForCausalLM)
    judge = adapted(judge_dir, AutoModelForSequenceClassification, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rewards, divergences, lengths = [], [], []
    for n, row in enumerate(roles()["promptsEval"]):
        asked = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        answer = drawn_by_hand(policy, asked, draws(job.spec.seed, f"eval/{n}", 6), 0.7)
        whole = torch.tensor([asked + answer])
        with torch.no_grad():
            log_probs = [
                (model(whole).logits[0, len(asked) - 1 : -1].double() / 0.7).log_softmax(-1)
                for model in (policy, reference)
            ]
            rewards.append(float(judge(whole).logits[0, 0]))
        of_answer = [found.gather(1, torch.tensor(answer)[:, None]).sum() for found in log_probs]
        divergences.append(float(of_answer[0] - of_answer[1]))
        lengths.append(len(answer) / 6)
    expected = {
        "eval/rewards/judge": np.mean(rewards),
        "eval/rewards/length": np.mean(lengths),
        "eval/reward": 2 * np.mean(rewards) - 0.5 * np.mean(lengths),
        "eval/kl": np.mean(divergences),
    }
    assert {name: recorded[name] for name in expected} == {
        name: pytest.approx(float(value), abs=1e-3) for name, value in expected.items()
    }
    assert abs(recorded["eval/kl"]) > 0.01


def test_processes_and_layout_change_nothing_but_speed(make_job: JobMaker, tmp_path: Path) -> None:
    """Two processes that answer half of the prompts each, and micro-batches of one, come to the same figures."""
    gentle = {"learningRate": 1e-4}  # Adam makes much of little: rounding decides the sign of small gradients
    alone = make_job(roles(), pipeline=[rl("ppo", steps=3, training=gentle)])
    expected = alone.log(alone.run("rl"))["curve"]
    job = make_job(roles(), pipeline=[rl("ppo", steps=3, training={**gentle, "microBatchSize": 1, "packing": False})])
    message = tmp_path / "message.json"
    process = subprocess.run(
        [sys.executable, "-m", "finetune_jobs", str(job.write("rl"))],
        env=environment(FINETUNE_PROCESSES="2", FINETUNE_TERMINATION_LOG=str(message)),
        timeout=300,
        check=False,
    )
    assert process.returncode == 0
    log = job.log(job.committed("rl", Termination.model_validate_json(message.read_text())))
    assert log["batch"]["processes"] == 2
    for mine, other in zip(expected, log["curve"], strict=True):
        assert {k: v for k, v in other.items() if k != "gradNorm"} == {
            k: pytest.approx(v, abs=2e-3) for k, v in mine.items() if k != "gradNorm"
        }


def test_prompts_that_leave_no_room_for_an_answer_are_counted(make_job: JobMaker) -> None:
    """None is cut, none is left out in silence."""
    long = prompts(5)
    long[-1]["messages"] = [{"role": "user", "content": "word " * 100}]
    job = make_job({"prompts": long}, pipeline=[rl("ppo", steps=1, training={"maxLength": 64})])
    examples = job.log(job.run("rl"))["examples"]
    assert examples == {"train": 4, "eval": 0, "dropped": {"longer than maxLength": 1}}


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_other_methods_learn_too(make_job: JobMaker, method: str) -> None:
    """The first step's answers are those of the model that came in: no divergence, and no token has moved too far."""
    rate = {"learningRate": 1e-3}
    job = make_job(roles(), pipeline=[rl("ppo", steps=2, method=method, ppo={"epochs": 1}, training=rate)])
    result = job.run("rl")
    first, second = job.log(result)["curve"]
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert first["clipped"] == 0
    assert second["kl"] != pytest.approx(0, abs=1e-6)
    assert set(result.outputs) == {"model" if method == "full" else "adapter", "log"}
