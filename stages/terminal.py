"""Text for a terminal of 80 columns or fewer: wrapped lines, tables, durations, sizes, and colour where one can see it."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TextIO

WIDTH, NARROWEST = 80, 30  # columns: lines are never longer than the first, and no terminal is taken for narrower
_COLOURS = {"green": "32", "yellow": "33", "red": "31", "bold": "1", "dim": "2"}


def colour(text: str, name: str, *, stream: TextIO | None = None) -> str:
    """Return text in a colour, unchanged where the stream is not a terminal or NO_COLOR is set."""
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\033[{_COLOURS[name]}m{text}\033[0m"


def columns() -> int:
    """Return how wide lines may be: as wide as the terminal (or COLUMNS), 80 at most and where there is no terminal."""
    return max(min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH), NARROWEST)


def figures(value: float, count: int) -> str:
    """Write a number with `count` figures, zeros at its end included, and without an exponent: 13.00, 1,234, 0.00420."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    power = int(f"{value:.{count - 1}e}".partition("e")[2])
    return f"{value:,.{max(count - 1 - power, 0)}f}"


def wrapped(text: str, *, first: str = "", rest: str = "") -> str:
    """Wrap a sentence; first, rest: what stands before its first and further lines.

    Long paths are never broken, and commands in backticks only where they are longer than a line.
    """
    width = columns()
    if 2 * len(rest) > width:  # a hanging indent that would leave little of a narrow terminal
        rest = "    "
    text = re.sub(r"`[^`\n]+`", lambda one: one[0].replace(" ", "\0") if len(one[0]) + len(rest) <= width else one[0], text)
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    ).replace("\0", " ")


def fitted(text: str) -> str:
    """Return text with the lines wrapped that are wider than the terminal."""
    return "\n".join(line if len(line) <= columns() else wrapped(line, rest="  ") for line in text.split("\n"))


def print_fitted(text: object) -> None:
    """Print to standard output, wrapped for the terminal."""
    print(fitted(str(text)), flush=True)


def note(text: object) -> None:
    """Print to standard error, wrapped for the terminal."""
    print(fitted(str(text)), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Write a duration: 4 s, 2 min 31 s, 3 h 05 min, 2 days 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} days {whole % 86400 // 3600} h"


def about(seconds: float) -> str:
    """Write an estimate: 40 s, 12 min, 3 h."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Write bytes with a decimal unit: 264 B, 1.2 MB, 0.5 GB."""
    for unit, value in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= value / 2:
            return f"{count / value:.1f} {unit}"
    return f"{count:.0f} B"


def shortened(text: str, width: int) -> str:
    """Cut a text to a width, with an ellipsis where something is missing."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def nearest(name: str, names: Sequence[str], command: str) -> str:
    """Return which names a misspelt one may have meant, for a sentence, and the command that lists all."""
    near = get_close_matches(name, names, n=3, cutoff=0.7) or [one for one in names if name and one.startswith(name)][:3]
    return f"did you mean {' or '.join(near)}? (all: `{command}`)" if near else f"`{command}` lists all"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as lines, numbers to the right. Where it is wider than the terminal each row becomes a few lines."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    if sum(widths) + 2 * (len(widths) - 1) > columns():
        found = []
        for row in lines[1:]:
            found.append(wrapped(row[0], rest="  "))
            found += [wrapped(f"{name} {cell}", first="  ", rest="    ") for name, cell in zip(head[1:], row[1:]) if cell]
        return "\n".join(found)
    to_right = [all(re.match(r"[<+-]?[\d.]|$", row[column]) for row in lines[1:]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, to_right)
        ).rstrip()
        for row in lines
    )
