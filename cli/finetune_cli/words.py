"""Figures as people read them. Pure."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime

from finetune_api.status import JobStatus, Progress, StageState, StageStatus


def duration(seconds: float) -> str:
    """``45s``, ``3m05s``, ``2h04m``, ``3d02h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def size(count: float) -> str:
    """``512 B``, ``1.4 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as kubectl prints them: upper-case header, three blanks between, nothing else."""
    lines = [[name.upper() for name in header], *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def metric(progress: Progress | None, name: str) -> str:
    """The value of a metric of the running stage, empty if it has none."""
    return next((m.value for m in progress.metrics if m.name == name), "") if progress else ""


def elapsed(stage: StageStatus, now: datetime) -> float:
    """Seconds from the stage's first start to its end, or to now; 0 before the start."""
    if stage.start_time is None:
        return 0.0
    return ((stage.completion_time or now) - stage.start_time).total_seconds()


def stage_row(stage: StageStatus, now: datetime) -> list[str]:
    """State, step, loss, ETA, elapsed, note: what a stage's line shows, wherever it is shown."""
    progress = stage.progress if stage.state is StageState.RUNNING else None
    steps = f"{progress.step}/{progress.total_steps}" if progress and progress.total_steps else ""
    eta = duration(progress.eta_seconds) if progress and progress.eta_seconds is not None else ""
    took = "" if stage.state is StageState.REUSED or not stage.start_time else duration(elapsed(stage, now))
    note = "" if stage.state.done else " ".join(filter(None, [stage.reason, first_line(stage.message)]))
    return [stage.name, stage.state.value, steps, metric(progress, "loss"), eta, took, note]


STAGE_COLUMNS = ("stage", "state", "step", "loss", "eta", "elapsed", "")


def first_line(text: str, limit: int = 100) -> str:
    """The first line of a message, cut to fit beside other things."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= limit else line[: limit - 3] + "..."


def log_line(line: str) -> str:
    """A line of a stage's log for people: time, level and message of our own JSON, any other line as it is."""
    if not line.startswith("{"):
        return line
    try:
        entry = json.loads(line)
        text = f"{entry['time'][11:19]} {entry['level'].upper():<7} {entry['message']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return line
    return f"{text}\n{entry['trace']}" if "trace" in entry else text


def artifacts_table(status: JobStatus) -> str:
    """Every artifact of a job: stage, name, size, where it is."""
    rows = [[a.stage, a.name, size(a.size_bytes), a.uri] for a in status.artifacts]
    return table(["stage", "artifact", "size", "uri"], rows)


def timings_table(status: JobStatus) -> str:
    """What every stage took: wall seconds of its processes, all attempts together; CPU seconds and memory as the stage
    itself measured them. The last line is the sum."""
    rows = []
    wall, cpu = 0.0, 0.0
    for stage in status.stages:
        if stage.result is None or stage.state is StageState.REUSED:
            rows.append([stage.name, stage.state.value.lower(), "", "", ""])
            continue
        figures = stage.result.figures
        own_cpu, memory = float(figures.get("cpuSeconds", 0)), float(figures.get("peakMemoryBytes", 0))
        wall, cpu = wall + stage.running_seconds, cpu + own_cpu
        cells = [f"{stage.running_seconds:.1f}", f"{own_cpu:.1f}", size(memory) if memory else ""]
        rows.append([stage.name, *cells, str(stage.attempt)])
    rows.append(["sum", f"{wall:.1f}", f"{cpu:.1f}", "", ""])
    return table(["stage", "wall s", "cpu s", "peak memory", "attempt"], rows)


def scores(status: JobStatus) -> str:
    """``exactMatch 0.025 -> 0.975``, base to tuned, for every figure that both stages left; empty before they did."""
    figures = {
        s.name: s.result.figures for s in status.stages if s.result is not None and s.name in ("baseline", "evaluate")
    }
    before, after = figures.get("baseline", {}), figures.get("evaluate", {})
    common = [name for name in after if name in before and name not in MEASURED]
    return "\n".join(f"{name:<18} {before[name]} -> {after[name]}" for name in common)


MEASURED = ("seconds", "cpuSeconds", "peakMemoryBytes")
"""Figures of every stage that say what it took, not what it made."""
