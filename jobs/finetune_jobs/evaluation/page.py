"""``index.html``: the report as one page. No request, no script, every text from data escaped."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from finetune_jobs.evaluation.charts import Line, line_chart

Json = dict[str, Any]
_SHOWN_CHARACTERS = 2_000
_WATCHED_LINES = (
    ("reward", "Reward"),
    ("rewards/accuracies", "Reward accuracy"),
    ("rewards/margins", "Reward margin"),
    ("kl", "KL divergence, nats"),
    ("length", "Answer length, tokens"),
)


def render(report: Mapping[str, Any], *, evidence: str = "") -> str:
    """The page of a ``report.json``. ``evidence``: the way from the page to the evidence folder, or empty."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "percent": percent,
        "size": size,
        "duration": duration,
        "shown": shown,
        "date": date,
        "pretty": pretty,
    }
    return environment.get_template("report.html").render(
        r=report,
        at=evidence,
        columns=columns(report),
        bests=bests(report),
        charts={name: charts(log) for name, log in report["training"].items()},
        verdict=verdict(report),
    )


def columns(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, heading) of the score table: the metrics asked for, then the spot checks; only what some target has."""
    names = [*report["settings"]["metrics"], "general", "refusals", "tokensPerSecond"]
    headings = {"tokensPerSecond": "tokens/s"}
    return [(n, headings.get(n, n)) for n in names if any(n in scores for scores in report["scores"].values())]


def bests(report: Mapping[str, Any]) -> dict[str, float]:
    """The best value of each column, to be marked; none where all are equal."""
    best = {}
    for name, _ in columns(report):
        values = [scores[name] for scores in report["scores"].values() if name in scores]
        if min(values) < max(values):
            best[name] = min(values) if name == "loss" else max(values)
    return best


def verdict(report: Mapping[str, Any]) -> Json:
    """The first figure that the user asked for, before and after."""
    main = report["mainTarget"]
    base, tuned = report["scores"]["base"], report["scores"][main]
    asked = [name for name in report["settings"]["metrics"] if name in base and name in tuned]
    # A share says more to a reader than a loss.
    name = next((n for n in asked if n != "loss"), asked[0] if asked else None)
    if name is None:
        return {"metric": None, "target": main}
    return {"metric": name, "target": main, "before": base[name], "after": tuned[name], "rows": int(tuned["testRows"])}


def charts(log: Mapping[str, Any]) -> list[tuple[str, list[str], Markup]]:
    """(caption, names of the lines, SVG) for one training stage; the SVG is our own markup with its texts escaped."""
    curve, evaluations = log["curve"], log["evaluations"]
    wanted = [
        ("Loss", [Line("training", _points(curve, "loss")), Line("evaluation", _points(evaluations, "evalLoss"))])
    ]
    for metric, caption in _WATCHED_LINES:
        lines = [Line("training", _points(curve, metric)), Line("evaluation", _points(evaluations, f"eval/{metric}"))]
        wanted.append((caption, lines))
    wanted.append(("Learning rate", [Line("learning rate", _points(curve, "learningRate"))]))
    found = []
    for caption, lines in wanted:
        kept = [line for line in lines if line.points]
        if svg := line_chart(kept, x="step", y=caption):
            found.append((caption, [line.name for line in kept], Markup(svg)))
    return found


def _points(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def figure(value: object) -> str:
    """A number with as many digits as are worth reading; other values as they are, nothing as a dash."""
    if value is None:
        return "\u2013"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) >= 100):
        return f"{int(value):,}".replace(",", "\u202f")
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
    shown = f"{value:.{digits}f}" if abs(value) >= 0.01 else f"{value:.2g}"
    return shown.replace("-", "\u2212", 1) if value < 0 else shown


def percent(value: float) -> str:
    """For the width of a bar, within 0 and 100."""
    return f"{100 * min(1.0, max(0.0, value)):.1f}"


def size(value: float | None) -> str:
    """Bytes in the unit that people use for files (powers of ten)."""
    if value is None:
        return "\u2013"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``2 min 07 s``, ``7.5 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shown(text: str | None) -> str:
    """A text cut to what a page can bear; the whole stands in the answers' JSONL."""
    if text is None:
        return "\u2013"
    text = text.strip()
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} \u2026 ({len(text)} characters)"


def pretty(value: object) -> str:
    """JSON for reading; the page escapes it like any text."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def date(text: str) -> str:
    """An RFC 3339 time to the minute, UTC."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return text
