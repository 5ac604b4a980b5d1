"""What the commands do with a job, wherever it runs; the shells round them find it (``app.py``, ``plugin.py``)."""

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import typer

from finetune_api.types import FineTuneJob
from finetune_cli import export as exporting
from finetune_cli import objects, planning, results, words
from finetune_cli import pull as pulling
from finetune_cli.display import view
from finetune_cli.errors import COMPLETE, FAILED, INVALID, CommandError
from finetune_cli.job import Job, LogLine
from finetune_cli.shell import print_json
from finetune_operator.plan.status import holds


def plan(job: FineTuneJob, planned: planning.Preview, *, as_json: bool) -> None:
    """Show what each stage needs."""
    if as_json:
        print_json(planning.as_json(planned))
    else:
        print(planning.as_text(job, planned))


def get(job: Job, *, as_json: bool) -> None:
    """One job: its stages and what it has made."""
    if as_json:
        print_json(job.resource())
        return
    status = job.status()
    now = datetime.now(UTC)
    parts = [
        f"{job.name}: {status.summary}",
        words.table(words.STAGE_COLUMNS, [words.stage_row(s, now) for s in status.stages]),
    ]
    parts += [f"{s.name}: {s.message}" for s in status.stages if s.message and not s.state.done]
    if scores := words.scores(status):
        parts.append(f"Scores on the locked test rows, base -> tuned:\n{scores}")
    if status.artifacts:
        parts.append(words.artifacts_table(status))
    print("\n\n".join(parts))


def get_all(jobs: Sequence[Job], *, none: str, as_json: bool) -> None:
    """The columns of ``kubectl get ftj``; ``none``: what to say if there is no job."""
    if as_json:
        print_json({"items": [job.resource() for job in jobs]})
        return
    if not jobs:
        print(none, file=sys.stderr)
        return
    now = datetime.now(UTC)
    rows = []
    for job in jobs:
        status = job.status()
        since = job.since()
        age = words.duration((now - since).total_seconds()) if since is not None else ""
        rows.append([job.name, status.stage, status.progress, status.eta, status.summary, age])
    print(words.table(["name", "stage", "progress", "eta", "status", "age"], rows))


def watch(job: Job) -> int:
    """Show the job until nothing changes any more; the exit code tells how it ended."""
    with view(sys.stdout, job.name) as display:
        for status in job.updates():
            display.show(status)
        display.say(f"{job.name}: {status.summary}")
    return COMPLETE if holds(status, "Complete") else FAILED


def logs(lines: Iterable[LogLine], *, follow: bool, as_json: bool) -> None:
    """Print what ``log_lines`` of a job gives; as JSON only our own."""
    for line in lines:
        if not as_json:
            print(f"{line.source} | " if line.source else "", words.log_line(line.text), sep="", flush=follow)
        elif line.text.startswith("{"):
            print(line.text, flush=follow)


def pull(job: Job, artifacts: Sequence[str], output: Path | None, *, as_json: bool) -> None:
    """Fetch results, verified."""
    into = output or Path(job.name)
    with pulling.store_of(job) as store:
        wanted = results.select(job.definition().spec, pulling.committed(store, job.status()), artifacts)
        paths, skipped = pulling.fetch(store, wanted, into)
    if as_json:
        print_json(
            {
                "files": [
                    {"path": str(p), "sha256": w.file.sha256, "sizeBytes": w.file.size_bytes}
                    for p, w in zip(paths, wanted, strict=True)
                ]
            }
        )
        return
    for path, item in zip(paths, wanted, strict=True):
        print(f"{path}  {words.size(item.file.size_bytes)}")
    if skipped:
        print(f"{skipped} of {len(paths)} were here already", file=sys.stderr)


def export_of(
    model: str, job: Job | None, gguf: Sequence[str], bnb: Sequence[str], *, safetensors: bool, data: str, name: str
) -> exporting.Export:
    """How to make other files of a job's model, or where ``job`` is None of the source ``model``."""
    wish = exporting.Wish(_listed(gguf), _listed(bnb), safetensors)
    if job is None:
        return exporting.of_model(model, exporting.source_of(data), wish, name)
    if data:
        raise CommandError("--data is for a model without a job: a job's rows are its own", INVALID)
    wish.check()
    with pulling.store_of(job) as store:
        return exporting.of_job(job.definition(), pulling.committed(store, job.status()), wish, name)


def _listed(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in value.split(",") if part]


def chat_files(model: str, adapter: str, kind: str, job: Job | None) -> tuple[Path, Path | None]:
    """The GGUF to load and the adapter to lay over it. ``job``: None for a model that is a file."""
    if adapter and not adapter.endswith(".gguf"):
        if job is None:
            raise CommandError(
                f"{adapter} is no .gguf; a stage's adapter goes with its job: chat NAME --adapter STAGE", INVALID
            )
        return pulling.adapter_over_base(job, adapter, kind)
    path = Path(model) if job is None else pulling.gguf(job, kind)
    return path, Path(adapter) if adapter else None


def chat(
    path: Path,
    prompt: str,
    *,
    adapter: Path | None,
    system: str,
    max_tokens: int,
    temperature: float,
    as_json: bool,
) -> None:
    """Talk to a GGUF."""
    from finetune_cli import chat as chatting

    conversation = chatting.Chat(path, adapter=adapter, system=system, max_tokens=max_tokens, temperature=temperature)
    if not prompt and as_json:
        raise typer.BadParameter("--json needs a PROMPT")
    if not prompt:
        chatting.interactive(conversation)
    elif as_json:
        print_json({"model": str(path), "prompt": prompt, "answer": "".join(conversation.ask(prompt))})
    else:
        for piece in conversation.ask(prompt):
            print(piece, end="", flush=True)
        print()


def report(job: Job, *, show: bool, as_json: bool) -> None:
    """Fetch the report, print its path and open it."""
    page, data = pulling.report(job)
    if as_json:
        print(data.read_text(encoding="utf-8"))
        return
    print(page)
    if show and sys.stdout.isatty() and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        import webbrowser

        webbrowser.open(page.as_uri())


def checkpoints(job: Job, *, as_json: bool) -> None:
    """List checkpoints."""
    with pulling.store_of(job) as store:
        found = objects.checkpoints(store, job.definition())
    if as_json:
        print_json(
            {
                "items": [
                    {"stage": s, "digest": d, "step": c.step, "metrics": c.metrics, "sizeBytes": c.size_bytes}
                    for s, d, c in found
                ]
            }
        )
    elif found:
        rows = [
            [
                s,
                str(c.step),
                f"{c.metrics['evalLoss']:.4f}" if "evalLoss" in c.metrics else "",
                words.size(c.size_bytes),
                d,
            ]
            for s, d, c in found
        ]
        print(words.table(["stage", "step", "eval loss", "size", "result"], rows))
    else:
        print(f"{job.name} has no checkpoint", file=sys.stderr)
