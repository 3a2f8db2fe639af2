"""PNG figures of matplotlib: without a display, whole or not at all, the same numbers the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpar_core.files import atomic_path


def new_figure(width: float, height: float, columns: int = 1) -> Any:
    """Return a figure of so many inches and its axes, `columns` beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG and close it."""
    from matplotlib import pyplot

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
