from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.stages.training_job import JobMaker, Row, chat_rows, pair_rows, write_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

CENTER = 0.05


def reward(method: str = "lora", **training: Any) -> dict[str, Any]:
    """A pipeline's stage that starts from the stage before."""
    settings = {"batchSize": 4, "loggingSteps": 1, "maxSteps": 8, "learningRate": 1e-2, "precision": "fp32", **training}
    return {
        "name": "judge",
        "reward": {"method": method, "centerRewardsCoefficient": CENTER, "training": settings},
    }


def roles() -> dict[str, list[Row]]:
    """Training and held-out pairs."""
    return {"train": chat_rows(8), "preference": pair_rows(12), "preferenceEval": pair_rows(5, seed=1)}


def classified(model: Any, directory: Path, rows: list[Row]) -> torch.Tensor:
    """(rows, 2) scores by transformers' own forward pass, each text alone: chosen, rejected."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for side in ("chosen", "rejected"):
            text = prompt + row[side][0]["content"] + "<|im_end|>"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(model(input_ids=ids).logits[0, 0].double())
    return torch.stack(scores).view(-1, 2)


def expected(scores: torch.Tensor) -> dict[str, Any]:
    """Loss and figures on the held-out pairs by the formula."""
    chosen, rejected = scores[:, 0], scores[:, 1]
    loss = -(chosen - rejected).sigmoid().log() + CENTER * (chosen + rejected) ** 2
    figures = {
        "evalLoss": loss.mean(),
        "eval/rewards/chosen": chosen.mean(),
        "eval/rewards/rejected": rejected.mean(),
        "eval/rewards/accuracies": (chosen > rejected).double().mean(),
        "eval/rewards/margins": (chosen - rejected).mean(),
    }
    return {name: pytest.approx(float(value), abs=2e-4) for name, value in figures.items()}


@pytest.fixture(scope="module", params=["no pad token", "the stop token pads", "another token pads"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the padding that base models come with."""
    directory = write_model(tmp_path_factory.mktemp("model") / "model")
    config = AutoConfig.from_pretrained(directory)
    pads = {"no pad token": None, "the stop token pads": config.eos_token_id, "another token pads": 0}
    config.pad_token_id = pads[request.param]
    config.save_pretrained(directory)
    return directory


def test_recorded_rewards_are_those_that_transformers_reads(make_job: JobMaker, model: Path) -> None:
    """Adapter and base as a sequence classifier give the recorded loss, rewards and accuracy, whatever pads."""
    job = make_job(roles(), model=model, pipeline=[reward()])
    result = job.run("judge")
    log = job.log(result)
    directory = job.files(result) / "reward"
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    judge = PeftModel.from_pretrained(base, str(directory)).eval()
    recorded = next(e for e in log["evaluations"] if e["step"] == log["resultStep"])
    assert {k: v for k, v in recorded.items() if k != "step"} == expected(
        classified(judge, directory, roles()["preferenceEval"])
    )
    assert log["curve"][-1]["rewards/accuracies"] >= 0.75
    assert set(result.outputs) == {"reward", "log"}


def test_a_whole_reward_model_is_a_sequence_classifier(make_job: JobMaker) -> None:
    """Method full leaves a model that transformers loads with its head, to the precision of 16 bits."""
    job = make_job(roles(), pipeline=[reward("full", learningRate=1e-3)])
    result = job.run("judge")
    log = job.log(result)
    directory = job.files(result) / "reward"
    judge = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    scores = classified(judge, directory, roles()["preferenceEval"])
    recorded = next(e for e in log["evaluations"] if e["step"] == log["resultStep"])
    assert float((scores[:, 0] - scores[:, 1]).mean()) == pytest.approx(recorded["eval/rewards/margins"], abs=0.05)
    assert log["parameters"]["trainable"] == log["parameters"]["total"]


def test_it_starts_from_an_adapter(make_job: JobMaker, tiny_model: Path) -> None:
    """What sft learned is kept and trained on; the result holds both and the head."""
    training = {"batchSize": 8, "maxSteps": 4, "learningRate": 2e-2, "precision": "fp32"}
    sft = {"name": "sft", "sft": {"lora": {"r": 4}, "training": training}}
    job = make_job(roles(), pipeline=[sft, reward(learningRate=1e-3)])
    job.run("sft")
    result = job.run("judge")
    log = job.log(result)
    directory = job.files(result) / "reward"
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    judge = PeftModel.from_pretrained(base, str(directory)).eval()
    recorded = next(e for e in log["evaluations"] if e["step"] == log["resultStep"])
    assert {k: v for k, v in recorded.items() if k != "step"} == expected(
        classified(judge, directory, roles()["preferenceEval"])
    )
    assert log["lora"]["r"] == 4


def test_layout_changes_nothing_but_speed(make_job: JobMaker) -> None:
    """One pair at a time and all at once give the same losses: padding is not scored."""
    curves = []
    for micro in (1, 4):
        job = make_job(roles(), pipeline=[reward(microBatchSize=micro, maxSteps=4)])
        curves.append([point["loss"] for point in job.log(job.run("judge"))["curve"]])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_rows_that_are_too_long_are_counted(make_job: JobMaker) -> None:
    """None is left out in silence."""
    long = pair_rows(13)
    long[-1]["chosen"] = [{"role": "assistant", "content": "word " * 400}]
    job = make_job({"preference": long}, pipeline=[reward(maxLength=256, maxSteps=1)])
    examples = job.log(job.run("judge"))["examples"]
    assert examples == {"train": 12, "eval": 0, "dropped": {"longer than maxLength": 1}}
