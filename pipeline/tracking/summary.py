"""What a pipeline run shows in MLflow's table of runs: a readable name, a few short metrics, tags, and a note.

The children hold everything else. Names here are stable: tables and charts of MLflow are saved by them.
"""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.code import code_identity, commit_of, git
from pipeline.headline import Headline, Value, speeds

WORST_TAG = "dpar.worst"  # how the worst stage of a pipeline run ended, where that is not FINISHED
# (stage, what its metric begins with) -> name at the parent
_SHORT = {
    ("train_dpar", "validation/loss"): "dpar_loss",
    ("train_llamagen", "validation/loss"): "baseline_loss",
    ("score_dpar", "eval/fid"): "dpar_distance",
    ("score_dpar", "eval/fd_"): "dpar_distance",
    ("score_llamagen", "eval/fid"): "baseline_distance",
    ("score_llamagen", "eval/fd_"): "baseline_distance",
}


def short_metrics(stage: str, last: Mapping[str, float]) -> dict[str, float]:
    """Return what of a stage's last metrics the pipeline run shows until its report is there, under short names."""
    return {
        short: value
        for (owner, start), short in _SHORT.items()
        for name, value in last.items()
        if owner == stage and name.startswith(start)
    }


def child_name(stage: str, stages: list[str]) -> str:
    """Return the name of a stage's run: sorted by name, the runs stand in the order of the workflow."""
    return f"{stages.index(stage) + 1:02d} {stage}" if stage in stages else stage


def source_tags(root: Path, command: str) -> dict[str, str]:
    """Return who started a run, by which command, and at which commit (with `-dirty` where files differ from it)."""
    tags = {"mlflow.source.name": command, "mlflow.source.type": "PROJECT"}
    tags |= {f"dpar.code.{name}": value for name, value in code_identity().items()}
    with suppress(KeyError, OSError):  # a user id without a name, as in some containers
        tags["mlflow.user"] = getpass.getuser()
    if commit := git(root, "rev-parse", "HEAD"):
        tags |= {"mlflow.source.git.commit": commit, "dpar.git": commit_of(root)}
    return tags


def losses(headline: Headline) -> tuple[float, float]:
    """Return the validation losses of DPAR and its baseline at equal steps."""
    row = headline["verdicts"][0]["rows"][0]
    return row["dpar"]["value"], row["baseline"]["value"]


def run_name(preset: str, headline: Headline) -> str:
    """Return the name of a finished pipeline run: `demo · DPAR 2.79 / baseline 2.86 nats`."""
    dpar, baseline = losses(headline)
    return f"{preset} · DPAR {dpar:.2f} / baseline {baseline:.2f} nats"


def headline_metrics(headline: Headline) -> dict[str, float]:
    """Return what the report says of a pipeline run under short names; a speed in doubt is left out.

    Losses and distances are among it, as a run may consist of the report alone.
    """
    ratios = {f"{name}_speed": speed["ratio"] for name, speed in speeds(headline).items()}
    found = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    for row in headline["verdicts"][0]["rows"]:
        what = "loss" if row["words"] == "validation loss" else "distance" if row["words"].startswith(("FID", "fd_")) else ""
        if what:
            found |= {f"dpar_{what}": row["dpar"]["value"], f"baseline_{what}": row["baseline"]["value"]}
    return rounded(found)  # as in artifacts/metrics.json


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return values to four digits: MLflow's pages print every digit there is."""
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def distance_metric(model: str, value: float) -> dict[str, float]:
    """Return a sweep's distance under the name that fills the column of pipeline runs. model: dpar or llamagen."""
    return {f"{'baseline' if model == 'llamagen' else model}_distance": value}


def note(preset: str, headline: Headline) -> str:
    """Return the note of a pipeline run as Markdown: badge, verdicts, the table, how to make it again."""
    lines = [f"**{headline['headline']}**", "", headline["badge"], ""]
    for verdict in headline["verdicts"]:
        lines += [f"- *{verdict['title']}.* {verdict['sentence']}"]
    lines += ["", "| at equal steps | DPAR | baseline |", "|---|---|---|"]
    for row in headline["verdicts"][0]["rows"]:
        lines.append(f"| {row['words']} | {_estimate(row['dpar'])} | {_estimate(row['baseline'])} |")
    for name, speed in speeds(headline).items():
        words = speed["doubt"] or f"DPAR {speed['ratio']:.2f} times the baseline"
        lines.append(f"\nSpeed of {name}: {words}")
    again = f"dpar-cli params use {preset}" if preset != "own params" else "the params of this run"
    return "\n".join([*lines, "", f"Again: `{again}`, then `dpar-cli run`. The page is the artifact index.html."])


def _estimate(one: Value) -> str:
    ends = one["interval"]
    return f"{one['value']:.4g}" + ("" if ends is None else f" ({ends[0]:.4g} to {ends[1]:.4g})")
