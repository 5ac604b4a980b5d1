"""A machine that lacks something is told what, and how to get it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cluster.binaries import MissingToolError, binary
from tests.cluster.node import start_cluster
from tests.cluster.packages import require

ROOT = Path(__file__).parents[2]


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    """What is there is not asked for again."""
    with pytest.raises(
        MissingToolError, match=r"missing no-such-package: apt-get install .* no-such-package \(as root"
    ):
        require({"coreutils": "env", "no-such-package": "no-such-program"}, install=False)


def test_a_package_that_cannot_be_installed_is_an_error_in_apts_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Installing is tried where it is wished, and its failure is told."""
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\n[ $1 = update ] || { echo E: Unable to locate package >&2; exit 100; }\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    told: list[str] = []
    with pytest.raises(MissingToolError, match=r"apt-get install .* failed: E: Unable to locate package"):
        require({"no-such-package": "no-such-program"}, install=True, say=told.append)
    assert told == ["installing no-such-package"]


def test_without_go_the_build_says_what_to_install(tmp_path: Path) -> None:
    """No traceback: one sentence, and exit code 1."""
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "tests.cluster", "build", "kubectl"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the Go toolchain is needed (go1.26, https://go.dev/dl): there is no `go` on PATH\n"


def test_a_node_needs_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is said before anything is started or written."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingToolError, match="a node needs root"):
        start_cluster(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    """A typing mistake starts no build."""
    with pytest.raises(KeyError, match="kube-nothing"):
        binary("kube-nothing")


def test_status_without_a_cluster_is_exit_code_one(tmp_path: Path) -> None:
    """Scripts can ask whether one is up; `down` has nothing to do and says nothing."""
    for name, code, said in (("status", 1, f"no cluster is up in {tmp_path}\n"), ("down", 0, "")):
        command = [sys.executable, "-m", "tests.cluster", name, "--directory", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, said)
