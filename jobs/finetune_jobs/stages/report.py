"""``report``: everything that the stages left, as one evidence folder, one ``report.json`` and one page."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api.pipeline import order, targets
from finetune_api.types import BASE
from finetune_jobs.evaluation import answers
from finetune_jobs.evaluation.page import render
from finetune_jobs.evaluation.report import Evidence, build
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.environment import record

_log = logging.getLogger("finetune.report")
_LOG_BYTES = 64 << 20
"""Larger JSON files at the top of a result are no logs."""


def run(ctx: Context) -> Outcome:
    """Gather, judge, write. A failed gate never keeps the report back: the figure ``gatesPassed`` says it."""
    evidence = _gather(ctx)
    ctx.stop.check()
    report = build(evidence)
    out = ctx.workspace / "result"
    folder = out / "evidence"
    folder.mkdir(parents=True)
    _copy(ctx, folder)
    environments = report["environments"] | {"report": record()}
    _write(folder / "environment.json", environments)
    _write(folder / "gates.json", {key: report[key] for key in ("gatesPassed", "gatesFailed", "gates", "lab")})
    (folder / "rollback.md").write_text(_rollback(report), encoding="utf-8")
    for directory, below in ((folder, ""), (out, "evidence/")):
        _write(directory / "report.json", report)
        (directory / "index.html").write_text(render(report, evidence=below), encoding="utf-8")
    _log.info("gates failed: %s", ", ".join(report["gatesFailed"]) or "none")
    main = report["scores"][report["mainTarget"]]
    return Outcome(
        out,
        {"report": "report.json", "html": "index.html", "evidence": "evidence"},
        artifacts={"report.json": "report.json", "index.html": "index.html"},
        figures={
            "gatesPassed": int(report["gatesPassed"]),
            "gatesFailed": ", ".join(report["gatesFailed"])[:500],
            **{name: main[name] for name in (*report["settings"]["metrics"], "general", "refusals") if name in main},
        },
    )


def _gather(ctx: Context) -> Evidence:
    names = [name for name in order(ctx.spec) if name in ctx.manifests]
    logs: dict[str, dict[str, Any]] = {}
    for name in names:
        tops = [f for f in ctx.manifests[name].files if "/" not in f.path and f.path.endswith(".json")]
        logs[name] = {
            f.path: json.loads(ctx.fetch(name, f.path).read_text(encoding="utf-8"))
            for f in tops
            if f.size_bytes <= _LOG_BYTES
        }
    said = ctx.fetch("evaluate", "answers")
    scored = [BASE, *(t.name for t in targets(ctx.spec))]
    return Evidence(
        job=ctx.run.job,
        spec=ctx.spec,
        manifests={name: ctx.manifests[name] for name in names},
        logs=logs,
        answers={name: answers.read(said / name) for name in scored},
    )


def _copy(ctx: Context, folder: Path) -> None:
    """What the stages left for people, as it is."""
    shutil.copytree(ctx.fetch("evaluate", "answers"), folder / "answers")
    shutil.copytree(ctx.fetch("evaluate", "diffs"), folder / "diffs")
    shutil.copy(ctx.fetch("evaluate", "scores.json"), folder / "scores.json")
    for name, manifest in ctx.manifests.items():
        for path in (f.path for f in manifest.files):
            if path in ("training.json", "merge.json", "quantize.json"):
                (folder / "logs").mkdir(exist_ok=True)
                shutil.copy(ctx.fetch(name, path), folder / "logs" / f"{name}.{path}")
            elif name == "prepare" and path in ("datacard.json", "datacard.txt", "base.json", "checks.json"):
                shutil.copy(ctx.fetch(name, path), folder / path)


def _rollback(report: Mapping[str, Any]) -> str:
    lines = [
        f"# Rollback of {report['job']['name']}",
        "",
        "Nearest first. Each command fetches the files and checks their sha256; nothing of the job is overwritten.",
        "",
    ]
    for number, way in enumerate(report["rollback"], 1):
        on = f" (on the {way['on']})" if way["on"] else ""
        lines += [f"{number}. {way['to']}{on}, digest {way['digest']}", "", f"       {way['command']}", ""]
    return "\n".join(lines)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
