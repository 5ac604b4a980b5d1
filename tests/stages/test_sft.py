import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.stages.training_job import Job, JobMaker, Row, answer_log_prob, chat_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.stage import Manifest
from finetune_jobs.run.errors import ConfigurationError, DataError, StageError
from finetune_jobs.training import memory

FAST = {"batchSize": 8, "loggingSteps": 1, "precision": "fp32"}


def sft(method: str = "lora", **block: Any) -> dict[str, Any]:
    """A pipeline's stage; ``training`` is over the defaults of these tests."""
    rate = 5e-3 if method == "full" else 2e-2
    training = {**FAST, "learningRate": rate, **block.pop("training", {})}
    return {"name": "sft", "sft": {"method": method, "training": training, **block}}


def loss_of(model: Any, directory: Path, rows: list[Row]) -> float:
    """Mean negative log-probability of the answers' tokens, computed by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    parts = [answer_log_prob(model, tokenizer, r["messages"][:1], r["messages"][1]["content"]) for r in rows]
    return -sum(p for p, _ in parts) / sum(n for _, n in parts)


def trained_model(job: Job, result: Manifest, base: Path) -> tuple[Any, Path]:
    """The result as anyone would load it, without our code."""
    files = job.files(result)
    if "model" in result.outputs:
        return AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32), files / "model"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(files / "adapter")), files / "adapter"


@pytest.mark.parametrize(("method", "exact"), [("lora", 1e-5), ("qlora", 1.0), ("full", 0.02)])
def test_result_has_learned_and_loads_without_us(
    make_job: JobMaker, tiny_model: Path, method: str, exact: float
) -> None:
    """The loss falls below two fifths, and plain transformers and PEFT find the recorded one in the files we leave."""
    rows = chat_rows(8)
    job = make_job({"train": rows, "eval": rows}, pipeline=[sft(method, training={"maxSteps": 40})])
    result = job.run("sft")
    log = job.log(result)
    assert [p["step"] for p in log["curve"]] == list(range(1, 41))
    assert log["curve"][-1]["loss"] < 0.4 * log["curve"][0]["loss"]
    assert log["evalLoss"] == min(e["evalLoss"] for e in log["evaluations"]) == result.figures["evalLoss"]
    model, directory = trained_model(job, result, tiny_model)
    # qlora was trained on the 4-bit base, full is stored in 16 bits
    assert loss_of(model, directory, rows) == pytest.approx(log["evalLoss"], abs=exact)
    total = sum(p.numel() for p in model.parameters())
    trainable = total if method == "full" else sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    held = log["parameters"].pop("held")
    assert log["parameters"] == {"trainable": trainable, "total": total}
    assert held < total if method == "qlora" else held == total  # two 4-bit weights lie in a byte
    assert log["tokens"] == 40 * sum(len(ids) for ids in _encoded(directory, rows))
    assert log["environment"]["packages"]["transformers"] == transformers.__version__


def _encoded(directory: Path, rows: list[Row]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # The line break after the last turn is no part of an example: generation has ended there.
    return [tokenizer.apply_chat_template(r["messages"], return_dict=False)[:-1] for r in rows]


@pytest.mark.parametrize(("method", "precision"), [("lora", "bf16"), ("qlora", "bf16"), ("qlora", "fp32")])
def test_adapters_are_float32_under_every_precision(make_job: JobMaker, method: str, precision: str) -> None:
    """Rounded to bf16, an adapter would lose small updates."""
    job = make_job({"train": chat_rows(8)}, pipeline=[sft(method, training={"maxSteps": 2, "precision": precision})])
    files = job.files(job.run("sft"))
    tensors = load_file(files / "adapter/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    # ... and were so while they were trained: no value is one that bf16 could hold.
    assert any((t != t.bfloat16().float()).any() for n, t in tensors.items() if "lora_A" in n)


def test_early_stopping_leaves_the_best_checkpoint(make_job: JobMaker, tiny_model: Path) -> None:
    """Learning eight rows by heart makes others less likely: the run stops, and its result is the step before that."""
    others = chat_rows(8, seed=1)
    stage = sft(
        training={"maxSteps": 60},
        checkpoint={"steps": 4, "keep": 1},
        validation={"earlyStopping": {"patience": 3, "threshold": 0.001}},
    )
    job = make_job({"train": chat_rows(8), "eval": others}, pipeline=[stage])
    result = job.run("sft")
    log = job.log(result)
    losses = {e["step"]: e["evalLoss"] for e in log["evaluations"]}
    best = min(losses, key=lambda step: losses[step])
    assert log["stoppedEarly"]
    assert best < log["steps"] < log["totalSteps"]
    assert log["steps"] == max(losses)
    assert (log["resultStep"], log["evalLoss"]) == (best, losses[best])
    model, directory = trained_model(job, result, tiny_model)
    assert loss_of(model, directory, others) == pytest.approx(losses[best], abs=1e-5)


def test_last_checkpoint_is_the_result_when_best_is_off(make_job: JobMaker, tiny_model: Path) -> None:
    """``checkpoint.best: false`` leaves the weights of the last step, whatever the evaluation says."""
    others = chat_rows(8, seed=1)
    stage = sft(training={"maxSteps": 30}, checkpoint={"steps": 5, "best": False})
    job = make_job({"train": chat_rows(8), "eval": others}, pipeline=[stage])
    result = job.run("sft")
    log = job.log(result)
    assert log["resultStep"] == 30
    assert log["evalLoss"] == log["evaluations"][-1]["evalLoss"] > min(e["evalLoss"] for e in log["evaluations"])
    model, directory = trained_model(job, result, tiny_model)
    assert loss_of(model, directory, others) == pytest.approx(log["evalLoss"], abs=1e-5)


@pytest.mark.parametrize(
    "layout",
    [{"microBatchSize": 2}, {"microBatchSize": 1, "packing": False}, {"gradientCheckpointing": True}],
    ids=["two-packed", "one-by-one-padded", "recomputed"],
)
def test_layout_changes_speed_only(make_job: JobMaker, layout: dict[str, Any]) -> None:
    """The curve is the same however the examples of a step are split and laid out; an epoch's last step is smaller."""
    plain = sft(training={"epochs": 2})
    other = sft(training={"epochs": 2, **layout})
    rows = chat_rows(13)
    logs = []
    for stage in (plain, other):
        job = make_job({"train": rows}, pipeline=[stage])
        logs.append(job.log(job.run("sft")))
    assert [p["step"] for p in logs[0]["curve"]] == [1, 2, 3, 4]
    assert logs[0]["batch"] != logs[1]["batch"]
    curves = [[(p["loss"], p["gradNorm"]) for p in log["curve"]] for log in logs]
    assert curves[1] == [pytest.approx(point, rel=1e-4) for point in curves[0]]
    assert [p["tokens"] for p in logs[0]["curve"]] == [p["tokens"] for p in logs[1]["curve"]]


def test_going_on_from_an_adapter_trains_the_same_adapter(make_job: JobMaker) -> None:
    """A second stage begins at the loss with which the first ended, and refuses another shape for the adapter."""
    rows = chat_rows(8)
    again = {**sft(training={"maxSteps": 2}), "name": "again"}
    shape = {"r": 8}
    other = {**sft(training={"maxSteps": 2}, lora={"r": 4}), "name": "other", "from": "sft"}
    job = make_job({"train": rows, "eval": rows}, pipeline=[sft(training={"maxSteps": 10}, lora=shape), again, other])
    first = job.log(job.run("sft"))
    second = job.log(job.run("again"))
    assert second["curve"][0]["loss"] == pytest.approx(first["evalLoss"], abs=1e-5)
    assert second["continues"] == "sft"
    assert (second["lora"]["r"], second["lora"]["alpha"]) == (8, 16)  # not the defaults of its own block
    with pytest.raises(ConfigurationError, match=r"spec\.pipeline\[2\]\.sft\.lora: the adapter of sft .* has r 8"):
        job.run("other")


def test_full_training_does_not_start_on_an_adapter(make_job: JobMaker) -> None:
    """It would leave the adapter out; the message names the field and the mend."""
    full = {**sft("full"), "name": "full"}
    job = make_job({"train": chat_rows(8)}, pipeline=[sft(training={"maxSteps": 1}), full])
    job.run("sft")
    with pytest.raises(ConfigurationError, match=r"spec\.pipeline\[1\]\.sft\.method: .* put a merge stage between"):
        job.run("full")


def test_early_stopping_without_rows_to_evaluate_is_refused(make_job: JobMaker) -> None:
    """It could never stop."""
    job = make_job({"train": chat_rows(8)}, pipeline=[sft(validation={"earlyStopping": {}})])
    with pytest.raises(ConfigurationError, match=r"sft\.validation\.earlyStopping: there are no rows"):
        job.run("sft")


def test_examples_that_are_too_long_are_counted(make_job: JobMaker) -> None:
    """With all of them gone there is nothing to train on; the message says how many were dropped and why."""
    rows = [*chat_rows(8), chat_rows(1)[0] | {"id": "long"}]
    rows[-1]["messages"] = [rows[-1]["messages"][0], {"role": "assistant", "content": "x" * 200}]
    job = make_job({"train": rows}, pipeline=[sft(training={"maxSteps": 1, "maxLength": 128})])
    assert job.log(job.run("sft"))["examples"] == {"train": 8, "eval": 0, "dropped": {"longer than maxLength": 1}}
    job = make_job({"train": rows}, pipeline=[sft(training={"maxLength": 16})])
    with pytest.raises(DataError, match=r"9 longer than maxLength.*training\.maxLength"):
        job.run("sft")


def test_a_loss_that_is_no_number_ends_the_training(make_job: JobMaker, tiny_model: Path, tmp_path: Path) -> None:
    """It ends at the step where it happens, with the mend; no weights made of NaN are ever committed."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    job = make_job({"train": chat_rows(8)}, model=broken, pipeline=[sft()])
    with pytest.raises(
        StageError, match=r"the loss is nan at step 1: .*\[0\]\.sft\.training\.learningRate \(now 0\.02\)"
    ):
        job.run("sft")


def test_memory_that_runs_out_names_the_mend(make_job: JobMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own words are no help; the fields that lower the need are."""

    def allocate(*_: object) -> object:
        return torch.empty(1 << 50)

    monkeypatch.setattr(memory, "plan", allocate)
    job = make_job({"train": chat_rows(8)}, pipeline=[sft()])
    with pytest.raises(StageError, match=r"out of memory: set spec.pipeline\[0\]\.sft\.training\.microBatchSize: 1"):
        job.run("sft")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs privileges that this process lacks")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_is_told_as_such(make_job: JobMaker, small_disk: Path) -> None:
    """Whatever each library says when it cannot write, the user reads that the disk is full, and where."""
    job = make_job({"train": chat_rows(8)}, pipeline=[sft(training={"maxSteps": 2})])
    (small_disk / "inputs").symlink_to(job.scratch)  # only what is saved lies on the small one
    with pytest.raises(StageError, match=f"the disk of the workspace is full while saving step 1 in {small_disk}"):
        job.run("sft", workspace=small_disk)
