"""What a sweep leaves under sweeps/NAME/: a page, tables, pictures, and metrics and plots for DVC."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpar_core.files import atomic_path, atomic_write, write_json
from dpar_core.secrets import redacted
from pipeline.figures import new_figure, save_figure
from pipeline.report.charts import Scatter, scatter_chart
from pipeline.report.pictures import file_uri
from stages import terminal
from stages.shared.sampler import Files
from stages.tools.sweep import Failure, Outcome, Point, Search, TrialResult

DVC_FILE = """# Made by `dpar-cli sweep`: lets `dvc metrics show` and `dvc plots show` find what the sweep measured.
metrics:
  - metrics.json
plots:
  - heatmap.png
  - pareto.png
"""


UNLIKE = "images/s cannot be compared: the trials ran on different machines or with different numbers of threads"


@dataclass(frozen=True)
class SweepSettings:
    """What was asked for. thresholds, cfg: the values in words; images, final_images: per trial and per final."""

    model: str
    thresholds: str
    cfg: str
    images: int
    final_images: int
    search: Search
    retrain: bool


@dataclass(frozen=True)
class Facts:
    """A finished sweep.

    distance: name of the score that was to become small.
    command: reproduces the winner.
    """

    name: str
    distance: str
    settings: SweepSettings
    outcome: Outcome
    command: str
    files: Files

    @property
    def short(self) -> str:
        return self.distance.removeprefix("eval/")


class Written(NamedTuple):
    """Files for the sweep's own MLflow run, and its metrics."""

    tracked: list[Path]
    metrics: dict[str, float]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of the Pareto-optimal points; small is good in both values. In order of the first."""
    order = sorted(range(len(points)), key=lambda which: points[which])
    front, best = [], float("inf")
    for which in order:
        if points[which][1] < best:
            front.append(which)
            best = points[which][1]
    return front


def write(facts: Facts, folder: Path) -> Written:
    """Write everything into the sweep's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = winner_metrics(facts)
    write_json(folder / "metrics.json", metrics)
    write_json(
        folder / "sweep.json",
        {
            **asdict(facts.settings),
            "name": facts.name,
            "distance": facts.distance,
            "reproduce": facts.command,
            "winner": None if (winner := facts.outcome.winner(facts.distance)) is None else winner.row(),
            "failed": [{**asdict(one.point), "error": one.error} for one in facts.outcome.failed],
        },
    )
    tracked = [folder / "sweep.json"]
    if facts.outcome.search:
        _write_tables([one.row() for one in facts.outcome.search], folder / "results")
        if facts.outcome.finals:  # of other numbers of images, hence in a table of their own
            tracked += [_write_tables([one.row() for one in facts.outcome.finals], folder / "finals")]
        draw_heatmap(facts, folder / "heatmap.png")
        draw_pareto(facts, folder / "pareto.png")
        atomic_write(folder / "dvc.yaml", DVC_FILE)
        tracked += [folder / name for name in ("heatmap.png", "pareto.png", "results.parquet")]
    atomic_write(folder / "index.html", redacted(page(facts, folder)))
    return Written([*tracked, folder / "index.html"], metrics)


def winner_metrics(facts: Facts) -> dict[str, float]:
    """Return the winner's numbers, as `dvc metrics show` prints them."""
    winner = facts.outcome.winner(facts.distance)
    if winner is None:
        return {"sweep/failed": len(facts.outcome.failed)}
    metrics = {f"sweep/{name.removeprefix('eval/')}": value for name, value in winner.scores.values.items()}
    if (ends := winner.interval(facts.distance)) is not None:
        metrics |= {f"sweep/{facts.short}_low": ends.low, f"sweep/{facts.short}_high": ends.high}
    if winner.point.threshold is not None:
        metrics["sweep/threshold"] = winner.point.threshold
    return {
        **metrics,
        "sweep/cfg_scale": winner.point.cfg_scale,
        "sweep/patches_per_image": winner.patches_per_image,
        "sweep/images_per_s": winner.images_per_s,
        "sweep/trials": len(facts.outcome.search),
        "sweep/failed": len(facts.outcome.failed),
    }


def _write_tables(rows: list[dict[str, Any]], target: Path) -> Path:
    """Write rows to target.parquet and target.csv; return the former."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    types = {"threshold": pa.float64(), "max_patch_length": pa.int64()}
    arrays = {name: pa.array(values, type=types.get(name)) for name, values in columns.items()}
    with atomic_path(target.with_suffix(".parquet")) as temporary:
        pq.write_table(pa.table(arrays), temporary)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(target.with_suffix(".csv"), text.getvalue())
    return target.with_suffix(".parquet")


def cells_of(facts: Facts) -> tuple[list[float | None], list[float], dict[tuple[float | None, float], TrialResult]]:
    """Return thresholds, cfg scales, and the search's result of each pair that was tried."""
    cells = {(one.point.threshold, one.point.cfg_scale): one for one in facts.outcome.search}
    thresholds = sorted({t for t, _ in cells}, key=lambda t: (t is not None, t or 0))
    return thresholds, sorted({c for _, c in cells}), cells


def draw_heatmap(facts: Facts, path: Path) -> None:
    """Draw the distance of each threshold and cfg scale: a table of colours for a grid, dots for other searches."""
    import numpy as np

    thresholds, scales, cells = cells_of(facts)
    best = min(one.value(facts.distance) for one in facts.outcome.search)
    if facts.settings.search != "grid":
        figure, axes = new_figure(7, 4.6)
        dots = axes.scatter(
            [one.point.cfg_scale for one in facts.outcome.search],
            [one.point.threshold or 0 for one in facts.outcome.search],
            c=[one.value(facts.distance) for one in facts.outcome.search],
            cmap="viridis_r",
            s=70,
        )
    else:
        figure, axes = new_figure(max(1.1 * len(scales) + 2.4, 5), max(0.55 * len(thresholds) + 1.6, 2.6))
        grid = np.full((len(thresholds), len(scales)), np.nan)
        for (threshold, scale), one in cells.items():
            grid[thresholds.index(threshold), scales.index(scale)] = one.value(facts.distance)
        dots = axes.imshow(grid, cmap="viridis_r", aspect="auto", origin="lower")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for row, column in np.ndindex(grid.shape):
            if np.isfinite(grid[row, column]):
                chosen = grid[row, column] == best
                axes.text(
                    column,
                    row,
                    terminal.figures(float(grid[row, column]), 4),
                    ha="center",
                    va="center",
                    weight="bold" if chosen else "normal",
                    color="black" if grid[row, column] < middle else "white",
                )
        axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
        axes.set_yticks(range(len(thresholds)), ["training" if t is None else f"{t:g}" for t in thresholds])
    axes.set_xlabel("cfg scale")
    axes.set_ylabel("threshold, nats")
    axes.set_title(f"{facts.short}, {facts.settings.images} images per trial; lower is better", loc="left", fontsize=10)
    figure.colorbar(dots, ax=axes)
    save_figure(figure, path)


def fronts(facts: Facts) -> list[Scatter]:
    """Return the two trade-offs: distance against patches per image, and against measured images/s."""
    found = []
    for name, words, sign in (("patches_per_image", "patches per image", 1), ("images_per_s", "images/s", -1)):
        points = [(getattr(one, name), one.value(facts.distance)) for one in facts.outcome.search]
        front = pareto_front([(sign * x, y) for x, y in points])
        labels = [label(one.point) for one in facts.outcome.search]
        found.append(Scatter(points, front, labels, words, facts.short))
    return found


def label(point: Point) -> str:
    """Return the name of a trial at a point for people."""
    threshold = "" if point.threshold is None else f"{point.threshold:g} nats, "
    return f"{threshold}cfg {point.cfg_scale:g}"


def draw_pareto(facts: Facts, path: Path) -> None:
    """Draw both trade-offs with their Pareto-optimal trials."""
    figure, both = new_figure(11, 4.4, columns=2)
    for axes, one in zip(both, fronts(facts)):
        axes.scatter(*zip(*one.points), color="#9aa1ae", s=28, zorder=2)
        chosen = [one.points[which] for which in one.front]
        axes.plot(*zip(*chosen), marker="o", color="#b8471b", zorder=3)
        right = sum(axes.get_xlim()) / 2
        for which in one.front:
            inward = {"xytext": (-7, 5), "ha": "right"} if one.points[which][0] > right else {"xytext": (7, 5), "ha": "left"}
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
            axes.annotate(
                one.labels[which], one.points[which], textcoords="offset points", fontsize=8, bbox=box, zorder=4, **inward
            )
        axes.set_xlabel(one.x)
        axes.set_ylabel(f"{one.y} (lower is better)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def table_head(facts: Facts) -> list[str]:
    """Return the names of the columns of table_rows."""
    return ["threshold", "cfg", "images", facts.short, "95 %", "patches", "images/s"]


def table_rows(facts: Facts) -> list[list[str]]:
    """Return the finals, or without them the best ten of the search, best first, as cells for people."""
    found = []
    for one in facts.outcome.ranked(facts.distance)[:10]:
        ends = one.interval(facts.distance)
        found.append(
            [
                "training" if one.point.threshold is None else f"{one.point.threshold:g}",
                f"{one.point.cfg_scale:g}",
                str(one.trial.images),
                terminal.figures(one.value(facts.distance), 4),
                "" if ends is None else f"{terminal.figures(ends.low, 3)} to {terminal.figures(ends.high, 3)}",
                f"{one.patches_per_image:.1f}",
                terminal.figures(one.images_per_s, 3),
            ]
        )
    return found


def table(facts: Facts) -> str:
    """Return the finals (or the best of the search) and the failures as text for a terminal."""
    lines = []
    if rows := table_rows(facts):
        kind = "finals, fresh seeds" if facts.outcome.finals else "search"
        lines += [f"{facts.name}: {kind}", terminal.table(table_head(facts), rows)]
    if chance := within_chance(facts):
        words = f"within chance of the best: {'; '.join(label(one.point) for one in chance)}"
        lines.append(terminal.wrapped(words, rest="  "))
    if not speeds_of_one_machine(facts):
        lines.append(terminal.wrapped(UNLIKE, rest="  "))
    lines += [terminal.wrapped(f"failed: {one_line(one)}", rest="  ") for one in facts.outcome.failed]
    if facts.command:
        lines.append(f"{'reproduce':16}{broken(facts.command, terminal.columns() - 18, rest=16)}")
    return "\n".join(lines)


def broken(command: str, width: int, *, rest: int) -> str:
    """Break a command into lines that a shell puts together again. rest: spaces before all but the first."""
    parts = textwrap.wrap(command, width, break_long_words=False, break_on_hyphens=False)
    return f" \\\n{'':{rest}}".join(parts)


def one_line(failed: Failure) -> str:
    """Return what is to be said of a failed trial."""
    return f"{label(failed.point)}: {failed.error}"


def within_chance(facts: Facts) -> list[TrialResult]:
    """Return the other finals whose interval overlaps the winner's: chance may have put them behind."""
    winner = facts.outcome.winner(facts.distance)
    if winner is None or (best := winner.interval(facts.distance)) is None:
        return []
    others = [(one, one.interval(facts.distance)) for one in facts.outcome.finals if one.key != winner.key]
    return [one for one, ends in others if ends is not None and ends.low <= best.high]


def speeds_of_one_machine(facts: Facts) -> bool:
    """Return whether all trials ran on one machine with as many threads each, so that their images/s can be compared."""
    return len({one.machine for one in (*facts.outcome.search, *facts.outcome.finals)}) <= 1


def headline(facts: Facts) -> str:
    """Return what a sweep found, in one line: a setting is best only where the finals leave no doubt."""
    winner = facts.outcome.winner(facts.distance)
    if winner is None:
        return "Every trial failed"
    found = terminal.figures(winner.value(facts.distance), 4)
    if facts.outcome.finals and not within_chance(facts):
        return f"{label(winner.point)} is best: {facts.short} {found}"
    return f"{label(winner.point)} has the smallest {facts.short}: {found}"


def page(facts: Facts, folder: Path) -> str:
    """Return the sweep as one HTML page that works offline."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    thresholds, scales, cells = cells_of(facts)
    search, finals = facts.outcome.search, facts.outcome.finals
    values = [one.value(facts.distance) for one in search]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"figures": terminal.figures, "trial": lambda one: label(one.point)}
    return environment.get_template("sweep.html.j2").render(
        facts=facts,
        thresholds=thresholds,
        scales=scales,
        cells=cells,
        search=search,
        finals=facts.outcome.ranked(facts.distance) if finals else [],
        winner=facts.outcome.winner(facts.distance),
        best=min(values, default=None),
        chance=within_chance(facts),
        headline=headline(facts),
        unlike="" if speeds_of_one_machine(facts) else UNLIKE,
        share={key: (one.value(facts.distance) - low) / (high - low or 1) for key, one in cells.items()},
        charts=[scatter_chart(one) for one in fronts(facts)] if search else [],
        pictures=[(one, file_uri(folder / "trials" / f"{one.key}.png")) for one in search],
        failed=[one_line(one) for one in facts.outcome.failed],
    )
