"""Several processes on one machine: the same training, and the same contract of signals and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.builders import a_job
from tests.stages.training_job import Job, JobMaker, chat_rows, environment, label_rows, pair_rows, wait_for

from finetune_api.stage import JobRef, StageRun, Termination
from finetune_jobs.run import launch
from finetune_jobs.run.errors import ConfigurationError

TRAINING = {"batchSize": 5, "loggingSteps": 1, "maxSteps": 8, "learningRate": 1e-2, "precision": "fp32"}
ROLES = {
    "train": chat_rows(13),
    "eval": chat_rows(3, seed=1),
    "preference": pair_rows(9),
    "preferenceEval": pair_rows(3),
}


def run_of(*stages: dict[str, Any], stage: str) -> StageRun:
    """What a stage of such a pipeline is given."""
    job = a_job(*stages)
    return StageRun(job=JobRef(namespace="team", name="bot", uid="u"), stage=stage, attempt=1, spec=job.spec)


@pytest.mark.parametrize(
    ("stage", "given", "devices", "expected"),
    [
        ({"name": "s", "sft": {}}, {}, 0, 1),
        ({"name": "s", "sft": {}, "resources": {"gpus": 4}}, {}, 4, 4),
        ({"name": "s", "sft": {}, "resources": {"gpus": 4}}, {}, 2, 2),
        ({"name": "s", "sft": {}, "resources": {"gpus": 4}}, {}, 0, 1),
        ({"name": "s", "sft": {}, "resources": {"gpus": 1}}, {}, 8, 1),
        ({"name": "s", "preference": {}, "resources": {"gpus": 2}}, {"CUDA_VISIBLE_DEVICES": "3,5"}, 8, 2),
        ({"name": "s", "preference": {}, "resources": {"gpus": 2}}, {"CUDA_VISIBLE_DEVICES": ""}, 8, 1),
        ({"name": "s", "sft": {}}, {"FINETUNE_PROCESSES": "3"}, 0, 3),
        ({"name": "s", "quantize": {"gguf": ["F16"]}, "resources": {"gpus": 4}}, {"FINETUNE_PROCESSES": "3"}, 4, 1),
    ],
    ids=["cpu", "as-asked", "fewer-here", "none-here", "more-here", "visible", "hidden", "override", "no-training"],
)
def test_number_of_processes(
    stage: dict[str, Any], given: dict[str, str], devices: int, expected: int, tmp_path: Path
) -> None:
    """One for each GPU that is asked for and there; only training stages take several."""
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{i}" for i in range(devices))):
        (tmp_path / name).touch()
    assert launch.processes(run_of(stage, stage="s"), given, tmp_path) == expected


def test_a_wrong_number_of_processes_is_refused() -> None:
    """The message names the variable."""
    with pytest.raises(ConfigurationError, match="FINETUNE_PROCESSES: must be a number from 1, got 'two'"):
        launch.processes(run_of({"name": "s", "sft": {}}, stage="s"), {"FINETUNE_PROCESSES": "two"})


@pytest.mark.parametrize(
    ("codes", "told", "expected"),
    [
        ({0: 0, 1: 0}, False, (0, 0)),
        ({1: 75, 0: 75}, True, (75, 1)),
        ({1: 76, 0: 65}, False, (65, 0)),
        ({1: 70, 0: 64}, True, (70, 1)),
        ({1: -9, 0: 76}, False, (76, 1)),
        ({1: -9, 0: 76}, True, (76, 1)),
        ({0: 76, 1: 75}, True, (75, 1)),
    ],
    ids=["done", "saved", "own-reason-first", "first-reason", "killed", "killed-though-told", "obeyed-one-by-one"],
)
def test_exit_code_of_many(codes: dict[int, int], told: bool, expected: tuple[int, int]) -> None:
    """The first worker that failed for a reason of its own speaks for all."""
    assert launch._outcome(codes, told=told) == expected


@contextmanager
def launched(job: Job, tmp_path: Path, stage: str = "train") -> Iterator[tuple["subprocess.Popen[bytes]", Path, Path]]:
    """The stage as two processes; with its progress file and its termination message."""
    progress, message = tmp_path / "progress.json", tmp_path / "termination.json"
    given = environment(
        FINETUNE_PROCESSES="2",
        FINETUNE_PROGRESS_FILE=str(progress),
        FINETUNE_TERMINATION_LOG=str(message),
        FINETUNE_WORKSPACE=str(tmp_path / f"work-{time.monotonic_ns()}"),
    )
    command = [sys.executable, "-m", "finetune_jobs", str(job.write(stage))]
    process = subprocess.Popen(command, env=given)
    try:
        yield process, progress, message
    finally:
        process.kill()
        process.wait()


def words(message: Path) -> Termination:
    """The message that was left."""
    return Termination.model_validate_json(message.read_bytes())


def step_of(progress: Path) -> int:
    """How far the stage says it is."""
    return int(json.loads(progress.read_text())["step"]) if progress.exists() else 0


def workers_of(launcher: int) -> list[int]:
    """Process ids of its children."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Is there such a process, not counting one that only waits to be buried?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_learn_what_one_does(make_job: JobMaker, tmp_path: Path) -> None:
    """Five examples a step, so that the two have unlike shares; three in the last of an epoch. Only noise differs."""
    stage = {"name": "train", "sft": {"training": TRAINING, "checkpoint": {"steps": 4}}}
    alone = make_job(ROLES, pipeline=[stage])
    one = alone.log(alone.run("train"))
    job = make_job(ROLES, pipeline=[stage])
    with launched(job, tmp_path) as (process, _, message):
        assert process.wait(timeout=240) == 0
    two = job.log(job.committed("train", words(message)))
    assert (one["batch"]["processes"], two["batch"]["processes"]) == (1, 2)
    compare(two, one)


def test_two_processes_estimate_kto_s_divergence_as_one_does(make_job: JobMaker, tmp_path: Path) -> None:
    """From the answers of both, before either learns from its own."""
    # Few small steps: the estimate is far from 0 by then, and noise has not grown.
    training = {**TRAINING, "maxSteps": 5, "learningRate": 1e-3}
    stage = {"name": "train", "preference": {"loss": "kto", "training": training, "checkpoint": {"steps": 5}}}
    roles = {"preference": label_rows(9), "preferenceEval": label_rows(3, seed=1)}
    alone = make_job(roles, pipeline=[stage])
    one = alone.log(alone.run("train"))
    job = make_job(roles, pipeline=[stage])
    with launched(job, tmp_path) as (process, _, message):
        assert process.wait(timeout=240) == 0
    compare(job.log(job.committed("train", words(message))), one)
    assert max(point["kl"] for point in one["curve"]) > 0


def compare(log: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same training but for noise."""
    for curve in ("curve", "evaluations"):
        assert log[curve] == [pytest.approx(point, rel=1e-3, abs=1e-5) for point in expected[curve]]
    assert (log["tokens"], log["resultStep"]) == (expected["tokens"], expected["resultStep"])


def long_stage(kind: str, steps: int) -> dict[str, Any]:
    """Long enough to be interrupted; slow enough that its numbers stay comparable."""
    training = {**TRAINING, "maxSteps": steps, "learningRate": 1e-4}
    return {"name": "train", kind: {"training": training, "checkpoint": {"steps": 5}}}


def test_a_stop_is_passed_on_and_all_save_the_same_step(make_job: JobMaker, tmp_path: Path) -> None:
    """SIGTERM to the launcher alone: exit 75, the step is committed, and one process goes on from there to the end."""
    alone = make_job(ROLES, pipeline=[long_stage("preference", 60)])
    one = alone.log(alone.run("train"))
    job = make_job(ROLES, pipeline=[long_stage("preference", 60)])
    with launched(job, tmp_path) as (process, progress, message):
        wait_for(lambda: step_of(progress) >= 1)
        workers = workers_of(process.pid)
        assert len(workers) == 2
        process.terminate()
        assert process.wait(timeout=60) == 75
        assert not any(alive(pid) for pid in workers)
        error = words(message).error or ""
    log = job.log(job.run("train"))
    [step] = log["resumedFrom"]
    assert f"saved at step {step} of 60" in error
    compare(log, one)


def test_a_lost_worker_ends_the_attempt_at_once(make_job: JobMaker, tmp_path: Path) -> None:
    """SIGKILL of one: exit 76 with words, the other is gone too; the next attempt goes on from what was committed."""
    job = make_job(ROLES, pipeline=[long_stage("sft", 80)])
    with launched(job, tmp_path) as (process, progress, message):
        wait_for(lambda: progress.exists() and json.loads(progress.read_text())["checkpoint"] is not None)
        workers = workers_of(process.pid)
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait(timeout=60) == 76
        assert not any(alive(pid) for pid in workers)
        assert "worker 1 of 2 was killed by signal 9" in (words(message).error or "")
    log = job.log(job.run("train"))
    assert log["steps"] == 80
    assert log["resumedFrom"] != []


def test_no_worker_outlives_the_launcher(make_job: JobMaker, tmp_path: Path) -> None:
    """Even SIGKILL, which the launcher cannot pass on, takes the workers with it."""
    job = make_job(ROLES, pipeline=[long_stage("sft", 200)])
    with launched(job, tmp_path) as (process, _, _):
        wait_for(lambda: len(workers_of(process.pid)) == 2)
        workers = workers_of(process.pid)
        process.kill()
        process.wait()
        wait_for(lambda: not any(alive(pid) for pid in workers))


def test_a_worker_s_own_reason_is_the_stage_s(make_job: JobMaker, tmp_path: Path) -> None:
    """A data set with nothing to learn: exit 65 with the words of the worker that found it, not 76 of the other."""
    job = make_job({"train": []}, pipeline=[long_stage("sft", 200)])
    with launched(job, tmp_path) as (process, _, message):
        assert process.wait(timeout=120) == 65
        assert "no example is left to train on" in (words(message).error or "")
