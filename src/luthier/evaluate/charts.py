"""Line charts as inline SVG text: axes with round ticks, one polyline a series. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

Point = tuple[float, float]
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten) around ``low`` to ``high``."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


def line_chart(series: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str, title: str) -> Markup:
    """A chart of named series of (x, y); points that are not finite leave a gap. Empty text when nothing is left.

    A series of few points (evaluations) also gets a dot for each.
    """
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    every = [p for points in finite.values() for p in points]
    if not every:
        return Markup("")
    xs, ys = ticks(min(p[0] for p in every), max(p[0] for p in every)), _y_ticks(every)

    def place(point: Point) -> tuple[float, float]:
        across = (point[0] - xs[0]) / (xs[-1] - xs[0])
        up = (point[1] - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for y in ys:
        at = place((xs[0], y))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in xs:
        at = place((x, ys[0]))[0]
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(x)}</text>'
        )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle, half = (LEFT + WIDTH - RIGHT) / 2, (TOP + base) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" x="14" y="{half}" text-anchor="middle" transform="rotate(-90 14 {half})">'
        f"{escape(y_label)}</text>"
    )
    for index, (name, points) in enumerate(finite.items()):
        parts.extend(_series(index, name, [place(p) for p in points], points))
    parts.append("</svg>")
    legend = "".join(
        f'<span class="key"><i class="s{i % 4}"></i>{escape(name)}</span>'
        for i, name in enumerate(finite)
        if finite[name]
    )
    return Markup("".join(parts) + f'<div class="legend">{legend}</div>')


def short(value: float) -> str:
    """A number for an axis: few digits, and powers of ten only where they are needed."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.6g}" if abs(value) >= 1 else f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")


def _y_ticks(points: Sequence[Point]) -> list[float]:
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    # A loss is read against zero; only where all values lie close together would that hide their course.
    return ticks(0.0 if low >= 0 and low < 0.6 * high else low, high)


def _series(index: int, name: str, placed: Sequence[Point], points: Sequence[Point]) -> list[str]:
    css = f"s{index % 4}"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    out = [f'<polyline class="line {css}" points="{path}"/>'] if len(placed) > 1 else []
    if len(placed) <= 40:
        out += [
            f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(name)} {short(p[0])}: '
            f"{p[1]:.4g}</title></circle>"
            for (x, y), p in zip(placed, points, strict=True)
        ]
    return out
