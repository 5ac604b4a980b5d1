import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api.stage import Termination
from finetune_cli import errors
from finetune_jobs.run.lifecycle import describe, write_termination

FULL = Path("/dev/full")
"""Every write fails as on a full disk."""


def test_a_message_that_cannot_be_written_changes_nothing() -> None:
    """The termination message is a courtesy: without room for it the stage still ends as it was about to."""
    write_termination(Termination(error="spec.seed: wrong"), FULL)


def test_the_exit_code_survives_a_full_disk(tmp_path: Path) -> None:
    """The contract with the operator holds when not a word can be left: 64 stays 64."""
    command = [sys.executable, "-m", "finetune_jobs", str(tmp_path / "no-such-stage.json")]
    ended = subprocess.run(
        command, env={**os.environ, "FINETUNE_TERMINATION_LOG": str(FULL)}, capture_output=True, check=False
    )
    assert ended.returncode == 64


@pytest.mark.parametrize(("kind", "traced"), [("StageError", False), ("ValueError", True)], ids=["ours", "unforeseen"])
def test_only_what_was_not_foreseen_is_logged_with_a_trace(kind: str, traced: bool) -> None:
    """A failure that has words of its own, a full disk, say, is not buried below the lines of our program."""
    program = f"""
import sys
from finetune_jobs import __main__ as stage
from finetune_jobs.run import lifecycle
from finetune_jobs.run.errors import StageError
def load(path):
    raise {kind}("the disk is full")
lifecycle.load = load
sys.argv = ["stage", "stage.json"]
sys.exit(stage.main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 70
    assert "the disk is full" in ended.stderr
    assert ("Traceback" in ended.stderr) is traced


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_a_full_disk_in_the_words_of_stage_and_command(number: int) -> None:
    """Stage and command both say which file there was no room for, and what to do."""
    error = OSError(number, os.strerror(number), "/data/model.safetensors")
    assert describe(error) == (70, "the disk is full (/data/model.safetensors): free space there or give it more")
    code, words = errors.describe(error)
    assert code == errors.FAILED
    assert words == f"/data/model.safetensors: {os.strerror(number)}; free space there, then the same command goes on"
