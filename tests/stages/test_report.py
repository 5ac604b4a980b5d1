import hashlib
import json
from datetime import datetime

from tests.stages.finished_run import LORA, MERGE, FinishedRun, RunMaker

from finetune_jobs.evaluation.answers import read
from finetune_jobs.evaluation.page import render
from finetune_jobs.evaluation.report import Evidence, build


def test_a_failed_gate_is_published_not_raised(finished: FinishedRun) -> None:
    """The report is committed all the same; its figures carry the verdict and the names."""
    figures = finished.manifests["report"].figures
    assert figures["gatesPassed"] == 0
    assert "minScore.exactMatch of merge" in str(figures["gatesFailed"])
    assert "minScore.exactMatch of gguf/Q8_0" in str(figures["gatesFailed"])
    gates = finished.json("report", "evidence/gates.json")
    assert gates["gatesFailed"] == finished.json("report", "report.json")["gatesFailed"]
    assert all(row["passed"] for row in gates["lab"]), gates["lab"]


def test_the_evidence_folder_has_all_that_the_lab_asks_for(finished: FinishedRun) -> None:
    """One folder: environment, data card, baseline answers, training logs, results, failures, rollback, gates, page."""
    folder = finished.files("report") / "evidence"
    expected = {
        "report.json",
        "index.html",
        "environment.json",
        "gates.json",
        "rollback.md",
        "scores.json",
        "datacard.json",
        "datacard.txt",
        "base.json",
        "logs/sft.training.json",
        "logs/dpo.training.json",
        "logs/merge.merge.json",
        "logs/gguf.quantize.json",
        *(f"answers/{t}/{r}.jsonl" for t in ("base", "merge", "gguf/Q8_0") for r in ("test", "general", "refusals")),
        *(f"diffs/{t}.{kind}" for t in ("merge", "gguf/Q8_0") for kind in ("txt", "jsonl")),
    }
    assert expected <= {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for row in report["lab"]:
        assert all((folder / file).is_file() for file in row["files"]), row
    assert (folder / "logs/sft.training.json").read_bytes() == (finished.files("sft") / "training.json").read_bytes()
    assert set(json.loads((folder / "environment.json").read_text())) >= {
        "prepare",
        "baseline",
        "sft",
        "dpo",
        "merge",
        "gguf",
        "evaluate",
        "report",
    }


def test_the_report_repeats_the_stages_own_figures(finished: FinishedRun) -> None:
    """Scores, digests, times, data and artifacts are those of the committed results, none computed anew."""
    report = finished.json("report", "report.json")
    assert report["scores"] == finished.json("evaluate", "scores.json")["scores"]
    assert [s["name"] for s in report["stages"]] == ["prepare", "baseline", "sft", "dpo", "merge", "gguf", "evaluate"]
    for stage in report["stages"]:
        made = finished.manifests[stage["name"]]
        assert stage["digest"] == made.digest
        assert (stage["seconds"], stage["peakMemoryBytes"]) == (
            made.figures["seconds"],
            made.figures["peakMemoryBytes"],
        )
        held = (datetime.fromisoformat(made.finished) - datetime.fromisoformat(made.started)).total_seconds()
        # One machine without a GPU; the manifest's times are whole seconds.
        assert stage["deviceHours"] == max(stage["seconds"], held) / 3600
    prepared = finished.files("prepare")
    for path, digest in report["data"]["sha256"].items():
        assert hashlib.sha256((prepared / path).read_bytes()).hexdigest() == digest
    assert "data/default/test.jsonl" in report["data"]["sha256"]
    gguf = report["ggufs"]["gguf/Q8_0"]
    log = finished.json("gguf", "quantize.json")["types"]["Q8_0"]
    path = finished.files("gguf") / gguf["file"]
    assert (gguf["kl"], gguf["bitsPerWeight"]) == (log["kl"], log["bitsPerWeight"])
    assert (gguf["sizeBytes"], gguf["sha256"]) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert {a["name"] for a in report["artifacts"]} >= {"Q8_0", "Modelfile", "datacard.json"}
    assert report["training"]["sft"] == finished.json("sft", "training.json")
    assert report["preference"]["dpo"]["pairs"] >= 1
    assert report["seed"] == 42
    assert all(len(rows) >= 3 for rows in report["failures"].values())


def test_rollback_commands_name_what_was_committed(finished: FinishedRun) -> None:
    """Each way back is a stage and an output that exist, with the digest of the committed content."""
    report = finished.json("report", "report.json")
    commands = [way["command"] for way in report["rollback"]]
    assert commands == [
        f"finetune pull tiny {what} -o rollback"
        for what in ("merge/model", "dpo/adapter", "sft/adapter", "prepare/model")
    ]
    for way, (stage, output) in zip(
        report["rollback"],
        [("merge", "model"), ("dpo", "adapter"), ("sft", "adapter"), ("prepare", "model")],
        strict=True,
    ):
        assert way["digest"] == finished.manifests[stage].outputs[output]
    note = (finished.files("report") / "evidence/rollback.md").read_text(encoding="utf-8")
    assert all(command in note for command in commands)


def test_the_same_results_make_the_same_report(start_run: RunMaker) -> None:
    """Made again from the same results, bytes and all: nothing in it depends on when or where it was written."""
    run = start_run([LORA, MERGE], evaluation={"maxRows": 2}).run_all()
    names = list(run.manifests)[:-1]
    logs = {n: {p.name: json.loads(p.read_text()) for p in sorted(run.files(n).glob("*.json"))} for n in names}
    answers = {t: read(run.files("evaluate") / "answers" / t) for t in ("base", "merge")}
    job = run.manifests["report"].job
    again = build(Evidence(job, run.spec, {n: run.manifests[n] for n in names}, logs, answers))
    out = run.files("report")
    assert again == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert render(again, evidence="evidence/") == (out / "index.html").read_bytes().decode()
