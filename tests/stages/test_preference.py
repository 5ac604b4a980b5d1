import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.stages.training_job import JobMaker, Row, answer_log_prob, chat_rows, label_rows, pair_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_jobs.run import lifecycle
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.run.preemption import Stop
from finetune_jobs.stages import preference

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


def one_step(loss: str, rows: list[Row], **block: Any) -> dict[str, Any]:
    """The roles and the pipeline of a job whose first step sees all rows."""
    precision = block.pop("precision", "fp32")
    training = {"batchSize": 2 * len(rows), "loggingSteps": 1, "maxSteps": 2, "learningRate": 1e-3}
    stage = {"name": "train", "preference": {"loss": loss, "training": {**training, "precision": precision}, **block}}
    return {"pipeline": [stage], "roles": {"preference": rows}}


FIRST: dict[str, tuple[dict[str, Any], float]] = {
    "cdpo": (one_step("dpo", pair_rows(6), labelSmoothing=0.2), math.log(2)),
    "ipo": (one_step("ipo", pair_rows(6)), 25.0),
    "ipo-beta": (one_step("ipo", pair_rows(6), beta=0.5), 1.0),
    "kto-pairs": (one_step("kto", pair_rows(6)), 0.5),
    "kto-labels": (one_step("kto", label_rows(6), kto={"desirableWeight": 2.0}), 0.5 * (4 * 2 + 2 * 1) / 6),
    "kto-mixed": (
        one_step("kto", [*label_rows(3), *pair_rows(3)], kto={"undesirableWeight": 3.0}),
        0.5 * (5 * 1 + 4 * 3) / 9,
    ),
    "kto-qlora": (one_step("kto", pair_rows(6), method="qlora", precision="bf16"), 0.5),
}


@pytest.mark.parametrize("name", FIRST)
def test_first_loss_is_the_paper_s(make_job: JobMaker, name: str) -> None:
    """With a reference: that of a model that is its own reference, whatever the rows."""
    given, expected = FIRST[name]
    job = make_job(given["roles"], pipeline=given["pipeline"])
    first, second = job.log(job.run("train"))["curve"]
    assert first["loss"] == pytest.approx(expected, rel=1e-6)
    assert second["loss"] != first["loss"]
    assert first["rewards/accuracies"] == 0
    assert first.get("kl", 0) == 0


def by_hand(model: Any, tokenizer: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean log-probability a token of the chosen and the rejected answer."""
    found = [answer_log_prob(model, tokenizer, row["prompt"], row[s][0]["content"]) for s in ("chosen", "rejected")]
    chosen, rejected = (torch.tensor(total / count, dtype=torch.float64) for total, count in found)
    return chosen, rejected


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_without_a_reference_the_first_loss_follows_from_the_logits(
    make_job: JobMaker, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """From the base model, with no sft before it, and without a pass for a reference."""

    def fail(*_: Any) -> None:
        raise AssertionError("a reference was computed")

    monkeypatch.setattr(preference, "reference_log_probs", fail)
    rows = pair_rows(6)
    given = one_step(loss, rows, **({"beta": 0.25} if loss == "orpo" else {"simpo": {"gamma": 0.5}}))
    job = make_job(given["roles"], pipeline=given["pipeline"])
    first = job.log(job.run("train"))["curve"][0]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    losses: list[torch.Tensor] = []
    margins: list[torch.Tensor] = []
    for row in rows:
        chosen, rejected = by_hand(model, tokenizer, row)
        if loss == "orpo":
            odds = [torch.log(p.exp() / (1 - p.exp())) for p in (chosen, rejected)]
            losses.append(-chosen - 0.25 * torch.log(torch.sigmoid(odds[0] - odds[1])))
            margins.append(0.25 * (odds[0] - odds[1]))
        else:
            losses.append(-torch.log(torch.sigmoid(2 * chosen - 2 * rejected - 0.5)))
            margins.append(2 * (chosen - rejected))
    assert first["loss"] == pytest.approx(float(sum(losses)) / len(rows), rel=1e-5)
    assert first["rewards/margins"] == pytest.approx(float(sum(margins)) / len(rows), rel=1e-4)
    assert first["rewards/accuracies"] == pytest.approx(sum(float(m > 0) for m in margins) / len(rows))


def kto(micro: int | str = "auto", **settings: Any) -> dict[str, Any]:
    """Twelve answers in steps of five: the last step of an epoch has two."""
    training = {"batchSize": 5, "loggingSteps": 1, "maxSteps": 6, "learningRate": 2e-3, "precision": "fp32", **settings}
    block = {"loss": "kto", "beta": BETA, "training": {**training, "microBatchSize": micro}}
    return {"name": "train", "preference": {**block, "checkpoint": {"steps": 6}}}


def test_kto_s_divergence_does_not_depend_on_the_layout(make_job: JobMaker) -> None:
    """Estimated over the whole step: answers one by one learn what all of them together do."""
    roles = {"preference": label_rows(12), "preferenceEval": label_rows(5, seed=1)}
    curves = []
    for stage in (kto(1, packing=False), kto()):
        job = make_job(roles, pipeline=[stage])
        log = job.log(job.run("train"))
        curves.append([*log["curve"], *log["evaluations"]])
    assert curves[0] == [pytest.approx(point, rel=2e-3, abs=2e-5) for point in curves[1]]
    assert max(point["kl"] for point in curves[0] if "kl" in point) > 0


def test_kto_s_recorded_figures_are_those_of_the_files(make_job: JobMaker, tiny_model: Path) -> None:
    """Loss, divergence and rewards on held-out answers follow from base and adapter by the paper's formula."""
    held_out = label_rows(5, seed=1)
    job = make_job({"preference": label_rows(12), "preferenceEval": held_out}, pipeline=[kto(learningRate=5e-3)])
    result = job.run("train")
    log = job.log(result)
    directory = job.files(result) / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    others = [*held_out[1:], held_out[0]]

    def log_probs(model: Any) -> torch.Tensor:
        """Of each answer after its own question and after the one before."""
        return torch.tensor(
            [
                [
                    answer_log_prob(model, tokenizer, row["messages"][:1], r["messages"][1]["content"])[0]
                    for r in (row, o)
                ]
                for row, o in zip(held_out, others, strict=True)
            ]
        )

    reference = log_probs(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ratios = log_probs(PeftModel.from_pretrained(base, str(directory))) - reference
    z0 = max(0.0, float(ratios[:, 1].mean()))
    good = torch.tensor([row["label"] for row in held_out])
    margins = torch.where(good, ratios[:, 0] - z0, z0 - ratios[:, 0])
    expected = {
        "evalLoss": (1 - torch.sigmoid(BETA * margins)).mean(),
        "eval/kl": z0,
        "eval/rewards/desirable": BETA * ratios[good, 0].mean(),
        "eval/rewards/undesirable": BETA * ratios[~good, 0].mean(),
        "eval/rewards/accuracies": (margins > 0).float().mean(),
    }
    recorded = log["evaluations"][-1]
    assert {n: recorded[n] for n in expected} == {n: pytest.approx(float(v), abs=2e-4) for n, v in expected.items()}
    assert log["objective"] == {"loss": "kto", "beta": BETA, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert z0 > 0


def test_progress_shows_what_is_preferred(make_job: JobMaker, tmp_path: Path) -> None:
    """Beside the loss: how often, and by how much."""
    path = tmp_path / "progress.json"
    job = make_job(roles(), pipeline=[dpo(maxSteps=3)])
    message = lifecycle.execute(job.stage_run("dpo"), Stop(), {"FINETUNE_PROGRESS_FILE": str(path)})
    last = job.log(job.committed("dpo", message))["curve"][-1]
    shown = {metric["name"]: float(metric["value"]) for metric in json.loads(path.read_text())["metrics"]}
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        assert shown[name] == pytest.approx(last[name], rel=1e-3)
