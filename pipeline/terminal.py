"""Text for a terminal of 80 columns: wrapped lines, durations, sizes, and colour where somebody can see it."""

from __future__ import annotations

import io
import os
import sys
import textwrap
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80
_COLOURS = {"green": "32", "yellow": "33", "red": "31", "bold": "1", "dim": "2"}


def colour(text: str, name: str, *, stream: TextIO | None = None) -> str:
    """Return text in a colour, as it is where the stream is no terminal or NO_COLOR is set."""
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\033[{_COLOURS[name]}m{text}\033[0m"


def wrapped(text: str, *, first: str = "", rest: str = "", width: int = WIDTH) -> str:
    """Wrap a sentence; first, rest: what stands before its first and further lines. Long paths are never broken."""
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


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


def plain_console(*, least_width: int = 90, file: Any = None) -> Console:
    """Return a console that prints text as it is: `[/b]` and `:dog:` in a name mean nothing.

    least_width: columns, also where the terminal has fewer. file: what to print to, standard output when None.
    """
    from rich.console import Console

    width = max(least_width, Console().width)
    return Console(width=width, file=file, markup=False, emoji=False, highlight=False)


def table_text(table: Any, *, least_width: int = 90) -> str:
    """Return a table as lines of text without trailing space."""
    stream = io.StringIO()
    plain_console(least_width=least_width, file=stream).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
