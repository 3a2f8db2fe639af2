"""`dpar-cli runs`: what MLflow has of the runs, and what it is still to get."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.project import project_folder
from pipeline.tracking.ui import HEADLINE_METRICS

if TYPE_CHECKING:  # ui and --help need none of it
    from pipeline.tracking.reading import PipelineRun

runs_app = typer.Typer(help="List the pipeline runs in MLflow, show one, or send what MLflow missed.")
MOST_CHANGES = 4  # params named under a run


@runs_app.callback(invoke_without_command=True)
def list_runs(context: typer.Context) -> None:
    """List the pipeline runs in MLflow, newest first; `dpar-cli runs show ID` has one with its params.

    Reads the store. ID is the beginning of MLflow's run id.
    """
    if context.invoked_subcommand is None:
        print("\n".join(run_lines(_pipeline_runs())))


@runs_app.command("show")
def show_run(identity: Annotated[str, typer.Argument(help="Run id, or its beginning.")]) -> None:
    """Show one pipeline run: its name, status, metrics, and the params in which it differs from params.yaml.

    Reads the store and params.yaml.
    """
    from stages.params import flattened, load_params

    found = [run for run in _pipeline_runs() if run.id.startswith(identity)]
    if len(found) != 1:
        count = "no run begins" if not found else f"{len(found)} runs begin"
        raise ValueError(f"{count} with {identity!r}, expected one: `dpar-cli runs` lists them")
    now = {name: str(value) for name, value in flattened(load_params(Path("params.yaml"))).items()}
    print("\n".join(show_lines(found[0], now)))


def _pipeline_runs() -> list[PipelineRun]:
    """Return the pipeline runs, newest first, once the store has all of what processes left that are gone."""
    from pipeline.tracking import outbox
    from pipeline.tracking.reading import pipeline_runs
    from stages.terminal import note

    root = project_folder()
    outbox.sync(outbox.Outbox(root, note))
    return pipeline_runs(root)


def run_lines(runs: Sequence[PipelineRun]) -> list[str]:
    """Return a table of pipeline runs for the terminal's width; under each the params that changed since the one before.

    runs: newest first.
    """
    from stages.terminal import columns, shortened, wrapped

    if not runs:
        return ["no pipeline run yet: dpar-cli run"]
    narrow = columns() < 72  # the name goes below
    head = f"{'id':8}  {'started':11}  {'status':8}  {'loss':>9}  {'distance':>9}  {'speed':>5}"
    lines = [head if narrow else f"{head}  name"]
    for run, before in zip(runs, (*runs[1:], None)):
        found, params = run.metrics, run.params
        loss, distance = (
            "/".join(f"{found[name]:.2f}" for name in (f"dpar_{what}", f"baseline_{what}") if name in found)
            for what in ("loss", "distance")
        )
        speed = f"{found['training_speed']:.2f}" if "training_speed" in found else ""
        started = time.strftime("%m-%d %H:%M", time.localtime(run.started))
        name = run.name.partition(" · ")[0]
        line = f"{run.id[:8]}  {started}  {run.status:8}  {loss:>9}  {distance:>9}  {speed:>5}"
        lines.append(shortened(line if narrow else f"{line}  {name}", columns()).rstrip())
        below = [name] if narrow else []
        if run.stages and not found:  # some stages made again
            below.append("stages " + ", ".join(run.stages))
        old = {} if before is None else before.params
        changed = [f"{key} {old[key]} -> {params[key]}" for key in params if key in old and old[key] != params[key]]
        if changed:
            more = [f"{len(changed) - MOST_CHANGES} more"] if len(changed) > MOST_CHANGES else []
            below.append(", ".join([*changed[:MOST_CHANGES], *more]))
        lines += [wrapped(words, first=" " * 10, rest=" " * 10) for words in below]
    return [shortened(lines[0], columns()), *lines[1:], "", "loss, distance: DPAR/baseline; speed: of training"]


def show_lines(run: PipelineRun, params: Mapping[str, str]) -> list[str]:
    """Return one pipeline run. params: those of params.yaml, by dotted name; a run has what `auto` meant on its machine."""
    from stages.terminal import wrapped

    lines = [wrapped(run.name), f"  {run.status}, {run.id}"]
    lines += [f"  {name:18} {run.metrics[name]:.4g}" for name in HEADLINE_METRICS if name in run.metrics]
    other = {name: value for name, value in run.params.items() if params.get(name, value) not in (value, "auto")}
    lines.append("params as in params.yaml" if not other else "params that differ from params.yaml (run, params.yaml):")
    return [*lines, *(wrapped(f"  {name} {value}, {params[name]}", rest="    ") for name, value in sorted(other.items()))]


@runs_app.command("sync")
def sync_runs() -> None:
    """Send to MLflow what it missed while it was away.

    Reads the journals in work/tracking/ of processes that are gone, and removes those that are delivered. The next run
    does the same by itself. Exit 1 with the reason when MLflow cannot be written.
    """
    from pipeline.tracking import outbox
    from stages.terminal import print_fitted

    root = project_folder()
    sender = outbox.Outbox(root, print_fitted)
    waiting = len(outbox.journals(root))
    count = outbox.sync(sender)
    left = len(outbox.journals(root))
    if not waiting:
        print_fitted(f"nothing waits for MLflow at {sender.uri}")
        return
    who = "1 process" if waiting - left == 1 else f"{waiting - left} processes"
    print_fitted(f"sent {count} records of {who} to MLflow at {sender.uri}")
    if left:
        print_fitted(f"{left} more belong to processes that are still at work, which send them themselves")
