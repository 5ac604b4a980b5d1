"""What people read: durations, sizes, tables, log lines."""

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune_api.stage import StageResult
from finetune_api.status import JobStatus, MetricValue, Progress, StageState, StageStatus
from finetune_api.types import FineTuneJob
from finetune_cli import runs, words
from finetune_cli.display import PlainView, view

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7440, "2h04m"), (266400, "3d02h"), (-1, "0s")],
)
def test_duration(seconds: float, text: str) -> None:
    """Two units at most, rounded to what can be told apart."""
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (90_000_000, "85.8 MiB"), (5 * 2**40, "5120.0 GiB")],
)
def test_size(count: int, text: str) -> None:
    """Powers of 1024, GiB at most."""
    assert words.size(count) == text


def test_table_has_aligned_columns() -> None:
    """Each column begins where its header does, and lines have no blanks at their end."""
    lines = words.table(["name", "state"], [["a", "Running"], ["longer", ""]]).splitlines()
    assert lines == ["NAME     STATE", "a        Running", "longer"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            json.dumps({"time": "2026-01-01T10:11:12.123+00:00", "level": "info", "message": "step 3"}),
            "10:11:12 INFO    step 3",
        ),
        (
            json.dumps(
                {"time": "2026-01-01T10:11:12.123+00:00", "level": "error", "message": "no", "trace": "Trace\n  x"}
            ),
            "10:11:12 ERROR   no\nTrace\n  x",
        ),
        ("llama.cpp says something", "llama.cpp says something"),
        ('{"half', '{"half'),
        ('{"other": 1}', '{"other": 1}'),
        ("{}", "{}"),
    ],
    ids=["ours", "trace", "a library's", "cut", "another's JSON", "empty"],
)
def test_log_line(line: str, text: str) -> None:
    """Our JSON becomes a line for people, anything else stays as it is."""
    assert words.log_line(line) == text


def status(*stages: StageStatus) -> JobStatus:
    """With these stages."""
    return JobStatus(stages=list(stages))


def result(**figures: float) -> StageResult:
    """With these figures."""
    return StageResult(digest="d", manifest="m", figures=dict(figures))


def test_stage_row_of_a_running_stage() -> None:
    """Step, loss, ETA and elapsed time come from its progress and start."""
    progress = Progress(step=3, total_steps=12, eta_seconds=90, metrics=[MetricValue(name="loss", value="1.31")])
    start = NOW - timedelta(seconds=61)
    row = words.stage_row(StageStatus(name="sft", state=StageState.RUNNING, start_time=start, progress=progress), NOW)
    assert row == ["sft", "Running", "3/12", "1.31", "1m30s", "1m01s", ""]


def test_timings_leave_out_what_was_reused() -> None:
    """The sum counts what this job computed, not what was taken over."""
    done = StageStatus(name="sft", state=StageState.COMPLETE, attempt=2, running_seconds=61.5)
    done = done.model_copy(update={"result": result(cpuSeconds=100.25, peakMemoryBytes=3 * 2**30)})
    taken = StageStatus(name="prepare", state=StageState.REUSED, result=result(seconds=5, cpuSeconds=9))
    lines = words.timings_table(status(taken, done)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["prepare", "reused"],
        ["sft", "61.5", "100.2", "3.0", "GiB", "2"],
        ["sum", "61.5", "100.2"],
    ]


def test_scores_compare_base_and_tuned() -> None:
    """Figures that both stages have, but not what they took; nothing before both are there."""
    base = StageStatus(name="baseline", state=StageState.COMPLETE, result=result(exactMatch=0.0, seconds=3))
    tuned = StageStatus(name="evaluate", state=StageState.COMPLETE, result=result(exactMatch=0.95, seconds=9, new=1))
    assert words.scores(status(base, tuned)).split() == ["exactMatch", "0.0", "->", "0.95"]
    assert words.scores(status(base)) == ""


def test_plain_view_writes_a_line_per_change() -> None:
    """The same status twice is one line; progress alone is not written again within 15 seconds; nothing is coloured."""
    out = io.StringIO()
    plain = view(out, "tiny")
    assert isinstance(plain, PlainView)
    running = StageStatus(name="sft", state=StageState.RUNNING, start_time=NOW)
    waiting = StageStatus(name="merge")
    with plain:
        plain.show(status(running, waiting))
        plain.show(status(running, waiting))
        for step in range(1, 4):
            progress = Progress(step=step, total_steps=3)
            plain.show(status(running.model_copy(update={"progress": progress}), waiting))
        failed = running.model_copy(update={"state": StageState.FAILED, "reason": "BadData", "message": "line 3 of x"})
        plain.show(status(failed, waiting))
    lines = [line[9:].split() for line in out.getvalue().splitlines()]
    assert lines == [
        ["sft", "Running"],
        ["sft", "Running", "1/3"],
        ["sft", "Failed", "BadData", "line", "3", "of", "x"],
    ]
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize(
    ("pipeline", "skip", "named"),
    [
        ([{"name": "sft", "sft": {}}], True, ["pull bot sft"]),
        ([{"name": "sft", "sft": {}}, {"name": "merge", "merge": {}}], False, ["pull bot merge", "report bot"]),
        (
            [{"name": "full", "sft": {"method": "full"}}, {"name": "gguf", "quantize": {"gguf": ["Q8_0"]}}],
            False,
            ["pull bot", 'chat bot "your question"', "report bot"],
        ),
    ],
    ids=["an adapter", "a model", "a GGUF"],
)
def test_a_complete_job_names_only_commands_that_work(pipeline: list[Any], skip: bool, named: list[str]) -> None:
    """No GGUF to chat with and no report are promised where the pipeline makes none."""
    job = FineTuneJob.model_validate(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "bot"},
            "spec": {
                "model": {"source": "hf://a/b"},
                "data": {"train": [{"source": "s3://x/y.jsonl"}]},
                "storage": {"bucket": "finetune"},
                "evaluation": {"skip": skip},
                "pipeline": pipeline,
            },
        },
        strict=False,
    )
    said = runs.summary(job, JobStatus(), Path("bot.yaml"), 0)
    assert said.partition("Next:\n")[2].splitlines() == [f"  finetune {command}" for command in named]
