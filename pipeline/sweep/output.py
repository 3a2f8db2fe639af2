"""What a sweep leaves under sweeps/NAME/: a page, tables, pictures, and metrics and plots for DVC."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpar_core.files import atomic_path, atomic_write, write_json
from dpar_core.secrets import redacted
from pipeline import terminal
from pipeline.report.charts import Scatter, scatter_chart
from pipeline.report.pictures import file_uri
from stages.shared.sampler import Files
from stages.tools.sweep import Outcome

COLUMNS = (
    "final",
    "threshold",
    "max_patch_length",
    "cfg_scale",
    "images",
    "first_seed",
    "patch/patches_per_image",
    "patch/mean_length",
    "perf/images_per_s",
    "seconds",
    "protocol_id",
    "key",
)
DVC_FILE = """# Made by `dpar-cli sweep`: lets `dvc metrics show` and `dvc plots show` find what the sweep measured.
metrics:
  - metrics.json
plots:
  - heatmap.png
  - pareto.png
"""


@dataclass(frozen=True)
class Facts:
    """A finished sweep. distance: name of the score that was to become small. command: reproduces the winner."""

    name: str
    model: str
    distance: str
    settings: dict[str, Any]
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
    order = sorted(range(len(points)), key=lambda place: points[place])
    front, best = [], float("inf")
    for place in order:
        if points[place][1] < best:
            front.append(place)
            best = points[place][1]
    return front


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one flat row per trial."""
    rows = []
    for result in results:
        row = {name: result[name] for name in COLUMNS}
        row |= {name: value for name, value in result.items() if name.startswith("eval/")}
        for name, (low, high) in result["intervals"].items():
            row |= {f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def write(facts: Facts, folder: Path) -> Written:
    """Write everything into the sweep's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = winner_metrics(facts)
    write_json(folder / "metrics.json", metrics)
    write_json(
        folder / "sweep.json",
        {
            **facts.settings,
            "name": facts.name,
            "distance": facts.distance,
            "reproduce": facts.command,
            "winner": facts.outcome.winner(facts.distance),
            "failed": facts.outcome.failed,
        },
    )
    tracked = [folder / "sweep.json"]
    if facts.outcome.search:
        _write_tables(rows_of(facts.outcome.search), folder / "results")
        if facts.outcome.finals:  # of other numbers of images, hence in a table of their own
            tracked += [_write_tables(rows_of(facts.outcome.finals), folder / "finals")]
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
    names = [name for name in winner if name.startswith("eval/")]
    metrics = {f"sweep/{name.removeprefix('eval/')}": winner[name] for name in names}
    low, high = winner["intervals"].get(facts.distance, (None, None))
    if low is not None:
        metrics |= {f"sweep/{facts.short}_low": low, f"sweep/{facts.short}_high": high}
    if winner["threshold"] is not None:
        metrics["sweep/threshold"] = winner["threshold"]
    return {
        **metrics,
        "sweep/cfg_scale": winner["cfg_scale"],
        "sweep/patches_per_image": winner["patch/patches_per_image"],
        "sweep/images_per_s": winner["perf/images_per_s"],
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


def _figure(width: float, height: float, columns: int = 1) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def cells_of(facts: Facts) -> tuple[list[float | None], list[float], dict[tuple[float | None, float], dict[str, Any]]]:
    """Return thresholds, cfg scales, and the search's result of each pair that was tried."""
    cells = {(one["threshold"], one["cfg_scale"]): one for one in facts.outcome.search}
    thresholds = sorted({t for t, _ in cells}, key=lambda t: (t is not None, t or 0))
    return thresholds, sorted({c for _, c in cells}), cells


def draw_heatmap(facts: Facts, path: Path) -> None:
    """Draw the distance of each threshold and cfg scale: a table of colours for a grid, dots for other searches."""
    import numpy as np

    thresholds, scales, cells = cells_of(facts)
    best = min(facts.outcome.search, key=lambda one: one[facts.distance])
    if facts.settings["search"] != "grid":
        figure, axes = _figure(7, 4.6)
        dots = axes.scatter(
            [one["cfg_scale"] for one in facts.outcome.search],
            [one["threshold"] or 0 for one in facts.outcome.search],
            c=[one[facts.distance] for one in facts.outcome.search],
            cmap="viridis_r",
            s=70,
        )
    else:
        figure, axes = _figure(max(1.1 * len(scales) + 2.4, 5), max(0.55 * len(thresholds) + 1.6, 2.6))
        grid = np.full((len(thresholds), len(scales)), np.nan)
        for (threshold, scale), one in cells.items():
            grid[thresholds.index(threshold), scales.index(scale)] = one[facts.distance]
        dots = axes.imshow(grid, cmap="viridis_r", aspect="auto", origin="lower")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for row, column in np.ndindex(grid.shape):
            if np.isfinite(grid[row, column]):
                chosen = grid[row, column] == best[facts.distance]
                axes.text(
                    column,
                    row,
                    f"{grid[row, column]:.3g}",
                    ha="center",
                    va="center",
                    weight="bold" if chosen else "normal",
                    color="black" if grid[row, column] < middle else "white",
                )
        axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
        axes.set_yticks(range(len(thresholds)), ["training" if t is None else f"{t:g}" for t in thresholds])
    axes.set_xlabel("cfg scale")
    axes.set_ylabel("threshold, nats")
    axes.set_title(f"{facts.short}, {facts.settings['images']} images per trial; lower is better", loc="left", fontsize=10)
    figure.colorbar(dots, ax=axes)
    _save(figure, path)


def fronts(facts: Facts) -> list[Scatter]:
    """Return the two trade-offs: distance against patches per image, and against measured images/s."""
    found = []
    for name, words, sign in (
        ("patch/patches_per_image", "patches per image", 1),
        ("perf/images_per_s", "images/s", -1),
    ):
        points = [(one[name], one[facts.distance]) for one in facts.outcome.search]
        front = pareto_front([(sign * x, y) for x, y in points])
        labels = [label(one) for one in facts.outcome.search]
        found.append(Scatter(points, front, labels, words, facts.short))
    return found


def label(result: dict[str, Any]) -> str:
    """Return a trial's name for people."""
    threshold = "" if result["threshold"] is None else f"{result['threshold']:g} nats, "
    return f"{threshold}cfg {result['cfg_scale']:g}"


def draw_pareto(facts: Facts, path: Path) -> None:
    """Draw both trade-offs with their Pareto-optimal trials."""
    figure, both = _figure(11, 4.4, columns=2)
    for axes, one in zip(both, fronts(facts)):
        axes.scatter(*zip(*one.points), color="#9aa1ae", s=28, zorder=2)
        chosen = [one.points[place] for place in one.front]
        axes.plot(*zip(*chosen), marker="o", color="#b8471b", zorder=3)
        for place in one.front:
            axes.annotate(one.labels[place], one.points[place], textcoords="offset points", xytext=(5, 6), fontsize=8)
        axes.set_xlabel(one.x)
        axes.set_ylabel(f"{one.y} (lower is better)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def table(facts: Facts) -> str:
    """Return the finals (or the best of the search) and the failures as text for a terminal."""
    results = sorted(facts.outcome.finals or facts.outcome.search, key=lambda one: one[facts.distance])[:10]
    kind = "finals, fresh seeds" if facts.outcome.finals else "search"
    rows = []
    for one in results:
        low, high = one["intervals"].get(facts.distance, (float("nan"), float("nan")))
        rows.append(
            (
                "training" if one["threshold"] is None else f"{one['threshold']:g}",
                f"{one['cfg_scale']:g}",
                str(one["images"]),
                f"{one[facts.distance]:.4g}",
                f"{low:.3g} to {high:.3g}",
                f"{one['patch/patches_per_image']:.1f}",
                f"{one['perf/images_per_s']:.3g}",
            )
        )
    lines = []
    if rows:
        head = ("threshold", "cfg", "images", facts.short, "95 %", "patches", "images/s")
        lines += [f"{facts.name}: {kind}", terminal.table(head, rows)]
    if chance := within_chance(facts):
        words = f"within chance of the best: {', '.join(label(one) for one in chance)}"
        lines.append(terminal.wrapped(words, rest="  "))
    lines += [terminal.wrapped(f"failed: {one_line(one)}", rest="  ") for one in facts.outcome.failed]
    if facts.command:
        lines.append(f"reproduce       {facts.command}")
    return "\n".join(lines)


def one_line(failed: dict[str, Any]) -> str:
    """Return what is to be said of a failed trial."""
    return f"{label(failed)}: {failed['error']}"


def within_chance(facts: Facts) -> list[dict[str, Any]]:
    """Return the other finals whose interval overlaps the winner's: chance may have put them behind."""
    winner = facts.outcome.winner(facts.distance)
    if winner is None:
        return []
    high = winner["intervals"].get(facts.distance, (0.0, -1.0))[1]
    others = [one for one in facts.outcome.finals if one["key"] != winner["key"]]
    return [one for one in others if one["intervals"].get(facts.distance, (high + 1, 0.0))[0] <= high]


def page(facts: Facts, folder: Path) -> str:
    """Return the sweep as one HTML page that works offline."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    thresholds, scales, cells = cells_of(facts)
    search, finals = facts.outcome.search, facts.outcome.finals
    values = [one[facts.distance] for one in search]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"g": lambda value: f"{value:.3g}", "trial": label}
    return environment.get_template("sweep.html.j2").render(
        facts=facts,
        thresholds=thresholds,
        scales=scales,
        cells=cells,
        search=search,
        finals=sorted(finals, key=lambda one: one[facts.distance]),
        winner=facts.outcome.winner(facts.distance),
        best=min(values, default=None),
        chance=within_chance(facts),
        share={key: (one[facts.distance] - low) / (high - low or 1) for key, one in cells.items()},
        charts=[scatter_chart(one) for one in fronts(facts)] if search else [],
        pictures=[(one, file_uri(folder / "trials" / f"{one['key']}.png")) for one in search],
        failed=[one_line(one) for one in facts.outcome.failed],
    )
