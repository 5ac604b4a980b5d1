"""A real training beside an operator that listens, and one that does not: only the telling differs."""

import subprocess
import sys
import threading
from pathlib import Path

from tests.stages.training_job import JobMaker, chat_rows, environment
from tests.unit.progress_parts import Server, own_certificate

from finetune_api.stage import Termination

STAGE = {
    "name": "train",
    "sft": {
        "training": {"batchSize": 4, "loggingSteps": 1, "maxSteps": 6, "learningRate": 1e-2, "precision": "fp32"},
        "checkpoint": {"steps": 3},
    },
}


def test_a_stage_of_two_processes_tells_the_operator_and_a_deaf_one_changes_nothing(
    make_job: JobMaker, tmp_path: Path
) -> None:
    """The last update says all steps and the checkpoint; one that hangs for ever costs no result: the same weights."""
    outputs = []
    deaf = threading.Event()
    for number, hangs in enumerate((False, True)):
        server = Server(own_certificate())
        if hangs:
            server.answer = lambda: 204 if deaf.wait(240) else 500
        (tmp_path / "token").write_text("t")
        (tmp_path / "ca.pem").write_text("".join(server.own.published))
        job = make_job({"train": chat_rows(12), "eval": chat_rows(3, seed=1)}, pipeline=[STAGE])
        message = tmp_path / f"termination-{number}.json"
        given = environment(
            FINETUNE_PROCESSES="2",
            FINETUNE_PROGRESS_URL=server.url,
            FINETUNE_PROGRESS_TOKEN_FILE=str(tmp_path / "token"),
            FINETUNE_PROGRESS_CA_FILE=str(tmp_path / "ca.pem"),
            FINETUNE_TERMINATION_LOG=str(message),
            FINETUNE_WORKSPACE=str(tmp_path / f"work-{number}"),
        )
        with server.running():
            command = [sys.executable, "-m", "finetune_jobs", str(job.write("train"))]
            assert subprocess.run(command, env=given, timeout=240).returncode == 0
            deaf.set()
        outputs.append(job.committed("train", Termination.model_validate_json(message.read_bytes())).outputs)
        if not hangs:
            bearer, last = server.posts[-1]
            assert bearer == "Bearer t"
            assert (last["step"], last["totalSteps"], last["percent"]) == (6, 6, 100)
            assert last["checkpoint"]["step"] == 6
            assert server.steps == sorted(server.steps)  # of one process only
            deaf.clear()
    assert outputs[0]["adapter"] == outputs[1]["adapter"]
