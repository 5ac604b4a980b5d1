"""Line charts as inline SVG.

Made by hand, not by matplotlib: colours follow the page's theme, text stays text, a chart is a few kilobytes, and the
report needs no plotting library.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 440, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 34


@dataclass(frozen=True)
class Line:
    """One series."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(lines: Sequence[Line], *, x: str, y: str) -> str:
    """SVG markup with classes ``line-0``, ``line-1``, ... for the page to colour; empty without a finite point.

    The y axis includes 0. The numbers behind it are in ``report.json``.
    """
    kept = [Line(line.name, [p for p in line.points if all(map(math.isfinite, p))]) for line in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return ""
    xs = [p[0] for line in kept for p in line.points]
    ys = [p[1] for line in kept for p in line.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(0.0, *ys), max(0.0, *ys))
    left, right, low, high = min(xs), max(xs), y_ticks[0], y_ticks[-1]

    def at(px: float, py: float) -> tuple[float, float]:
        wide = (px - left) / (right - left) if right > left else 0.5
        tall = (py - low) / (high - low)
        return _LEFT + wide * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - tall * (_HEIGHT - _TOP - _BOTTOM)

    said = "; ".join(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in kept)
    out = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{y} over {x}: {said}")}">',
        f"<title>{escape(said)}</title>",
    ]
    for tick in y_ticks:
        _, py = at(left, tick)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in (t for t in x_ticks if left <= t <= right):
        px, _ = at(tick, low)
        out.append(f'<text x="{px:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:.6g}</text>')
    out.append(f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x)}</text>')
    for number, line in enumerate(kept):
        places = [at(*p) for p in line.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        out.append(f'<polyline class="line-{number}" points="{path}"/>')
        if len(places) <= 40:
            out += [f'<circle class="dot-{number}" cx="{px:.1f}" cy="{py:.1f}" r="2.5"/>' for px, py in places]
    return "".join([*out, "</svg>"])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in even steps (1, 2 or 5 times a power of ten) from at or below ``low`` to at or above ``high``."""
    span = high - low or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]
