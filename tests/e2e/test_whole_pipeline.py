import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.stages.gguf_models import random_model, smollm2  # noqa: F401 - fixtures

from finetune_cli.embedded import EmbeddedStore
from finetune_cli.ledger import JobLedger

COLOURS = ("red", "green", "blue", "black", "white")
PIPELINE = ("sft", "dpo", "judge", "ppo", "merge", "gguf")
THINGS = ("lamp", "chair", "table", "shelf", "rug", "stool", "clock", "vase")


def rows() -> list[dict[str, Any]]:
    """Forty questions whose answers follow from them."""
    made = []
    for thing in THINGS:
        for colour in COLOURS:
            asked = {"role": "user", "content": f"I want the {colour} {thing}."}
            made.append({"messages": [asked, {"role": "assistant", "content": f"{thing}: {colour}"}]})
    return made


def write_job(folder: Path, model: Path, **evaluation: Any) -> Path:
    """A job over the rows with every kind of stage, small enough to train in seconds.

    The classic pipeline of human feedback is in it: sft, a reward model as a branch, ppo on what was learned.
    """
    pairs = [
        {
            "prompt": [r["messages"][0]],
            "chosen": [r["messages"][1]],
            "rejected": [{"role": "assistant", "content": "?"}],
        }
        for r in rows()
    ]
    for name, content in (("train", rows()), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    training = {"batchSize": 4, "learningRate": 0.001, "precision": "fp32", "loggingSteps": 1}
    rewards = [{"stage": "judge"}, {"builtin": "exactMatch", "weight": 2}]
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"source": f"file://{model}"},
            "data": {
                "train": [{"source": "file://train.jsonl"}],
                "preference": [{"source": "file://pairs.jsonl"}],
                "prompts": [{"source": "file://train.jsonl"}],
            },
            "storage": {"bucket": "finetune"},
            "evaluation": {"maxRows": 4, "maxNewTokens": 8, **evaluation},
            "pipeline": [
                {"name": "sft", "sft": {"training": {**training, "maxSteps": 24}, "checkpoint": {"steps": 2}}},
                {"name": "dpo", "preference": {"training": {**training, "maxSteps": 2}}},
                {"name": "judge", "from": "base", "reward": {"training": {**training, "maxSteps": 4}}},
                {
                    "name": "ppo",
                    "rl": {
                        "rewards": rewards,
                        "generation": {"maxNewTokens": 6},
                        "training": {**training, "maxSteps": 2},
                    },
                },
                {"name": "merge", "merge": {}},
                {"name": "gguf", "quantize": {"gguf": ["Q8_0"]}},
            ],
        },
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    return path


class Machine:
    """The command line of a user with a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {**os.environ, "FINETUNE_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        """A command on its way."""
        command = [sys.executable, "-m", "finetune_cli", *map(str, arguments)]
        return subprocess.Popen(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finetune(self, *arguments: object) -> str:
        """The output of a command that must succeed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        return output

    def status(self) -> dict[str, Any]:
        """The job's, as the user sees it."""
        if not (self.home / "jobs/default/tiny/job.json").exists():
            return {}
        status: dict[str, Any] = json.loads(self.finetune("get", "tiny", "--json"))["status"]
        return status


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One machine for the tests of this file, which go on from each other; its store runs all the while."""
    home = tmp_path_factory.mktemp("machine")
    with EmbeddedStore(home, "finetune"):
        yield Machine(home)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the YAML and its data lie."""
    return tmp_path_factory.mktemp("job")


def committed(machine: Machine) -> bool:
    """The training has a checkpoint in the store. By the records: a command would take as long as the training does."""
    ledger = JobLedger(machine.home, "default", "tiny")
    return ledger.known and any(stage.name == "sft" and stage.checkpoint for stage in ledger.status().stages)


def report(folder: Path) -> dict[str, Any]:
    """That was pulled."""
    content: dict[str, Any] = json.loads(next((folder / "out").rglob("report.json")).read_text())
    return content


def stages(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name."""
    return {stage["name"]: stage for stage in status.get("stages", [])}


def test_a_run_killed_in_the_middle_of_training_goes_on_from_its_checkpoint(
    machine: Machine,
    folder: Path,
    random_model: Path,  # noqa: F811 - the fixture
) -> None:
    """After SIGKILL the same command runs no finished stage again and trains on from a committed checkpoint."""
    job = write_job(folder, random_model)
    with machine.start("run", job) as first:
        try:
            while not committed(machine):
                assert first.poll() is None, first.communicate()[0]
                time.sleep(0.5)
        finally:
            first.send_signal(signal.SIGKILL)
    output = machine.finetune("run", job)
    status = machine.status()
    assert {c["type"]: c["status"] for c in status["conditions"]}["Complete"] == "True", output
    attempts = {name: stage["attempt"] for name, stage in stages(status).items()}
    assert attempts["sft"] == 2
    assert set(attempts) == {"prepare", "baseline", *PIPELINE, "evaluate", "report"}
    assert {attempt for name, attempt in attempts.items() if name != "sft"} == {1}
    machine.finetune("pull", "tiny", "report.json", "index.html", "-o", folder / "out")
    trained = report(folder)["training"]["sft"]
    assert trained["steps"] == 24
    assert trained["resumedFrom"]
    assert trained["resumedFrom"][0] >= 2


def test_the_report_tells_of_human_feedback(machine: Machine, folder: Path) -> None:
    """Of the reward model, which is a branch and can be pulled, and of what ppo made of its rewards."""
    told = report(folder)
    assert told["targets"] == ["base", "merge", "gguf/Q8_0"]
    assert {name: stage["kind"] for name, stage in told["training"].items()} == {
        "sft": "sft",
        "dpo": "preference",
        "judge": "reward",
        "ppo": "rl",
    }
    assert told["training"]["judge"]["continues"] is None
    assert told["training"]["ppo"]["continues"] == "dpo"
    judged = told["reward"]["judge"]
    assert judged["pairs"] == told["training"]["judge"]["examples"]["eval"] > 0
    assert 0 <= judged["accuracy"] <= 1
    learned = told["rl"]["ppo"]
    assert learned["prompts"] > 0
    assert set(learned["before"]) == {"reward", "kl", "length", "rewards/judge", "rewards/exactMatch"}
    assert "KL divergence" in next((folder / "out").rglob("index.html")).read_text()
    assert machine.finetune("pull", "tiny", "judge/reward", "-o", folder / "judge")
    assert next((folder / "judge").rglob("adapter_config.json")).is_file()


def test_what_is_pulled_is_what_status_promises(machine: Machine, folder: Path) -> None:
    """Size and sha256 of the pulled GGUF are those of status, and it answers."""
    machine.finetune("pull", "tiny", "-o", folder / "out")
    promised = next(a for a in machine.status()["artifacts"] if a["name"] == "Q8_0")
    pulled = next((folder / "out").rglob("*.gguf"))
    assert pulled.stat().st_size == promised["sizeBytes"]
    assert hashlib.sha256(pulled.read_bytes()).hexdigest() == promised["sha256"]
    assert machine.finetune("chat", pulled, "I want the red lamp.").strip()


def test_another_file_of_the_result_is_a_job_of_one_stage(machine: Machine, folder: Path) -> None:
    """Of the merged model, where it lies: nothing is trained or merged again, and the rows it is held against are the
    same locked ones.
    """
    machine.finetune("export", "tiny", "--gguf", "F16", "-o", folder / "other")
    assert [path.name for path in (folder / "other").glob("*.gguf")] == ["tiny-export-F16.gguf"]
    job = json.loads(machine.finetune("get", "tiny-export", "--json"))
    assert {name: stage["state"] for name, stage in stages(job["status"]).items()} == {
        "prepare": "Complete",
        "export": "Complete",
    }
    for name in ("tiny", "tiny-export"):
        machine.finetune("pull", name, "prepare/data", "-o", folder / name)
    test, same = (folder / name / "data/default/test.jsonl" for name in ("tiny", "tiny-export"))
    assert test.read_text() == same.read_text()


def test_the_same_job_again_starts_nothing(machine: Machine, folder: Path) -> None:
    """A Complete job says so at once; its attempts do not change."""
    before = machine.status()
    machine.finetune("run", folder / "job.yaml")
    assert machine.status() == before


def test_a_changed_spec_reruns_only_what_depends_on_it(machine: Machine, folder: Path, random_model: Path) -> None:  # noqa: F811
    """Fewer rows to score: baseline, evaluate and report run again, nothing is trained."""
    machine.finetune("run", write_job(folder, random_model, maxRows=3))
    states = {name: stage["state"] for name, stage in stages(machine.status()).items()}
    assert {name for name, state in states.items() if state == "Complete"} - {"prepare"} == {
        "baseline",
        "evaluate",
        "report",
    }
    assert {name for name, state in states.items() if state == "Reused"} - {"prepare"} == set(PIPELINE)
