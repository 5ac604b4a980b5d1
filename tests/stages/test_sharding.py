"""Processes that share the frozen weights, and processes on several nodes: the same training, nobody holds it all."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.test_launch import ROLES, TRAINING, alive, compare, long_stage, step_of, words, workers_of
from tests.stages.training_job import Job, JobMaker, StopAfter, environment, sha256, wait_for, write_model
from transformers import AutoModelForCausalLM

from finetune_api.stage import Manifest
from finetune_jobs.run import launch
from finetune_jobs.run.errors import PreemptedError


@contextmanager
def nodes(job: Job, tmp_path: Path, count: int = 2, **given: str) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """The stage on so many machines: as the operator's pods are told, each with a disk of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "finetune_jobs", str(job.write("train"))]
    processes = []
    for index in range(count):
        own = environment(
            FINETUNE_NODES=str(count),
            FINETUNE_RENDEZVOUS=f"127.0.0.1:{port}",
            JOB_COMPLETION_INDEX=str(index),
            FINETUNE_PROGRESS_FILE=str(progress_of(tmp_path, index)),
            FINETUNE_TERMINATION_LOG=str(message_of(tmp_path, index)),
            FINETUNE_WORKSPACE=str(tmp_path / f"node-{index}-{time.monotonic_ns()}"),
            **given,
        )
        processes.append(subprocess.Popen(command, env=own))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def progress_of(tmp_path: Path, index: int) -> Path:
    """Where that node says how far it is."""
    return tmp_path / f"progress-{index}.json"


def message_of(tmp_path: Path, index: int) -> Path:
    """Where that node leaves its termination message."""
    return tmp_path / f"message-{index}.json"


def stage(kind: str = "sft", **training: Any) -> dict[str, Any]:
    """Eight steps, saved in the middle."""
    return {"name": "train", kind: {"training": {**TRAINING, **training}, "checkpoint": {"steps": 4}}}


def full(kind: str = "sft", steps: int = 8, every: int = 4, **training: Any) -> dict[str, Any]:
    """The same with all weights trained."""
    block = stage(kind, maxSteps=steps, **training)
    block[kind] |= {"method": "full", "checkpoint": {"steps": every}}
    return block


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its embedding one row longer."""
    directory = write_model(tmp_path_factory.mktemp("odd") / "model")
    auto: Any = AutoModelForCausalLM  # without types
    model = auto.from_pretrained(directory)
    model.resize_token_embeddings(353)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "micro"), [("sft", {}), ("preference", {"microBatchSize": 1, "gradientCheckpointing": True})]
)
def test_processes_that_share_the_model_learn_what_one_learns(
    make_job: JobMaker, tmp_path: Path, kind: str, micro: dict[str, Any]
) -> None:
    """Five examples a step, so one process has a pass that counts nothing; each holds half of the frozen weights."""
    roles = {**ROLES, "preference": ROLES["preference"][:5]}
    alone = make_job(roles, pipeline=[stage(kind, **micro)])
    one = alone.log(alone.run("train"))
    job = make_job(roles, pipeline=[stage(kind, distributed="fsdp", **micro)])
    with nodes(job, tmp_path, 1, FINETUNE_PROCESSES="2") as (process,):
        assert process.wait(timeout=240) == 0
    result = job.committed("train", words(message_of(tmp_path, 0)))
    two = job.log(result)
    compare(two, one)
    assert two["batch"]["shards"] == 2
    frozen = two["parameters"]["total"] - two["parameters"]["trainable"]
    assert two["parameters"]["held"] - two["parameters"]["trainable"] < 0.51 * frozen
    adapter = load_file(job.files(result) / "adapter/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapter.values()) == two["parameters"]["trainable"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", {"maxGradNorm": 0.5, "weightDecay": 0.1}),
        ("preference", {"microBatchSize": 1, "gradientCheckpointing": True}),
    ],
)
def test_processes_that_share_all_that_is_trained_learn_what_one_learns(
    make_job: JobMaker, tmp_path: Path, odd_model: Path, kind: str, settings: dict[str, Any]
) -> None:
    """Full training: each holds half of weights and optimizer, of a tied matrix too whose rows do not divide equally.
    Losses, gradient norms, and the model that is written are those of one process; the first DPO loss is ln 2.
    """
    settings["learningRate"] = 1e-3
    roles = {**ROLES, "preference": ROLES["preference"][:5]}
    alone = make_job(roles, model=odd_model, pipeline=[full(kind, **settings)])
    expected = alone.run("train")
    one = alone.log(expected)
    job = make_job(roles, model=odd_model, pipeline=[full(kind, distributed="fsdp", **settings)])
    with nodes(job, tmp_path, 1, FINETUNE_PROCESSES="2") as (process,):
        assert process.wait(timeout=240) == 0
    result = job.committed("train", words(message_of(tmp_path, 0)))
    two = job.log(result)
    compare(two, one)
    assert two["batch"]["shards"] == 2
    assert two["optimizerBytes"] == pytest.approx(one["optimizerBytes"] / 2, rel=0.01)
    assert two["parameters"]["held"] == pytest.approx(one["parameters"]["held"] / 2, rel=0.01)
    if kind == "preference":
        assert two["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    written, wanted = (j.files(r) / "model" for j, r in ((job, result), (alone, expected)))
    assert {p.name for p in written.iterdir()} == {p.name for p in wanted.iterdir()}
    saved, right = (load_file(directory / "model.safetensors") for directory in (written, wanted))
    assert saved.keys() == right.keys()
    for name, tensor in saved.items():
        assert (tensor.dtype, tensor.shape) == (torch.bfloat16, right[name].shape)
        assert torch.allclose(tensor.float(), right[name].float(), rtol=2e-2, atol=1e-3), name


def test_a_killed_run_that_shares_all_ends_with_the_same_bits(make_job: JobMaker, tmp_path: Path) -> None:
    """SIGKILL of one process ends both; with as many again the model is, bit for bit, that of an undisturbed run."""
    block = full(steps=40, learningRate=1e-4, distributed="fsdp")

    def run(job: Job) -> Manifest:
        with nodes(job, tmp_path, 1, FINETUNE_PROCESSES="2") as (process,):
            assert process.wait(timeout=240) == 0
        return job.committed("train", words(message_of(tmp_path, 0)))

    plain, job = (make_job(ROLES, pipeline=[block]) for _ in range(2))
    expected = run(plain)
    progress_of(tmp_path, 0).unlink()
    with nodes(job, tmp_path, 1, FINETUNE_PROCESSES="2") as (process,):
        progress = progress_of(tmp_path, 0)
        wait_for(lambda: progress.exists() and json.loads(progress.read_text())["checkpoint"] is not None)
        os.kill(workers_of(process.pid)[1], signal.SIGKILL)
        assert process.wait(timeout=60) == 76
    result = run(job)
    assert len(job.log(result)["resumedFrom"]) == 1
    assert sha256(result, "model/model.safetensors") == sha256(expected, "model/model.safetensors")


def test_what_is_shared_goes_on_with_any_number_of_processes(
    make_job: JobMaker, tmp_path: Path, odd_model: Path
) -> None:
    """One process begins, two go on, each with its share of weights and optimizer, and one ends: as one alone does."""
    block = full(steps=60, learningRate=1e-4, distributed="fsdp")
    alone = make_job(ROLES, model=odd_model, pipeline=[block])
    one = alone.log(alone.run("train"))
    job = make_job(ROLES, model=odd_model, pipeline=[block])
    with pytest.raises(PreemptedError):
        job.run("train", StopAfter(20))
    with nodes(job, tmp_path, 1, FINETUNE_PROCESSES="2") as (process,):
        wait_for(lambda: step_of(progress_of(tmp_path, 0)) >= 10)
        process.terminate()
        assert process.wait(timeout=60) == 75
    log = job.log(job.run("train"))
    assert len(log["resumedFrom"]) == 2
    compare(log, one)


def test_a_lost_node_ends_the_attempt_and_the_next_goes_on(make_job: JobMaker, tmp_path: Path) -> None:
    """SIGKILL of one node's processes: the other ends with 76; with both again, it goes on from the checkpoint and
    learns what one process alone learns. The first node alone reports and leaves the result.
    """
    shared = long_stage("sft", 60)
    shared["sft"]["training"]["distributed"] = "fsdp"
    alone = make_job(ROLES, pipeline=[long_stage("sft", 60)])
    one = alone.log(alone.run("train"))
    job = make_job(ROLES, pipeline=[shared])
    with nodes(job, tmp_path) as (first, second):
        progress = progress_of(tmp_path, 0)
        wait_for(lambda: progress.exists() and json.loads(progress.read_text())["checkpoint"] is not None)
        [worker] = workers_of(second.pid)
        second.kill()
        wait_for(lambda: not alive(worker))
        assert first.wait(timeout=60) == 76
    with nodes(job, tmp_path) as processes:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    log = job.log(job.committed("train", words(message_of(tmp_path, 0))))
    assert log["resumedFrom"] != []
    compare(log, one)
    assert log["batch"] == {**one["batch"], "processes": 2, "shards": 2}
    assert not progress_of(tmp_path, 1).exists()
    assert not message_of(tmp_path, 1).exists()


def test_one_node_that_must_leave_takes_all_along(make_job: JobMaker, tmp_path: Path) -> None:
    """SIGTERM to the second node alone, as in a drain: both save the same step and exit with 75."""
    shared = long_stage("preference", 60)
    shared["preference"]["training"]["distributed"] = "fsdp"
    job = make_job(ROLES, pipeline=[shared])
    with nodes(job, tmp_path) as processes:
        wait_for(lambda: step_of(progress_of(tmp_path, 0)) >= 1)
        processes[1].terminate()
        assert [process.wait(timeout=60) for process in processes] == [75, 75]
    assert "saved at step" in (words(message_of(tmp_path, 0)).error or "")
    log = job.log(job.run("train"))  # one process goes on with what two have saved
    assert len(log["resumedFrom"]) == 1
    assert log["steps"] == 60


def test_a_node_that_waits_for_the_first_can_be_stopped(make_job: JobMaker, tmp_path: Path) -> None:
    """The first pod may wait for an image for long: the others have nothing to save and leave at once."""
    job = make_job(ROLES, pipeline=[stage()])
    command = [sys.executable, "-m", "finetune_jobs", str(job.write("train"))]
    given = environment(
        FINETUNE_NODES="2", FINETUNE_RENDEZVOUS="nobody.invalid:29500", JOB_COMPLETION_INDEX="1",
        FINETUNE_TERMINATION_LOG=str(message_of(tmp_path, 1)),
    )  # fmt: skip
    process = subprocess.Popen(command, env=given, stderr=subprocess.PIPE)
    try:
        time.sleep(2)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
        process.wait()


def test_places() -> None:
    """One machine meets on a free port of its own; pods meet at the first one, which need not look itself up."""
    alone = launch.Place.of({})
    assert (alone.nodes, alone.index, alone.host) == (1, 0, "127.0.0.1")
    given = {"FINETUNE_NODES": "4", "FINETUNE_RENDEZVOUS": "j-0.s.ns.svc:29500"}
    assert launch.Place.of({**given, "JOB_COMPLETION_INDEX": "3"}) == launch.Place(4, 3, "j-0.s.ns.svc", 29500)
    assert launch.Place.of({**given, "JOB_COMPLETION_INDEX": "0"}) == launch.Place(4, 0, "127.0.0.1", 29500)
    assert [launch.needed(1, e) for e in ({}, given, {**given, "RANK": "1"})] == [False, True, False]
