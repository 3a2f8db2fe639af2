"""Line and bar charts as small SVG texts: no clock, no fonts from outside, the same numbers give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 300, 56, 14, 14, 44


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return round numbers that span [low, high]."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / count))
    step = min((m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= count), default=10 * power)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(series: dict[str, Sequence[tuple[float, float]]], *, x: str, y: str, names: dict[str, str]) -> str:
    """Draw curves. series: class of the curve -> points; names: class -> words in the legend."""
    points = [point for curve in series.values() for point in curve]
    low_x, high_x = 0.0, max(p[0] for p in points)
    low_y, high_y = min(p[1] for p in points), max(p[1] for p in points)
    pad = 0.06 * max(high_y - low_y, 1e-6)
    low_y, high_y = low_y - pad, high_y + pad

    def at(px: float, py: float) -> tuple[float, float]:
        across = LEFT + (px - low_x) / max(high_x - low_x, 1e-9) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (py - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = _frame(f"{y} against {x}")
    for value in ticks(low_y, high_y):
        _, height = at(0, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(low_x, high_x):
        across, _ = at(value, low_y)
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    for number, (name, curve) in enumerate(series.items()):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*point) for point in curve))
        parts.append(f'<polyline class="curve {name}" points="{path}"/>')
        parts += [f'<circle class="dot {name}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in (at(*p) for p in curve)]
        top = TOP + 12 + 18 * number
        parts.append(f'<line class="curve {name}" x1="{WIDTH - 190}" x2="{WIDTH - 166}" y1="{top}" y2="{top}"/>')
        parts.append(f'<text x="{WIDTH - 158}" y="{top + 4}">{escape(names[name])}</text>')
    return "".join([*parts, "</svg>"])


def bar_chart(values: Sequence[tuple[str, float]], *, x: str, y: str) -> str:
    """Draw bars with their values above."""
    high = max(value for _, value in values) * 1.15
    parts = _frame(f"{y} by {x}")
    step = (WIDTH - LEFT - RIGHT) / len(values)
    for number, (name, value) in enumerate(values):
        height = value / high * (HEIGHT - TOP - BOTTOM)
        across, top = LEFT + number * step + 0.15 * step, HEIGHT - BOTTOM - height
        parts.append(f'<rect class="bar" x="{across:.1f}" y="{top:.1f}" width="{0.7 * step:.1f}" height="{height:.1f}"/>')
        middle = across + 0.35 * step
        parts.append(f'<text x="{middle:.1f}" y="{top - 5:.1f}" text-anchor="middle">{value:.1%}</text>')
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(name)}</text>')
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text></svg>')
    return "".join(parts)


def _frame(title: str) -> list[str]:
    return [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>',
    ]
