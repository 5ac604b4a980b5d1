import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.stages.training_job import JobMaker, Row, answer_log_prob, chat_rows, pair_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_jobs.run.errors import ConfigurationError

BETA = 0.3
WATCHED = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}


def dpo(method: str = "lora", **training: Any) -> dict[str, Any]:
    """A pipeline's stage that starts from the stage before."""
    settings = {"batchSize": 4, "loggingSteps": 1, "maxSteps": 6, "learningRate": 5e-3, "precision": "fp32", **training}
    return {"name": "dpo", "preference": {"method": method, "beta": BETA, "training": settings}}


def sft(method: str = "lora") -> dict[str, Any]:
    """A few steps, so that the incoming adapter is no fresh one; its dropout must not reach the next stage."""
    training = {"batchSize": 8, "maxSteps": 4, "learningRate": 2e-2, "precision": "fp32"}
    lora = {} if method == "full" else {"lora": {"dropout": 0.1}}
    return {"name": "sft", "sft": {"method": method, "training": training, **lora}}


def roles() -> dict[str, list[Row]]:
    """Training and held-out pairs."""
    return {"train": chat_rows(8), "preference": pair_rows(10), "preferenceEval": pair_rows(5, seed=1)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("pipeline", "weights"),
    [
        ([dpo("lora")], {"microBatchSize": 1}),
        ([dpo("qlora")], {}),
        ([dpo("full")], {}),
        ([sft(), dpo("lora")], {}),
        ([sft("qlora"), dpo("qlora")], {"packing": False}),
        ([sft("full"), dpo("lora")], {"microBatchSize": 3}),
    ],
    ids=["lora", "qlora", "full", "incoming-lora", "incoming-qlora", "lora-on-full"],
)
def test_first_loss_is_ln_2(
    make_job: JobMaker, pipeline: list[dict[str, Any]], weights: dict[str, Any], precision: str
) -> None:
    """Whatever comes in is its own reference: no reward on either side, and exactly the loss of a coin."""
    block = pipeline[-1]["preference"]
    training = {**block["training"], **weights, "precision": precision, "maxSteps": 2}
    job = make_job(roles(), pipeline=[*pipeline[:-1], {"name": "dpo", "preference": {**block, "training": training}}])
    for stage in pipeline:
        log = job.log(job.run(stage["name"]))
    first, second = log["curve"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/chosen"], first["rewards/rejected"], first["rewards/accuracies"]) == (0, 0, 0)
    assert second["rewards/chosen"] != 0


def both_sides(model: Any, tokenizer: Any, row: Row) -> list[float]:
    """Log-probabilities of the chosen and the rejected answer."""
    return [answer_log_prob(model, tokenizer, row["prompt"], row[s][0]["content"])[0] for s in ("chosen", "rejected")]


def test_recorded_rewards_are_those_of_the_files(make_job: JobMaker, tiny_model: Path) -> None:
    """Loss, rewards and log-probabilities on the held-out pairs follow from the two stages' adapters by the formula."""
    job = make_job(roles(), pipeline=[sft(), dpo(maxSteps=8)])
    reference_dir = job.files(job.run("sft")) / "adapter"
    result = job.run("dpo")
    log = job.log(result)
    policy_dir = job.files(result) / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    log_probs = []
    for adapter in (policy_dir, reference_dir):
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(adapter))
        log_probs.append(torch.tensor([both_sides(model, tokenizer, row) for row in roles()["preferenceEval"]]))
    rewards = BETA * (log_probs[0] - log_probs[1])
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "evalLoss": -torch.nn.functional.logsigmoid(margins).mean(),
        "eval/rewards/chosen": rewards[:, 0].mean(),
        "eval/rewards/rejected": rewards[:, 1].mean(),
        "eval/rewards/margins": margins.mean(),
        "eval/rewards/accuracies": (margins > 0).float().mean(),
        "eval/logps/chosen": log_probs[0][:, 0].mean(),
        "eval/logps/rejected": log_probs[0][:, 1].mean(),
    }
    recorded = next(e for e in log["evaluations"] if e["step"] == log["resultStep"])
    assert {name: recorded[name] for name in expected} == {
        n: pytest.approx(float(v), abs=1e-4) for n, v in expected.items()
    }
    assert log["evalLoss"] == recorded["evalLoss"]
    assert log["curve"][-1].keys() >= WATCHED
    assert log["curve"][-1]["rewards/accuracies"] == 1.0
    assert log["curve"][-1]["rewards/margins"] > 0


def test_full_training_leaves_a_whole_model(make_job: JobMaker) -> None:
    """Every weight is trained against the cached reference, with no second model; the result is one in 16 bits."""
    job = make_job(roles(), pipeline=[dpo("full", learningRate=1e-3)])
    result = job.run("dpo")
    log = job.log(result)
    assert log["curve"][-1]["loss"] < math.log(2)
    assert log["parameters"]["trainable"] == log["parameters"]["total"]
    assert {t.dtype for t in load_file(job.files(result) / "model/model.safetensors").values()} == {torch.bfloat16}


def test_noise_on_the_embeddings_is_refused(make_job: JobMaker) -> None:
    """It would count as a change against the reference."""
    job = make_job(roles(), pipeline=[dpo(neftuneNoiseAlpha=5.0)])
    with pytest.raises(ConfigurationError, match=r"spec.pipeline\[0\].preference.training.neftuneNoiseAlpha"):
        job.run("dpo")


def test_training_goes_without_pairs_held_out(make_job: JobMaker) -> None:
    """Then nothing is evaluated and the last step is the result."""
    job = make_job({"preference": pair_rows(6)}, pipeline=[dpo(maxSteps=3)])
    log = job.log(job.run("dpo"))
    assert (log["evaluations"], log["evalLoss"], log["resultStep"]) == ([], None, 3)
