"""Messages, JSON and exit codes of the command, on a home without any finished job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_cli.app import main
from finetune_cli.ledger import JobLedger
from finetune_cli.look import log_lines

YAML = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: bot}
spec:
  model: {source: file://model}
  data: {train: [{source: file://train.jsonl}]}
  storage: {bucket: finetune}
  pipeline:
  - {name: sft, sft: {lora: {r: 8}}}
  - {name: merge, merge: {}}
  - {name: gguf, quantize: {gguf: [Q8_0]}}
"""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a valid job, a model's configuration and an empty home."""
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model/model.safetensors").touch()
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "bot.yaml").write_text(YAML)
    return tmp_path


def test_help_imports_nothing_heavy() -> None:
    """Help needs none of the libraries that take long to load."""
    code = "import sys\nfrom finetune_cli.app import main\nmain(['--help'])\nprint(*sys.modules)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in asked.stdout.splitlines()[-1].split()}
    assert "typer" in loaded
    assert not loaded & {"boto3", "botocore", "torch", "transformers", "pydantic", "rich", "yaml", "numpy", "llama_cpp"}


@pytest.mark.parametrize(
    "command", ["run", "plan", "get", "watch", "logs", "pull", "export", "chat", "report", "checkpoints", "delete"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence that is not cut off in the overview."""
    assert main([command, "--help"]) == 0
    assert main(["--help"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  {command} "))
    assert line.endswith(".")
    assert not line.endswith("...")


def test_plan_shows_every_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Derived stages too, with parameters, memory, disk, what is read and written."""
    assert main(["plan", "bot.yaml"]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    stages = ["prepare", "baseline", "sft", "merge", "gguf", "evaluate", "report"]
    assert [name for name in lines if name in stages] == stages
    assert "17,408" in lines["sft"]
    assert "base" in lines["sft"]
    assert "sft/adapter" in lines["merge"]
    assert "Q8_0, Modelfile" in lines["gguf"]


def test_plan_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same in JSON, and nothing else on stdout."""
    assert main(["plan", "bot.yaml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["valid"]
    sft = plan["stages"][2]
    assert sft["trainableParameters"] == 2 * 8 * (4 * 128 + 3 * 192)
    assert sft["memoryBytes"] > 4 * plan["parameters"]
    assert sft["diskBytes"] == 4 * sft["trainableParameters"]
    assert not any(stage["reuse"] for stage in plan["stages"])


def test_plan_shows_several_adapters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which ones a merge reads, one from a folder with ``prepare``; all of them in memory beside two tensors. A folder
    without one is a mistake.
    """
    adapters = "adapters: [{stage: sft}, {stage: other}, {uri: 'file://brought'}], combination: svd"
    stages = "- {name: other, from: base, sft: {lora: {r: 4}}}\n  - {name: merge, merge: {BLOCK}}".replace(
        "BLOCK", adapters
    )
    text = YAML.replace("- {name: merge, merge: {}}", stages).replace("[Q8_0]", "[Q8_0], loraGGUF: true")
    (folder / "bot.yaml").write_text(text)
    assert main(["plan", "bot.yaml"]) == 64
    assert "merge.adapters[2].uri: no such file or directory: " in capsys.readouterr().err
    (folder / "brought").mkdir()
    assert main(["plan", "bot.yaml"]) == 64
    assert "merge.adapters[2].uri: " in (told := capsys.readouterr().err)
    assert "brought holds no adapter_config.json, so it is no adapter of PEFT's" in told
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "brought" / name).write_text("{}")
    assert main(["plan", "bot.yaml", "--json"]) == 0
    stages_of = {stage["name"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert f"file://{folder / 'brought'}" in stages_of["prepare"]["reads"]
    assert stages_of["merge"]["reads"] == ["base", "sft/adapter", "other/adapter", "rows of eval and test"]
    assert stages_of["merge"]["writes"] == ["model", "adapter"]
    trained = [stages_of[name]["trainableParameters"] for name in ("sft", "other")]
    largest = 64 * 128  # of the MLP; its vocabulary is smaller
    assert stages_of["merge"]["memoryBytes"] == 2 * 4 * largest + 2 * 4 * sum(trained) + 2**30
    assert stages_of["gguf"]["writes"] == ["Q8_0", "LoRA-sft", "LoRA-other", "Modelfile"]


def test_plan_without_the_models_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that cannot be reached now is no mistake: the plan says what it does not know, and why."""
    (folder / "bot.yaml").write_text(YAML.replace("file://model", "hf://meta-llama/Meta-Llama-3-8B-Instruct"))
    assert main(["plan", "bot.yaml"]) == 0
    assert "sizes are not known: the hub does not give meta-llama/" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "out"), [([], "err"), (["--json"], "out")], ids=["words", "JSON"])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_every_mistake_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, option: list[str], out: str
) -> None:
    """Exit code 64, and each mistake with its field: of the schema, of the rules; nothing runs."""
    bad = YAML.replace("r: 8", "r: 0").replace("name: bot", "name: Bot").replace("bucket: finetune", "bukket: finetune")
    (folder / "bot.yaml").write_text(bad)
    assert main([command, "bot.yaml", *option]) == 64
    text = getattr(capsys.readouterr(), out)
    for field in ("metadata.name", "spec.pipeline[0].sft.lora.r", "spec.storage.bukket", "spec.storage.bucket"):
        assert field in text
    if option:
        assert json.loads(text)["valid"] is False
    assert not (folder / "home").exists()


def test_a_target_module_that_the_model_lacks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known from config.json alone, so plan says it before anything is downloaded."""
    (folder / "bot.yaml").write_text(YAML.replace("r: 8", "targetModules: [q_proj, c_attn]"))
    assert main(["plan", "bot.yaml"]) == 64
    assert "spec.pipeline[0].sft.lora.targetModules: the model has no linear layer c_attn" in capsys.readouterr().err


def test_a_type_that_the_model_cannot_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known from config.json alone, too."""
    (folder / "bot.yaml").write_text(YAML.replace("Q8_0", "Q1_0"))
    assert main(["plan", "bot.yaml"]) == 64
    assert "quantize.gguf[0]: Q1_0 needs rows that are a multiple of 128" in capsys.readouterr().err


def test_files_that_cannot_serve_are_told_beside_the_other_mistakes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field that is wrong hides neither a missing file nor one of the wrong kind."""
    (folder / "bot.yaml").write_text(YAML.replace("r: 8", "r: 0").replace("file://train.jsonl", "file://gone.jsonl"))
    (folder / "model/model.safetensors").unlink()
    assert main(["plan", "bot.yaml", "--json"]) == 64
    assert [error["path"] for error in json.loads(capsys.readouterr().out)["errors"]] == [
        "spec.pipeline[0].sft.lora.r",
        "spec.model.source",
        "spec.data.train[0].source",
    ]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("file://train.jsonl}", "spec.model.source: train.jsonl is one file but no .gguf"),
        ("file://empty}", "spec.model.source: "),
        ("file://cut.gguf}", "spec.model.source: "),
        (f"file://{'x' * 300}}}", "File name too long"),
        ("file://loop}", "no such file or directory"),
        (
            "file://model, chatTemplate: '{% for m in messages %}'}",
            "spec.model.chatTemplate: is not valid Jinja: line 1: ",
        ),
    ],
    ids=["a text", "an empty folder", "half a GGUF", "a long name", "a loop of links", "half a template"],
)
def test_what_cannot_be_a_base_model(
    folder: Path, capsys: pytest.CaptureFixture[str], written: str, words: str
) -> None:
    """Told by plan with the field and the mend, in the words that prepare would use."""
    (folder / "empty").mkdir()
    (folder / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (folder / "loop").symlink_to("loop")
    assert "{source: file://model}" in YAML
    (folder / "bot.yaml").write_text(YAML.replace("{source: file://model}", f"{{source: {written}"))
    assert main(["plan", "bot.yaml"]) == 64
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("name", "words"), [("empty/", "holds no .jsonl"), ("rows", "is not a known kind of file")])
def test_what_cannot_be_rows(folder: Path, capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    """A folder without a file of rows, a file whose name does not say what it holds."""
    (folder / "empty").mkdir()
    (folder / "rows").touch()
    (folder / "bot.yaml").write_text(YAML.replace("file://train.jsonl", f"file://{name}"))
    assert main(["plan", "bot.yaml"]) == 64
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "nothing.yaml"], 64, "cannot read nothing.yaml"),
        (["get", "bot"], 1, "no job 'bot' in the namespace default"),
        (["pull", "bot"], 1, "finetune run FILE"),
        (["run", "bot.yaml", "--store-endpoint", "localhost:9000"], 64, "--store-endpoint: must be a URL"),
        (["chat", "missing.gguf", "hello"], 64, "cannot read missing.gguf"),
        (["delete", "bot", "--yes"], 1, "no job 'bot'"),
        (["gte"], 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_friendly_errors(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    """What went wrong and what to do, on stderr, without a traceback."""
    assert main(arguments) == code
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_namespace_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It fills in what the file leaves out, and is a mistake where the file says otherwise."""
    assert main(["plan", "bot.yaml", "-n", "team"]) == 0
    (folder / "bot.yaml").write_text(YAML.replace("name: bot", "name: bot, namespace: other"))
    assert main(["plan", "bot.yaml", "-n", "team"]) == 64
    assert "metadata.namespace: is other" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_only_when_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen error is one line and exit code 70; --debug lets it through."""

    def broken(*arguments: object) -> None:
        raise RuntimeError("something unforeseen")

    monkeypatch.setattr("finetune_cli.ledger.all_jobs", broken)
    monkeypatch.delenv("FINETUNE_DEBUG", raising=False)
    assert main(["get"]) == 70
    with pytest.raises(RuntimeError):
        main(["--debug", "get"])
    os.environ.pop("FINETUNE_DEBUG")


def test_logs_are_for_people_or_for_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our JSON lines as text, others as they are; with --json only ours, unchanged. An unknown stage is told."""
    run_once(folder)
    entry = json.dumps({"time": "2026-01-01T10:11:12.123+00:00", "level": "info", "message": "step 3"})
    logs = JobLedger(folder / "home", "default", "bot").directory / "logs"
    logs.mkdir()
    (logs / "sft-1.log").write_text(f"{entry}\nlibrary noise\n")
    assert main(["logs", "bot", "sft"]) == 0
    assert capsys.readouterr().out.splitlines() == ["==> sft-1 <==", "10:11:12 INFO    step 3", "library noise"]
    assert main(["logs", "bot", "--json"]) == 0
    assert capsys.readouterr().out.splitlines() == [entry]
    assert main(["logs", "bot", "sfd"]) == 1
    assert "no stage 'sfd'" in capsys.readouterr().err


def test_following_logs_ends_with_the_run(folder: Path) -> None:
    """Lines appear whole as they are written, attempts after each other, and the end of the run is the end."""
    run_once(folder)
    ledger = JobLedger(folder / "home", "default", "bot")
    logs = ledger.directory / "logs"
    logs.mkdir()
    with ledger.locked():
        (logs / "sft-1.log").write_text("one\nhal")
        lines = log_lines(ledger, "", follow=True)
        assert [next(lines), next(lines)] == ["==> sft-1 <==", "one"]
        with (logs / "sft-1.log").open("a") as file:
            file.write("f\n")
        assert next(lines) == "half"
        (logs / "merge-1.log").write_text("two\n")
        assert [next(lines), next(lines)] == ["==> merge-1 <==", "two"]
    assert list(lines) == []


def run_once(folder: Path) -> None:
    """Record the job as a run does."""
    from finetune_cli.runs import load_job

    ledger = JobLedger(folder / "home", "default", "bot")
    with ledger.locked():
        ledger.adopt(load_job(folder / "bot.yaml"), folder / "bot.yaml")
