"""Charts as small SVG texts that take their colours from the page: the same numbers give the same bytes.

Drawn here and not by matplotlib, whose SVG has fixed colours and carries fonts, nor by a JavaScript library, as the page
works offline from one file.

A chart's classes: `axis`, `rule`, `name`; a series' own class (as `dpar`) colours what belongs to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 290, 46, 16, 12, 42


@dataclass(frozen=True)
class Series:
    """A curve.

    style: its class.
    points: (x, y) in order of x.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Dot:
    """A value with its 95 % interval, or without one."""

    style: str
    value: float
    interval: tuple[float, float] | None = None


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return at most count + 1 round numbers inside [low, high]."""
    span = max(high - low, 1e-12)
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


class _Frame:
    """A chart's axes with their names and ticks.

    x, y: the ends of each.
    words: of the axes.
    bottom: height of what stands below the axis; its numbers stand `below` it.
    parts: what is drawn so far.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        words: tuple[str, str],
        *,
        bottom: int = BOTTOM,
        below: int = 18,
    ) -> None:
        self.x, self.y, self.bottom = x, y, bottom
        self.parts = [_open(WIDTH, HEIGHT, f"{words[1]} against {words[0]}", style="chart")]
        for value in ticks(*y):
            self.parts.append(f'<path class="rule" d="M{LEFT} {self.down(value):.1f}H{WIDTH - RIGHT}"/>')
            self.parts.append(_text(LEFT - 8, self.down(value) + 4, f"{value:g}", "end"))
        for value in ticks(*x):
            self.parts.append(_text(self.across(value), HEIGHT - bottom + below, _plain(value), "middle"))
        self.parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - bottom}H{WIDTH - RIGHT}"/>')
        self.parts.append(_text((WIDTH + LEFT) / 2, HEIGHT - 6, words[0], "middle"))

    def across(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - self.bottom - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(series: Sequence[Series], *, x: str, y: str, marks: Mapping[str, float] | None = None) -> str:
    """Draw curves over x from 0. marks: words -> x of an upright line with these words beside it.

    Raises ValueError when there are no points.
    """
    points = [point for one in series for point in one.points]
    if not points:
        raise ValueError(f"no chart: no curve of {y} has a point")
    high_x = max(p[0] for p in points) or 1.0
    low_y, high_y = min(p[1] for p in points), max(p[1] for p in points)
    pad = 0.08 * (high_y - low_y) or 0.5
    frame = _Frame((0.0, high_x), (low_y - pad, high_y + pad), (x, y))
    parts, across, down = frame.parts, frame.across, frame.down
    for words, index in (marks or {}).items():
        side, anchor = (-6, "end") if index > high_x / 2 else (6, "start")
        parts.append(f'<path class="mark" d="M{across(index):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(_text(across(index) + side, TOP + 10, words, anchor))
    for one in series:
        path = "L".join(f"{across(a):.1f} {down(b):.1f}" for a, b in one.points)
        parts.append(f'<g class="{one.style}"><path class="curve" d="M{path}"/>')
        for a, b in one.points:
            tooltip = escape(f"{one.name}: {b:.4f} at {_plain(a)} {x}")
            parts.append(f'<circle cx="{across(a):.1f}" cy="{down(b):.1f}" r="3.2"><title>{tooltip}</title></circle>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Scatter:
    """Points (x, y) with their labels.

    front: numbers of those on the Pareto front, in order.
    x, y: names of the axes.
    """

    points: Sequence[tuple[float, float]]
    front: Sequence[int]
    labels: Sequence[str]
    x: str
    y: str


def scatter_chart(one: Scatter) -> str:
    """Draw points and the line through those on the front, each with its label as a tip."""
    frame = _Frame(_padded([x for x, _ in one.points]), _padded([y for _, y in one.points]), (one.x, one.y))
    parts, across, down = frame.parts, frame.across, frame.down
    path = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in (one.points[index] for index in one.front))
    parts.append(f'<g class="dpar"><path class="curve" d="M{path}"/></g>')
    for index, point in enumerate(one.points):
        x, y = across(point[0]), down(point[1])
        tooltip = escape(f"{one.labels[index]}: {one.y} {_plain(point[1])}, {_plain(point[0])} {one.x}")
        style = "dpar" if index in one.front else "other"
        parts.append(f'<g class="{style}"><circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{tooltip}</title></circle></g>')
    return "".join([*parts, "</svg>"])


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    return low - pad, high + pad


def bar_chart(values: Sequence[tuple[str, float]], *, x: str, y: str) -> str:
    """Draw upright bars of shares (0..1) with their percentages above."""
    high = max(value for _, value in values) * 1.12 or 1.0
    parts = [_open(WIDTH, HEIGHT, f"{y} by {x}", style="chart")]
    step = (WIDTH - 2 * RIGHT) / len(values)
    for number, (name, value) in enumerate(values):
        height = value / high * (HEIGHT - TOP - BOTTOM)
        left, top = RIGHT + (number + 0.14) * step, HEIGHT - BOTTOM - height
        middle = left + 0.36 * step
        parts.append(f'<rect class="dpar" x="{left:.1f}" y="{top:.1f}" width="{0.72 * step:.1f}" height="{height:.1f}"/>')
        if len(values) <= 10:
            parts.append(_text(middle, top - 6, f"{100 * value:.1f} %", "middle", "value"))
        parts.append(_text(middle, HEIGHT - BOTTOM + 18, name, "middle"))
    parts.append(f'<path class="axis" d="M{RIGHT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return "".join([*parts, _text(WIDTH / 2, HEIGHT - 6, x, "middle"), "</svg>"])


def interval_plot(dots: Sequence[Dot], *, title: str, scale: tuple[float, float] | None = None) -> str:
    """Draw values under each other on one scale, each with its interval as a bar.

    scale: its ends; when left out, those of the values.
    """
    width, line = 180, 14
    ends = [end for dot in dots for end in (*(dot.interval or ()), dot.value)]
    low, high = scale or (min(ends), max(ends))

    def across(value: float) -> float:
        return 10 + ((value - low) / (high - low) if high > low else 0.5) * (width - 20)

    parts = [_open(width, line * len(dots) + 4, title)]
    for number, dot in enumerate(dots):
        middle = 2 + line * (number + 0.5)
        parts.append(f'<g class="{dot.style}">')
        if dot.interval is not None:
            first, last = (across(end) for end in dot.interval)
            parts.append(f'<path class="interval" d="M{first:.1f} {middle}H{last:.1f}"/>')
        parts.append(f'<circle cx="{across(dot.value):.1f}" cy="{middle}" r="4"/></g>')
    return "".join([*parts, "</svg>"])


def difference_plot(rows: Sequence[tuple[str, Dot]], *, title: str) -> str:
    """Draw named differences with their intervals under each other, on one scale that shows zero."""
    width, line, left = 560, 34, 190
    ends: list[float] = [end for _, dot in rows for end in (*(dot.interval or ()), dot.value)]
    reach = max(max(abs(end) for end in ends), 1e-9) * 1.1
    bottom = line * len(rows) + 6

    def across(value: float) -> float:
        return left + (value + reach) / (2 * reach) * (width - left - 16)

    parts = [_open(width, bottom + 24, title, style="narrow")]
    for value in ticks(-reach, reach, count=6):
        parts.append(f'<path class="rule" d="M{across(value):.1f} 4V{bottom}"/>')
        parts.append(_text(across(value), bottom + 18, f"{value:+g}" if value else "0", "middle"))
    parts.append(f'<g class="zero"><path class="axis" d="M{across(0):.1f} 0V{bottom + 4}"/></g>')
    for number, (words, dot) in enumerate(rows):
        middle = 4 + line * (number + 0.5)
        parts.append(f'{_text(0, middle + 4, words, "start", "value")}<g class="{dot.style}">')
        if dot.interval is not None:
            first, last = (across(end) for end in dot.interval)
            parts.append(f'<path class="interval" d="M{first:.1f} {middle}H{last:.1f}"/>')
        parts.append(f'<circle cx="{across(dot.value):.1f}" cy="{middle}" r="5"/></g>')
    return "".join([*parts, "</svg>"])


def dot_chart(dots: Sequence[tuple[str, float, Dot]], *, x: str, y: str) -> str:
    """Draw named values with their intervals over a cost: (name, cost, value) each."""
    ends = [end for _, _, dot in dots for end in (*(dot.interval or ()), dot.value)]
    # Three of these stand side by side, with letters larger than the lines.
    frame = _Frame(_padded([cost for _, cost, _ in dots]), _padded(ends), (x, y), bottom=BOTTOM + 16, below=22)
    parts, across, down = frame.parts, frame.across, frame.down
    for number, (name, cost, dot) in enumerate(dots):
        left, middle = across(cost), down(dot.value)
        beside = sum(cost == other for _, other, _ in dots[:number])
        left += 12 * beside  # equal costs stand side by side, their names under each other
        parts.append(f'<g class="{dot.style}">')
        if dot.interval is not None:
            low, high = (down(end) for end in dot.interval)
            parts.append(f'<path class="interval" d="M{left:.1f} {high:.1f}V{low:.1f}"/>')
        parts.append(f'<circle cx="{left:.1f}" cy="{middle:.1f}" r="5"><title>{escape(name)}</title></circle></g>')
        side, anchor = (-12, "end") if left > WIDTH / 2 else (12, "start")
        parts.append(_text(left + side - 12 * beside, middle + 4 + 18 * beside, name, anchor, "value"))
    return "".join([*parts, "</svg>"])


def graph(edges: Mapping[str, Sequence[str]], lanes: Mapping[str, float]) -> str:
    """Draw a directed graph from top to bottom.

    edges: node -> nodes it needs.
    lanes: node -> lane from left, 0..2.

    A node stands right above the first that needs it; needs that others imply are left out.
    """
    users = {node: [user for user, needs in edges.items() if node in needs] for node in edges}
    height: dict[str, int] = {}

    def above(node: str) -> int:
        if node not in height:
            height[node] = 1 + max((above(user) for user in users[node]), default=-1)
        return height[node]

    top = max(above(node) for node in edges)
    width, box, step, half = 390, 118, 52, 14
    centre = {node: (67 + lanes[node] * 128, 20 + (top - height[node]) * step) for node in edges}
    parts = [_open(width, (top + 1) * step - 8, "the stages and what each needs")]
    for node, needs in edges.items():
        for need in needs:
            if not any(_reaches(edges, other, need) for other in needs if other != need):
                (x0, y0), (x1, y1) = centre[need], centre[node]
                y0, y1, bend = y0 + half, y1 - half, step - 2 * half
                # Into the other lane at once, then straight down, so that no line runs behind a box.
                curve = f"M{x0:g} {y0}C{x0:g} {y0 + bend} {x1:g} {y0} {x1:g} {y0 + bend}V{y1}"
                parts.append(f'<path class="edge" d="{curve}"/>')
    for node, (x, y) in centre.items():
        style = next((name for name in ("dpar", "llamagen") if node.endswith(name)), "shared")
        index = f'x="{x - box / 2:g}" y="{y - half}" width="{box}" height="{2 * half}"'
        parts.append(f'<g class="node {style}"><rect {index} rx="7"/>{_text(x, y + 4.5, node, "middle")}</g>')
    return "".join([*parts, "</svg>"])


_COLOURS = {"dpar": "#b8471b", "llamagen": "#2a62a6"}
_STYLE = "".join(
    (
        "text{font:13px system-ui,sans-serif;fill:#5b6270}.title{font-weight:600;fill:#1d2129}.rule{stroke:#e3e6ea}",
        ".axis{stroke:#9aa1ae}.curve{fill:none;stroke-width:2.2}",
        *(f"g.{n} .curve{{stroke:{c}}}g.{n} circle,rect.{n},text.{n}{{fill:{c}}}" for n, c in _COLOURS.items()),
    )
)


def picture_file(chart: str, *, title: str, names: Sequence[tuple[str, str]] = ()) -> str:
    """Return a `line_chart` or `bar_chart` as an SVG file with its own colours. names: style and words of each curve."""
    top = 30 + 18 * len(names)
    legend = [_text(LEFT, 20, title, "start", "title")]
    legend += [
        _text(LEFT, 40 + 18 * number, f"\u2014 {words}", "start", style) for number, (style, words) in enumerate(names)
    ]
    inner = chart.replace("<svg", f'<svg y="{top}" width="{WIDTH}" height="{HEIGHT}"', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT + top}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(legend)}{inner}</svg>\n'
    )


def _plain(value: float) -> str:
    """Write a number with four figures, from 1,000 on as a whole one: 29.63, 1,501,368."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _reaches(edges: Mapping[str, Sequence[str]], node: str, goal: str) -> bool:
    return any(need == goal or _reaches(edges, need, goal) for need in edges[node])


def _open(width: int, height: float, title: str, *, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<svg{named} viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(title)}">'


def _text(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
