"""A run that is interrupted, however and wherever, ends as one that was not: with the same bits."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.stages.training_job import Job, JobMaker, StopAfter, chat_rows, environment, pair_rows, wait_for

from finetune_api.stage import Manifest
from finetune_jobs.run.digest import digest_of, inputs_of
from finetune_jobs.run.errors import InputMissingError, PreemptedError
from finetune_jobs.run.preemption import Stop
from finetune_jobs.store import layout, manifest
from finetune_jobs.store.checkpoints import Checkpoints

TRAINING = {"batchSize": 4, "loggingSteps": 3, "maxSteps": 12, "learningRate": 1e-2, "precision": "fp32"}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"sft": {"lora": {"dropout": 0.2}, "training": {**TRAINING, "neftuneNoiseAlpha": 5.0}}},
    "qlora": {"sft": {"method": "qlora", "training": {**TRAINING, "microBatchSize": 2, "precision": "bf16"}}},
    "full": {"sft": {"method": "full", "training": {**TRAINING, "weightDecay": 0.1}}},
    "fp16": {"sft": {"training": {**TRAINING, "precision": "fp16"}}},
    "qat": {"sft": {"qat": {"type": "Q4_0"}, "training": {**TRAINING, "gradientCheckpointing": True}}},
    "qat-full": {"sft": {"method": "full", "qat": {"type": "Q2_K"}, "training": {**TRAINING, "learningRate": 1e-3}}},
    "dpo": {"preference": {"beta": 0.3, "training": TRAINING}},
    "ipo": {"preference": {"loss": "ipo", "training": TRAINING}},
    "kto": {"preference": {"loss": "kto", "beta": 0.3, "training": TRAINING}},
    "orpo": {"preference": {"loss": "orpo", "training": TRAINING}},
    "simpo": {"preference": {"loss": "simpo", "method": "qlora", "training": TRAINING}},
    "reward": {"reward": {"training": TRAINING}},
    "reward-full": {"reward": {"method": "full", "training": {**TRAINING, "learningRate": 1e-3}}},
    "dpo-full": {"preference": {"method": "full", "training": {**TRAINING, "learningRate": 1e-3}}},
}
ROLES = {
    "train": chat_rows(14),
    "eval": chat_rows(4, seed=1),
    "preference": pair_rows(14),
    "preferenceEval": pair_rows(4, seed=1),
}


def pipeline(block: dict[str, Any]) -> list[dict[str, Any]]:
    """One stage, saving and evaluating every other step."""
    [(kind, settings)] = block.items()
    return [{"name": "train", kind: {"checkpoint": {"steps": 2, "keep": 2}, **settings}}]


def weights(result: Manifest) -> str:
    """The sha256 of what was trained."""
    whole, adapter = "model.safetensors", "adapter_model.safetensors"
    return next(file.sha256 for file in result.files if Path(file.path).name in (whole, adapter))


def comparable(log: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in the logs: all but times, and where the run went on."""
    names = (
        "steps",
        "totalSteps",
        "resultStep",
        "evalLoss",
        "curve",
        "evaluations",
        "tokens",
        "parameters",
        "examples",
    )
    return {name: log[name] for name in names}


def checkpoints(job: Job) -> Checkpoints:
    """Of the job's stage, at the place where its attempts look."""
    inputs = inputs_of(job.spec, "train", {"prepare": manifest.load(job.store, job.inputs["prepare"]).outputs})
    digest = digest_of(job.spec, job.ref, "train", inputs)
    return Checkpoints(job.store, layout.result_prefix(job.store.prefix, job.ref, "train", digest), "reader", keep=9)


@pytest.mark.parametrize("which", RUNS)
def test_stopped_again_and_again_ends_with_the_same_bits(make_job: JobMaker, which: str) -> None:
    """Every attempt is told to stop a little later in its life: in a step, in an evaluation, between two."""
    plain = make_job(ROLES, pipeline=pipeline(RUNS[which]))
    expected = plain.run("train")
    job = make_job(ROLES, pipeline=pipeline(RUNS[which]))
    attempts = 0
    while True:
        try:
            result = job.run("train", StopAfter(6 + attempts % 5))
            break
        except PreemptedError:
            attempts += 1
            assert attempts < 25, "the attempts make no progress"
    log = job.log(result)
    assert len(log["resumedFrom"]) >= 3, log["resumedFrom"]
    assert weights(result) == weights(expected)
    assert comparable(log) == comparable(plain.log(expected))


def test_stopped_and_killed_process_ends_with_the_same_bits(make_job: JobMaker, tmp_path: Path) -> None:
    """SIGTERM saves the step it comes in and exits 75; after SIGKILL the last committed checkpoint counts."""
    settings = {**RUNS["lora"]["sft"], "training": {**TRAINING, "maxSteps": 120}, "checkpoint": {"steps": 10}}
    plain = make_job(ROLES, pipeline=pipeline({"sft": settings}))
    expected = plain.run("train")
    job = make_job(ROLES, pipeline=pipeline({"sft": settings}))
    first = interrupted(job, signal.SIGTERM, 10, tmp_path / "first.json")
    second = interrupted(job, signal.SIGKILL, first + 1, tmp_path / "second.json")
    result = job.run("train")
    log = job.log(result)
    assert log["resumedFrom"] == [first, second]
    assert weights(result) == weights(expected)
    assert comparable(log) == comparable(plain.log(expected))


def interrupted(job: Job, signum: signal.Signals, step: int, progress: Path) -> int:
    """Start the stage as a process, interrupt it once that checkpoint is there; the newest step that is saved then."""
    command = [sys.executable, "-m", "finetune_jobs", str(job.write("train"))]
    process = subprocess.Popen(command, env=environment(FINETUNE_PROGRESS_FILE=str(progress)))
    try:
        wait_for(lambda: progress.exists() and saved_step(progress) >= step)
        process.send_signal(signum)
        assert process.wait(timeout=60) == (75 if signum == signal.SIGTERM else -signum)
    finally:
        process.kill()
    newest = checkpoints(job).newest()
    assert newest is not None
    return newest.step


def saved_step(progress: Path) -> int:
    """Of the newest checkpoint that the stage has told of."""
    return int((json.loads(progress.read_text())["checkpoint"] or {"step": 0})["step"])


def test_stopped_before_the_first_step_saves_nothing(make_job: JobMaker) -> None:
    """There is nothing to lose, and the next attempt begins at the beginning."""
    job = make_job(ROLES, pipeline=pipeline(RUNS["lora"]))
    stop = Stop()
    stop.request()
    with pytest.raises(PreemptedError):
        job.run("train", stop)
    assert job.log(job.run("train"))["resumedFrom"] == []


@pytest.mark.parametrize(("setting", "expected"), [(4, 4), ("none", 0)])
def test_resume_from_is_applied_once(make_job: JobMaker, setting: int | str, expected: int) -> None:
    """A step, or the beginning, that the user names is gone back to; what is saved from there on is gone on from."""
    first = make_job(ROLES, pipeline=pipeline({"sft": {**RUNS["lora"]["sft"], "checkpoint": {"steps": 2, "keep": 9}}}))
    first.run("train")
    saved = checkpoints(first).get(8)
    assert saved is not None
    block = {"sft": {**RUNS["lora"]["sft"], "checkpoint": {"steps": 2, "keep": 9, "resumeFrom": setting}}}
    job = make_job(ROLES, pipeline=pipeline(block))
    there = checkpoints(job)  # those of another run, as after a change of the setting alone
    for step in (4, 8):
        checkpoints(first).fetch(step, tmp := job.scratch / f"copy-{step}")
        there.save(step, tmp, {})
        there.drain()
    with pytest.raises(PreemptedError):
        job.run("train", StopAfter(5))
    saved = there.newest()
    assert saved is not None
    assert expected < saved.step < 8
    log = job.log(job.run("train"))
    assert log["resumedFrom"] == [*([expected] if expected else []), saved.step]


def test_resume_from_a_step_that_is_not_there(make_job: JobMaker) -> None:
    """It is an input that is missing; the message names the field."""
    block = {"sft": {**RUNS["lora"]["sft"], "checkpoint": {"resumeFrom": 7}}}
    job = make_job(ROLES, pipeline=pipeline(block))
    with pytest.raises(InputMissingError, match=r"no checkpoint of step 7 .*checkpoint\.resumeFrom"):
        job.run("train")
