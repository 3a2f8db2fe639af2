"""MLflow for sweeps: one run for the sweep, one below it for every trial, each written once however often it is resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from dpar_core.files import digest_of
from pipeline.sweep.output import (
    Facts,
    SweepSettings,
    broken,
    headline,
    label,
    one_line,
    table_head,
    table_rows,
    within_chance,
)
from pipeline.tracking.models import model_used
from pipeline.tracking.summary import distance_metric, rounded, source_tags
from pipeline.tracking.system import system_metrics
from pipeline.tracking.tracker import MlflowTracker, Recording, process_tags, recording, status_of
from stages.params import Params, flattened
from stages.terminal import figures
from stages.tools.sweep import Failure, TrialResult

SWEEP_TAG, TRIAL_TAG = "dpar.sweep", "dpar.trial"


class SweepRuns:
    """The sweep's run and those of its trials.

    model: dpar or llamagen.
    distance: name of the score that is to become small, as "eval/fid".
    status: how the sweep's run ends, unless an error ends it.
    """

    def __init__(
        self, records: Recording, run: str, name: str, source: dict[str, str], *, model: str, distance: str
    ) -> None:
        self.records, self.run, self.name, self.model, self.distance = records, run, name, model, distance
        self.tags, self.status = {**process_tags(), **source}, "FINISHED"
        self.tracker = MlflowTracker(records, run, run, f"sweep {name}", source)

    def log_trial(self, result: TrialResult, picture: Path) -> None:
        """Write a trial's settings, scores with intervals and grid picture; once for each key."""
        # The time of the picture, so that a sweep that is resumed writes the same rows.
        ended = int(os.path.getmtime(picture) * 1000)
        run = self.records.run(
            digest_of([self.run, result.key]),
            f"{'final ' if result.trial.final else ''}{label(result.point)}",
            tags={TRIAL_TAG: result.key, "dpar.first_seed": str(result.trial.first_seed), **self.tags},
            parent=self.run,
            once=True,
            time_ms=ended - int(1000 * result.seconds),
        )
        row = result.row()
        values = {name: value for name, value in (row | result.patches).items() if "/" in name}
        # Seeds and finals are no axes to compare trials along.
        settings = ("threshold", "cfg_scale", "max_patch_length", "images", "protocol_id")
        self.records.params(run, {name: row[name] for name in settings})
        headline = distance_metric(self.model, result.value(self.distance))
        self.records.metrics(run, rounded(headline | values), time_ms=ended)
        self.records.artifact(run, picture)
        self.records.end(run, "FINISHED", time_ms=ended)

    def log_failure(self, failed: Failure) -> None:
        """Write a trial that failed, with its error."""
        key = digest_of([self.run, self.records.journal.folder.name, str(failed)])
        tags = {"mlflow.note.content": failed.error, **self.tags}
        run = self.records.run(key, f"failed {label(failed.point)}", tags=tags, parent=self.run)
        self.records.params(run, asdict(failed.point))
        self.records.end(run, "FAILED")

    def log_outcome(self, facts: Facts, metrics: dict[str, float], root: Path) -> None:
        """Give the sweep's run its name, metrics and note; one without any result ends as FAILED."""
        winner = facts.outcome.winner(facts.distance)
        self.records.tags(self.run, {"mlflow.note.content": note(facts)})
        if winner is None:
            self.status = "FAILED"
            return
        value = winner.value(facts.distance)
        name = f"sweep {self.name} · {facts.short} {figures(value, 4)} at {label(winner.point)}"
        self.records.tags(self.run, {"mlflow.runName": name})
        settings = {name: metrics[name] for name in ("sweep/threshold", "sweep/cfg_scale") if name in metrics}
        self.tracker.log_metrics(rounded(distance_metric(self.model, value) | metrics) | settings)
        model = None if facts.settings.retrain else model_used(self.model, root)
        if model is not None:
            self.tracker.log_model(model)

    @contextmanager
    def stage(self, name: str, params: Params) -> Iterator[MlflowTracker]:
        """Open a run below the sweep's for a stage that the sweep runs, as a training."""
        key = digest_of([self.run, self.records.journal.folder.name, name])
        run = self.records.run(key, name, tags=self.tags, parent=self.run)
        self.records.params(run, flattened(params))
        tracker = MlflowTracker(self.records, run, self.run, name, self.tracker.source)
        with tracker.ending():
            yield tracker


def note(facts: Facts) -> str:
    """Return the note of a sweep as Markdown: the winner, the finals (or the best of the search), and how to repeat it."""
    winner = facts.outcome.winner(facts.distance)
    failed = [f"Failed: {one_line(one)}" for one in facts.outcome.failed]
    if winner is None:
        return "\n\n".join([f"**{headline(facts)}.**", *failed])
    lines = [f"**{headline(facts)}**", ""]
    if chance := within_chance(facts):
        lines += [f"Within chance of it: {'; '.join(label(one.point) for one in chance)}", ""]
    lines += [
        f"| {' | '.join(cells)} |" for cells in (table_head(facts), ["---"] * len(table_head(facts)), *table_rows(facts))
    ]
    return "\n".join([*lines, "", *failed, "Reproduce the winner:", "", f"    {broken(facts.command, 72, rest=4)}"])


@contextmanager
def open_sweep(name: str, settings: SweepSettings, *, distance: str, root: Path) -> Iterator[SweepRuns]:
    """Open the run of a sweep, or go on with the one of an earlier start of the same sweep; it ends as the sweep ends."""
    with recording(root, f"sweep-{name}") as records:
        identity, source = f"{root.resolve()}:{name}", source_tags(root, "dpar-cli sweep")
        run = records.run(digest_of(identity), f"sweep {name}", tags={SWEEP_TAG: identity})
        runs = SweepRuns(records, run, name, source, model=settings.model, distance=distance)
        # Settings as tags: a sweep may be given more thresholds later, and params cannot be changed.
        records.tags(run, {**runs.tags, **{f"sweep.{key}": value for key, value in asdict(settings).items()}})
        try:
            with system_metrics(lambda values, count: records.metrics(run, values, count)):
                yield runs
        except BaseException as error:
            with suppress(OSError):
                records.end(run, status_of(error))
            raise
        records.end(run, runs.status)
