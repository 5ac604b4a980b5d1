"""Words, names and helpers of ``kubectl finetune``, without a cluster."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_cli.clusterstore import _only_inside, _service
from finetune_cli.errors import CommandError
from finetune_cli.plugin import main
from finetune_cli.portforward import forwarded

COMMANDS = ["plan", "get", "watch", "logs", "pull", "chat", "report", "checkpoints", "suspend", "resume"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence that is not cut off in the overview, and kubectl's own options where it speaks to a cluster."""
    assert main([command, "--help"]) == 0
    options = capsys.readouterr().out
    assert options.startswith(f"Usage: kubectl finetune {command}")
    assert "--namespace" in options
    assert ("--context" in options and "--kubeconfig" in options) == (command != "plan")
    assert main(["--help"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  {command} "))
    assert line.endswith(".")
    assert not line.endswith("...")


def test_help_imports_nothing_heavy_and_the_commands_no_stages() -> None:
    """Help is instant, and a machine that only looks after jobs needs none of what stages do."""
    code = """
import sys
from finetune_cli.plugin import main
main(["--help"])
first = set(sys.modules)
from finetune_cli import cluster, clusterlogs, clusterstore, commands, runs
print(*first, file=sys.stderr)
print(*sys.modules, file=sys.stderr)
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    helping, working = ({name.partition(".")[0] for name in line.split()} for line in asked.stderr.splitlines()[-2:])
    assert not helping & {"aiohttp", "kubernetes", "boto3", "pydantic", "rich", "yaml"}
    assert "aiohttp" in working
    assert not working & {"torch", "transformers", "peft", "datasets", "llama_cpp", "numpy", "huggingface_hub"}


def test_a_cluster_that_is_not_configured_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the file that was looked for, and no traceback."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    assert main(["get", "--kubeconfig", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"kubectl finetune: kubeconfig {tmp_path}/none: ")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("store.team.svc", True),
        ("store.team.svc.cluster.local", True),
        ("no-such-name.invalid", True),
        ("127.0.0.1", False),
        ("localhost", False),
    ],
)
def test_what_only_the_cluster_can_resolve(host: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of services, and names that lead nowhere from here; in a pod itself every name is tried as it is."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert _only_inside(host) == inside
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert not _only_inside(host)


def test_which_service_a_host_is() -> None:
    """With and without namespace and domain; a pod's own name is none that could be forwarded."""
    assert _service("store.team.svc.cluster.local", "default") == ("store", "team")
    assert _service("store.team.svc", "default") == ("store", "team")
    assert _service("store.team", "default") == ("store", "team")
    assert _service("store", "default") == ("store", "default")
    with pytest.raises(CommandError, match="--store-endpoint"):
        _service("pod-0.store.team.svc", "default")


def test_a_forward_that_ends_is_started_again_on_the_same_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kubectl ends with the pod that it led to; whoever downloads goes on at the same address."""
    program = tmp_path / "kubectl"
    program.write_text(
        f"""#!/bin/sh
echo "$$ $*" >> {tmp_path}/asked
echo "Forwarding from 127.0.0.1:4711 -> 8333"
[ $(wc -l < {tmp_path}/asked) = 1 ] || exec sleep 600
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with forwarded(["--context=x"], "team", "store", 8333) as port:
        assert port == 4711
        deadline = time.monotonic() + 60
        while len(asked := (tmp_path / "asked").read_text().splitlines()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert asked[0].endswith("service/store :8333")
    pid, *again = asked[1].split()
    assert again[-2:] == ["service/store", "4711:8333"]
    assert not Path(f"/proc/{pid}").exists()


def test_no_kubectl_is_told_with_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``kubectl-finetune`` can be run alone; then an endpoint must be named."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match="--store-endpoint"), forwarded([], "team", "store", 8333):
        pass
