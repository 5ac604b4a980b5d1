"""``kubectl finetune`` against a real API server and a real object store; the pods' logs come from a stand-in."""

import base64
import hashlib
import json
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from tests.builders import raw_job
from tests.cluster import pki
from tests.cluster.binaries import binary
from tests.cluster.controlplane import ControlPlane
from tests.cluster.definitions import serve_finetunejobs
from tests.store.conftest import store_server  # noqa: F401

from finetune_api.stage import Artifact, JobRef, Manifest, StageResult
from finetune_api.status import Condition, JobStatus, Progress, StageState, StageStatus
from finetune_cli import cluster
from finetune_cli.embedded import EmbeddedStore
from finetune_cli.plugin import main
from finetune_jobs.store import layout, manifest
from finetune_jobs.store.checkpoints import Checkpoints
from finetune_jobs.store.client import Store
from finetune_jobs.store.transfer import upload_tree
from finetune_operator.kube.client import Resource
from finetune_operator.plan.pods import INDEX_LABEL

STAGES = [
    {"name": "sft", "sft": {"training": {"maxSteps": 4}}},
    {"name": "merge", "merge": {}},
    {"name": "gguf", "quantize": {"gguf": ["Q8_0"]}},
]
NAMES = ["prepare", "baseline", "sft", "merge", "gguf", "evaluate", "report"]
GGUF = b"GGUF" + bytes(range(256)) * 40
ROOT = Path(__file__).parents[2]
PLUGIN = "import sys; from finetune_cli.plugin import main; sys.exit(main())"
SECONDS = 120
"""For a command to get somewhere on a machine that is busy with other tests."""


@pytest.fixture(scope="module")
def plane(control_plane: ControlPlane) -> ControlPlane:
    """A control plane that serves FineTuneJobs."""
    serve_finetunejobs(control_plane)
    return control_plane


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working folder, and no credentials of any other store."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class World:
    """A namespace with a job, its store, and what the operator would write."""

    def __init__(self, plane: ControlPlane, namespace: str, store: Store, server: EmbeddedStore, home: Path) -> None:
        self.plane, self.namespace, self.store, self.server, self.home = plane, namespace, store, server, home
        self.kubeconfig = home / "kubeconfig"
        config = json.loads(plane.kubeconfig.read_text())
        config["contexts"][0]["context"]["namespace"] = namespace
        self.kubeconfig.write_text(json.dumps(config))
        self.stages = {name: StageStatus(name=name) for name in NAMES}

    def kubectl(self, *arguments: str, stdin: object = None) -> str:
        """As the administrator, in the namespace."""
        words = json.dumps(stdin) if stdin is not None else None
        return self.plane.kubectl("-n", self.namespace, *arguments, stdin=words)

    def apply(self, *, endpoint: str = "", nodes: int = 1, **metadata: str) -> dict[str, Any]:
        """Create the job ``bot``, and the Secret that it names."""
        keys = {k: base64.b64encode(v.encode()).decode() for k, v in self.server.environment().items() if v}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "data": keys}
        self.kubectl("apply", "-f", "-", stdin=secret)
        storage = {
            "bucket": self.store.bucket,
            "prefix": self.store.prefix,
            "endpoint": endpoint or self.server.endpoint,
            "secretRef": {"name": "s3"},
        }
        job = raw_job(*STAGES, storage=storage)
        job["spec"]["pipeline"][0] |= {"resources": {"nodes": nodes}}
        job["metadata"] = {"name": "bot", **metadata}
        made: dict[str, Any] = json.loads(self.kubectl("create", "-o", "json", "-f", "-", stdin=job))
        self.reference = JobRef(namespace=self.namespace, name="bot", uid=made["metadata"]["uid"])
        return made

    def write(self, summary: str, *conditions: str, **stages: dict[str, Any]) -> None:
        """Change the status as the operator does, through its subresource."""
        for name, change in stages.items():
            self.stages[name] = self.stages[name].model_copy(update=change)
        results = [s.result for s in self.stages.values() if s.result]
        status = JobStatus(
            observed_generation=1,
            summary=summary,
            stages=list(self.stages.values()),
            artifacts=[artifact for result in results for artifact in result.artifacts],
            conditions=[
                Condition(type=kind, status="True", reason="Running", last_transition_time=datetime.now(UTC))
                for kind in conditions
            ],
        )
        patch = json.dumps({"status": status.model_dump(mode="json", by_alias=True, exclude_none=True)})
        self.kubectl("patch", "finetunejob", "bot", "--subresource=status", "--type=merge", "-p", patch)

    def result(self, stage: str, files: dict[str, bytes], artifacts: dict[str, str]) -> StageResult:
        """What a stage leaves: committed by the store's own ways."""
        digest = hashlib.sha256(f"{self.namespace}{stage}".encode()).hexdigest()
        prefix = layout.result_prefix(self.store.prefix, self.reference, stage, digest)
        folder = self.home / "made" / stage
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        uploaded = upload_tree(self.store, folder, f"{prefix}/artifacts/w1")
        by_path = {file.path: file for file in uploaded}
        made = [
            Artifact(
                stage=stage,
                name=name,
                uri=f"s3://{self.store.bucket}/{by_path[path].key}",
                size_bytes=by_path[path].size_bytes,
                sha256=by_path[path].sha256,
            )
            for name, path in artifacts.items()
        ]
        committed = Manifest(
            job=self.reference,
            stage=stage,
            attempt=1,
            digest=digest,
            inputs={},
            outputs={},
            files=uploaded,
            artifacts=made,
            figures={},
            started="2026-01-01T12:00:00+00:00",
            finished="2026-01-01T12:01:00+00:00",
        )
        manifest.commit(self.store, committed)
        return StageResult(digest=digest, manifest=layout.manifest_key(prefix), artifacts=made)

    def log(self, stage: str, attempt: int, *messages: str, when: datetime | None = None) -> None:
        """What an attempt leaves of its log."""
        stamp = (when or datetime.now(UTC) + timedelta(seconds=1)).isoformat(timespec="milliseconds")
        lines = [json.dumps({"time": stamp, "level": "info", "message": message}) for message in messages]
        below = layout.stage_prefix(self.store.prefix, self.reference, stage)
        writer = hashlib.sha256(messages[0].encode()).hexdigest()[:8]
        self.store.put_bytes(layout.log_key(below, attempt, writer), "\n".join(lines).encode())

    def run(self, command: str, *arguments: str) -> int:
        """The plugin, in the kubeconfig's own namespace; its exit code."""
        return main([command, *arguments, "--kubeconfig", str(self.kubeconfig)])


@pytest.fixture
def world(plane: ControlPlane, namespace: str, store_server: EmbeddedStore, home: Path) -> World:  # noqa: F811
    """Everything but the job."""
    store = Store(
        bucket=store_server._bucket,
        prefix=namespace,
        endpoint=store_server.endpoint,
        access_key=store_server.access_key,
        secret_key=store_server.secret_key,
    )
    return World(plane, namespace, store, store_server, home)


@pytest.fixture
def finished(world: World) -> World:
    """With a job that is complete: GGUF, report, checkpoints."""
    world.apply()
    made = world.result(
        "gguf",
        {"bot-Q8_0.gguf": GGUF, "Modelfile": b"FROM ./bot-Q8_0.gguf\n"},
        {"Q8_0": "bot-Q8_0.gguf", "Modelfile": "Modelfile"},
    )
    told = world.result(
        "report", {"index.html": b"<html>", "report.json": b'{"passed": true}'}, {"index.html": "index.html"}
    )
    done = {"state": StageState.COMPLETE, "attempt": 1, "completion_time": datetime.now(UTC)}
    stages = dict.fromkeys(NAMES, done) | {"gguf": {**done, "result": made}, "report": {**done, "result": told}}
    world.write("Complete", "Accepted", "Complete", **stages)
    return world


def test_get_shows_what_the_api_server_has(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each job as kubectl's columns, one in detail, with --json the resource; also before any status."""
    assert world.run("get") == 0
    assert "no FineTuneJob in the namespace" in capsys.readouterr().err
    world.apply()
    assert world.run("get") == 0
    assert "not seen by the operator yet" in capsys.readouterr().out
    point = Progress(step=3, total_steps=4, percent=75)
    started = datetime.now(UTC)
    world.write(
        "Running sft",
        "Accepted",
        sft={"state": StageState.RUNNING, "attempt": 1, "start_time": started, "progress": point},
    )
    assert world.run("get") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "STAGE", "PROGRESS", "ETA", "STATUS", "AGE"]
    assert row.startswith("bot ")
    assert "Running sft" in row
    assert world.run("get", "bot") == 0
    assert re.search(r"sft +Running +3/4", capsys.readouterr().out)
    assert world.run("get", "bot", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["metadata"]["uid"]) == ("FineTuneJob", world.reference.uid)
    assert shown["status"]["summary"] == "Running sft"
    assert "managedFields" not in shown["metadata"]


def test_an_unknown_job_is_answered_with_what_there_is(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Near names, another namespace that has it, or how to begin; each in one line and with exit code 1."""
    assert world.run("get", "bot") == 1
    assert "no job 'bot'" in (said := capsys.readouterr().err)
    assert said.startswith("kubectl finetune: ")
    name = f"bot-of-{world.namespace}"
    world.apply(name=name)
    assert world.run("watch", f"{name}s") == 1
    assert f"did you mean {name}?" in capsys.readouterr().err
    assert world.run("pull", name, "-n", "default") == 1
    assert f"-n {world.namespace}" in capsys.readouterr().err
    assert world.run("get", "bot", "--context", "nowhere") == 1
    assert "nowhere" in capsys.readouterr().err


def test_watch_follows_to_the_end(world: World) -> None:
    """Every state appears as the operator writes it, without asking again and again; Complete is exit code 0."""
    world.apply()
    command = [sys.executable, "-c", PLUGIN, "watch", "bot", "--kubeconfig", str(world.kubeconfig)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        try:
            lines = _lines(watching)
            world.write("Pending", "Accepted", sft={"state": StageState.RUNNING, "attempt": 1})
            assert "Running" in next(line for line in lines if " sft " in line)
            world.write(
                "Running",
                "Accepted",
                sft={"state": StageState.COMPLETE},
                merge={"state": StageState.RUNNING, "attempt": 1},
            )
            assert "Complete" in next(line for line in lines if " sft " in line)
            world.write("Complete", "Accepted", "Complete", merge={"state": StageState.COMPLETE})
            assert list(lines)[-1].endswith("bot: Complete")
            assert watching.wait(SECONDS) == 0
        finally:
            watching.kill()


def _lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    assert process.stdout is not None
    guard = threading.Timer(SECONDS, process.kill)
    guard.start()
    try:
        for line in process.stdout:
            yield line.rstrip("\n")
    finally:
        guard.cancel()


def test_watching_a_job_that_fails_or_goes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Failed is exit code 1 with the stage's words; a job that is deleted meanwhile is told as such."""
    world.apply()
    world.write(
        "Failed: BadData",
        "Failed",
        prepare={"state": StageState.FAILED, "reason": "BadData", "message": "row 3 is empty"},
    )
    assert world.run("watch", "bot") == 1
    assert "row 3 is empty" in capsys.readouterr().out
    world.write("Running", "Accepted")
    deletion = threading.Timer(1.0, lambda: world.kubectl("delete", "finetunejob", "bot"))
    deletion.start()
    assert world.run("watch", "bot") == 1
    deletion.join()
    assert "was deleted" in capsys.readouterr().err


def test_pull_brings_what_was_committed(finished: World, capsys: pytest.CaptureFixture[str]) -> None:
    """By the Secret's credentials, verified by sha256; what is here already is skipped, what is damaged comes again."""
    assert finished.run("pull", "bot", "--json") == 0
    files = {Path(f["path"]).name: f for f in json.loads(capsys.readouterr().out)["files"]}
    assert files.keys() == {"bot-Q8_0.gguf", "Modelfile"}
    assert Path("bot/bot-Q8_0.gguf").read_bytes() == GGUF
    assert files["bot-Q8_0.gguf"]["sha256"] == hashlib.sha256(GGUF).hexdigest()
    Path("bot/bot-Q8_0.gguf").write_bytes(GGUF[:-1] + b"x")
    assert finished.run("pull", "bot") == 0
    assert Path("bot/bot-Q8_0.gguf").read_bytes() == GGUF
    assert "1 of 2 were here already" in capsys.readouterr().err
    assert finished.run("pull", "bot", "Q4_K_M") == 64
    assert "no artifact 'Q4_K_M'" in capsys.readouterr().err


def test_report_and_checkpoints(finished: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The report's page and figures, and the checkpoints with step and loss, as of a job of this machine."""
    assert finished.run("report", "bot", "--no-open") == 0
    page = Path(capsys.readouterr().out.strip())
    assert page.read_bytes() == b"<html>"
    assert finished.run("report", "bot", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"passed": True}
    assert finished.run("checkpoints", "bot") == 0
    assert "bot has no checkpoint" in capsys.readouterr().err
    (tmp_path / "state").mkdir()
    (tmp_path / "state/adapter.bin").write_bytes(b"weights")
    below = layout.result_prefix(finished.store.prefix, finished.reference, "sft", "d" * 64)
    saving = Checkpoints(finished.store, below, "w1", keep=2)
    saving.save(2, tmp_path / "state", {"evalLoss": 0.5})
    assert saving.drain(SECONDS)
    saving.close()
    assert finished.run("checkpoints", "bot", "--json") == 0
    [found] = json.loads(capsys.readouterr().out)["items"]
    assert (found["stage"], found["step"], found["metrics"]) == ("sft", 2, {"evalLoss": 0.5})


def test_plan_holds_the_rules_of_the_cluster(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A source of this machine is refused with field and mend, all at once and without any cluster."""
    job = raw_job(*STAGES, model={"source": "file://model"}, storage={"bucket": "finetune"})
    job["spec"]["data"]["train"] = [{"source": "file://train.jsonl"}]
    job["metadata"] = {"name": "bot"}
    Path("bot.yaml").write_text(json.dumps(job))
    assert main(["plan", "bot.yaml", "--json"]) == 64
    wrong = {error["path"]: error["message"] for error in json.loads(capsys.readouterr().out)["errors"]}
    assert wrong.keys() == {"spec.model.source", "spec.data.train[0].source"}
    assert all("upload it" in message for message in wrong.values())
    job["spec"]["model"]["source"] = "s3://finetune/model"
    job["spec"]["data"]["train"] = [{"source": "s3://finetune/train.jsonl"}]
    Path("bot.yaml").write_text(json.dumps(job))
    assert main(["plan", "bot.yaml"]) == 0
    assert "bot: valid" in capsys.readouterr().out


def test_whoever_may_not_read_the_secret_is_told_both_ways(
    finished: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The viewer of jobs learns which Secret, and that the environment's keys serve as well; they do."""
    rights = ["--verb=get,list,watch", "--resource=finetunejobs.finetune.dev"]
    finished.kubectl("create", "role", "viewer", *rights)
    finished.kubectl("create", "rolebinding", "viewer", "--role=viewer", "--user=viewer")
    viewer = str(finished.plane.kubeconfig_for("viewer"))
    command = ["pull", "bot", "-n", finished.namespace, "--kubeconfig", viewer]
    assert main(command) == 64
    said = capsys.readouterr().err
    assert f"the Secret s3 in the namespace {finished.namespace}" in said
    assert "AWS_ACCESS_KEY_ID" in said
    assert "grant" in said
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of another store")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert main(command) == 64
    assert "those of your environment" in capsys.readouterr().err
    for name, value in finished.server.environment().items():
        monkeypatch.setenv(name, value)
    assert main(command) == 0
    assert Path("bot/bot-Q8_0.gguf").read_bytes() == GGUF


@pytest.fixture
def forwards(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Puts a kubectl on the PATH that only says that it forwards that port; the file has pid and arguments of each.

    A stand-in, since no node here runs a pod to forward to.
    """

    def make(port: int) -> Path:
        program, asked = world.home / "bin/kubectl", world.home / "asked"
        program.parent.mkdir(exist_ok=True)
        ready = f"Forwarding from 127.0.0.1:{port} -> 8333"
        program.write_text(f'#!/bin/sh\necho "$$ $*" >> {asked}\necho "{ready}"\nexec sleep 600\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return asked

    return make


INSIDE = "http://object-store.finetune-system.svc:8333"


def test_a_store_inside_the_cluster_is_reached_through_kubectl(
    world: World, forwards: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The service of the endpoint's name is forwarded, with the user's own kubeconfig, for as long as the command."""
    asked = forwards(urlsplit(world.server.endpoint).port or 0)
    world.apply(endpoint=INSIDE)
    made = world.result("gguf", {"bot-Q8_0.gguf": GGUF}, {"Q8_0": "bot-Q8_0.gguf"})
    world.write("Running", gguf={"state": StageState.COMPLETE, "attempt": 1, "result": made})
    assert world.run("pull", "bot") == 0, capsys.readouterr().err
    assert Path("bot/bot-Q8_0.gguf").read_bytes() == GGUF
    pid, *arguments = asked.read_text().split()
    assert arguments == [
        f"--kubeconfig={world.kubeconfig}",
        "--namespace=finetune-system",
        "port-forward",
        "--address=127.0.0.1",
        "service/object-store",
        ":8333",
    ]
    assert not Path(f"/proc/{pid}").exists()
    assert world.run("pull", "bot", "--store-endpoint", world.server.endpoint) == 0
    assert len(asked.read_text().splitlines()) == 1
    (world.home / "bin/kubectl").write_text(
        '#!/bin/sh\necho "error: services \\"object-store\\" not found" >&2\nexit 1\n'
    )
    assert world.run("pull", "bot") == 1
    assert 'services "object-store" not found; --store-endpoint' in capsys.readouterr().err


def test_the_forward_ends_with_a_command_that_is_told_to_stop(world: World, forwards: Callable[[int], Path]) -> None:
    """SIGTERM in the middle of waiting for the store leaves no kubectl behind."""
    world.apply(endpoint=INSIDE)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        asked = forwards(silent.getsockname()[1])
        command = [sys.executable, "-c", PLUGIN, "checkpoints", "bot", "--kubeconfig", str(world.kubeconfig)]
        with subprocess.Popen(command) as waiting:
            try:
                silent.settimeout(SECONDS)
                connection, _ = silent.accept()
                waiting.terminate()
                assert waiting.wait(SECONDS) == 143
                connection.close()
            finally:
                waiting.kill()
    assert not Path(f"/proc/{asked.read_text().split()[0]}").exists()


def test_suspend_and_resume_change_the_spec(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing else of the job is touched."""
    before = world.apply()["spec"]
    assert world.run("suspend", "bot") == 0
    spec = json.loads(world.kubectl("get", "ftj", "bot", "-o", "json"))["spec"]
    assert spec == {**before, "suspend": True}
    assert world.run("resume", "bot") == 0
    assert json.loads(world.kubectl("get", "ftj", "bot", "-o", "json"))["spec"] == before


def test_kubectl_finds_the_plugin_and_its_completion(world: World) -> None:
    """``kubectl finetune`` runs what is installed under the two names that pyproject.toml gives, and completes jobs."""
    world.apply()
    programs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    folder = world.home / "bin"
    folder.mkdir()
    for name in ("kubectl-finetune", "kubectl_complete-finetune"):
        module, _, function = programs[name].partition(":")
        code = f"import sys; from {module} import {function}; sys.exit({function}())"
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "KUBECONFIG": str(world.kubeconfig)}

    def kubectl(*arguments: str) -> list[str]:
        command = [str(binary("kubectl")), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert kubectl("finetune", "get", "-n", world.namespace)[1].startswith("bot ")
    assert kubectl("__complete", "finetune", "get", "b")[0] == "bot"
    assert kubectl("__complete", "finetune", "check")[0] == "checkpoints"


def test_logs_of_pods_that_are_gone_come_from_the_store(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Each attempt under its title; those of an earlier job of this name are not taken for this one's."""
    world.apply()
    over = {"state": StageState.COMPLETE, "completion_time": datetime.now(UTC)}
    world.write("Running", prepare={**over, "attempt": 1}, sft={"state": StageState.SUSPENDED, "attempt": 2})
    world.log("prepare", 1, "another job", when=datetime(2026, 1, 1, tzinfo=UTC))
    world.log("sft", 1, "first try")
    world.log("sft", 2, "second try", "done")
    assert world.run("logs", "bot") == 0
    lines = [re.sub(r"^\d\d:\d\d:\d\d INFO +", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "==> prepare-1: its pod is gone, and it left no log in the store <==",
        "==> sft-1 <==",
        "first try",
        "==> sft-2 <==",
        "second try",
        "done",
    ]
    assert world.run("logs", "bot", "sft", "--json") == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["message"] for entry in entries] == ["first try", "second try", "done"]
    assert world.run("logs", "bot", "sfd") == 1
    assert "no stage 'sfd' in bot; its stages: prepare, baseline, sft" in capsys.readouterr().err


class Kubelet:
    """Answers the API server's requests for logs, with what the test lets a container say."""

    def __init__(self, plane: ControlPlane) -> None:
        self.said: list[tuple[str, str]] = []
        """Whose, empty for every pod's, and what."""
        self.running = True
        self.over: set[str] = set()
        """Pods that say nothing more."""
        self.asked: list[dict[str, list[str]]] = []
        self.cut_after = 0
        """End the first answer in good order after so many lines, as a kubelet that is restarted does."""
        kubelet = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                pod = urlsplit(self.path).path.split("/")[-2]  # /containerLogs/NAMESPACE/POD/CONTAINER
                kubelet.asked.append(query)
                self.send_response(200)
                self.send_header("Content-Type", "text/plain")
                self.end_headers()
                cut = kubelet.cut_after if len(kubelet.asked) == 1 else 0
                sent = 0
                since = query.get("sinceTime", [""])[0][:19]
                while True:
                    over = not kubelet.running or pod in kubelet.over
                    for whose, line in kubelet.said[sent:]:
                        if line[:19] >= since and whose in ("", pod):
                            self.wfile.write(f"{line}\n".encode())
                            self.wfile.flush()
                        sent += 1
                        if sent == cut:
                            return
                    if over or "follow" not in query:
                        return
                    time.sleep(0.05)

            def log_message(self, *_: object) -> None:
                pass

        directory = plane.directory / "pki"
        pki.make_certificate(directory, "kubelet", "/O=system:nodes/CN=system:node:logs", "IP:127.0.0.1")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "kubelet.crt", directory / "kubelet.key")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def say(self, *messages: str, pod: str = "") -> None:
        """Lines of the container, each at its own nanosecond."""
        for message in messages:
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + f"{len(self.said):03}Z"
            self.said.append((pod, f"{stamp} {message}"))

    def close(self) -> None:
        """End it."""
        self.running = False
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def kubelet(world: World) -> Iterator[Kubelet]:
    """One for the node ``logs``."""
    kubelet = Kubelet(world.plane)
    world.kubectl("apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "Node", "metadata": {"name": "logs"}})
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet.port}},
    }
    world.kubectl("patch", "node", "logs", "--subresource=status", "-p", json.dumps({"status": status}))
    yield kubelet
    kubelet.close()
    world.kubectl("delete", "node", "logs")


def a_pod(world: World, stage: str, index: int = 0) -> Callable[[str], None]:
    """A stage's pod on that node; to be told whether its container is running or terminated."""
    labels = {"finetune.dev/job": "bot", "finetune.dev/stage": stage, "finetune.dev/attempt": "1"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"bot-{stage}-1" + f"-{index}" * (index > 0),
            "labels": {**labels, INDEX_LABEL: str(index)},
        },
        "spec": {"nodeName": "logs", "containers": [{"name": "stage", "image": "x"}], "restartPolicy": "Never"},
    }
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    world.kubectl("apply", "-f", "-", stdin=account)
    world.kubectl("create", "-f", "-", stdin=pod)

    def become(state: str) -> None:
        about = {"running": {"startedAt": _now()}, "terminated": {"exitCode": 0}}[state]
        container = {"name": "stage", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
        status = {
            "phase": {"running": "Running", "terminated": "Succeeded"}[state],
            "containerStatuses": [{**container, "state": {state: about}}],
        }
        name = pod["metadata"]["name"]  # type: ignore[index]
        world.kubectl("patch", "pod", str(name), "--subresource=status", "-p", json.dumps({"status": status}))

    return become


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_logs_follow_running_pods_to_the_end_of_the_job(world: World, kubelet: Kubelet) -> None:
    """Lines appear as they are written; a stream that breaks off is gone on with, no line twice and none lost."""
    world.apply()
    kubelet.cut_after = 2
    become = a_pod(world, "sft")
    command = [sys.executable, "-c", PLUGIN, "logs", "bot", "-f", "--kubeconfig", str(world.kubeconfig)]
    world.write("Pending", "Accepted", sft={"state": StageState.PENDING, "attempt": 1})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        try:
            lines = _lines(following)
            kubelet.say("one", "two", "three")
            become("running")
            world.write("Running", "Accepted", sft={"state": StageState.RUNNING})
            assert [next(lines) for _ in range(4)] == ["==> sft-1 <==", "one", "two", "three"]
            kubelet.say("four")
            assert next(lines) == "four"
            assert "sinceTime" in kubelet.asked[1]
            become("terminated")
            kubelet.running = False
            world.write(
                "Complete", "Complete", sft={"state": StageState.COMPLETE, "completion_time": datetime.now(UTC)}
            )
            assert list(lines) == []
            assert following.wait(SECONDS) == 0
        finally:
            following.kill()


def test_logs_follow_stages_that_run_beside_each_other(world: World, kubelet: Kubelet) -> None:
    """Each line as it is written, with its stage; the last one that is left needs none."""
    world.apply()
    become = {stage: a_pod(world, stage) for stage in ("sft", "merge")}
    command = [sys.executable, "-c", PLUGIN, "logs", "bot", "-f", "--kubeconfig", str(world.kubeconfig)]
    for tell in become.values():
        tell("running")
    world.write("Running", "Accepted", **{s: {"state": StageState.RUNNING, "attempt": 1} for s in become})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        try:
            lines = _lines(following)
            assert [next(lines), next(lines)] == ["==> sft-1 <==", "==> merge-1 <=="]
            for stage, words in (("sft", "one"), ("merge", "two"), ("sft", "three")):
                kubelet.say(words, pod=f"bot-{stage}-1")
                assert next(lines) == f"{stage}-1 | {words}"
            become["sft"]("terminated")
            kubelet.over.add("bot-sft-1")
            over = {"state": StageState.COMPLETE, "completion_time": datetime.now(UTC)}
            world.write("Running", "Accepted", sft=over)
            kubelet.say("four", pod="bot-merge-1")
            assert next(lines) in ("four", "merge-1 | four")  # whether the end of the other is known by then
            become["merge"]("terminated")
            kubelet.running = False
            world.write("Complete", "Complete", merge=over)
            assert list(lines) == []
            assert following.wait(SECONDS) == 0
        finally:
            following.kill()


def test_logs_of_another_node_are_asked_for_by_its_number(
    world: World, kubelet: Kubelet, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of stages that have so many; once its pod is gone nothing is left, and a number that none has is refused."""
    world.apply(nodes=2)
    for index in (0, 1):
        a_pod(world, "sft", index)("running")
    running, done = {"state": StageState.RUNNING, "attempt": 1}, {"state": StageState.COMPLETE, "attempt": 1}
    world.write("Running", "Accepted", prepare=done, sft=running)
    kubelet.say("of the first", pod="bot-sft-1")
    kubelet.say("of the second", pod="bot-sft-1-1")
    assert world.run("logs", "bot", "sft") == 0
    assert capsys.readouterr().out.splitlines() == ["==> sft-1 <==", "of the first"]
    assert world.run("logs", "bot", "--node", "1") == 0
    assert capsys.readouterr().out.splitlines() == ["==> sft-1, node 1 <==", "of the second"]
    assert world.run("logs", "bot", "--node", "2") == 1
    assert "--node 2: bot runs on 2 at most, counted from 0" in capsys.readouterr().err
    assert world.run("logs", "bot", "prepare", "--node", "1") == 1
    assert "--node 1: prepare runs on 1 at most, counted from 0" in capsys.readouterr().err
    world.write("Running", "Accepted", sft=done)
    world.log("sft", 1, "of the first")
    world.kubectl("delete", "pod", "bot-sft-1-1", "--force")
    assert world.run("logs", "bot", "sft", "--node", "1") == 0
    said = "==> sft-1, node 1: its pod is gone, and the store has no log but the first node's <=="
    assert capsys.readouterr().out.splitlines() == [said]


@pytest.mark.parametrize("command", [["get"], ["get", "bot"], ["logs", "bot"], ["suspend", "bot"]])
def test_a_cluster_without_the_operator_is_told_apart(
    world: World, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It knows no FineTuneJobs of our version: what to install, instead of a 404."""
    monkeypatch.setattr(cluster, "FINETUNEJOBS", Resource("finetune.dev", "v9", "finetunejobs"))
    assert world.run(*command) == 1
    said = capsys.readouterr().err
    assert "this cluster does not know FineTuneJobs of finetune.dev/v1alpha1: install the operator's chart" in said
