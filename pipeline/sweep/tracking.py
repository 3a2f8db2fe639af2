"""MLflow for sweeps: one run for the sweep, one below it for every trial, each written once however often it is resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpar_core.files import digest_of
from pipeline.sweep.output import label
from pipeline.tracking.tracker import MlflowTracker, Recording, process_tags, recording, status_of
from stages.tools.sweep import Failure, TrialResult

SWEEP_TAG, TRIAL_TAG = "dpar.sweep", "dpar.trial"


class SweepRuns:
    """The sweep's run and those of its trials."""

    def __init__(self, records: Recording, run: str, name: str) -> None:
        self.records, self.run = records, run
        self.tracker = MlflowTracker(records, run, run, f"sweep {name}")

    def log_trial(self, result: TrialResult, picture: Path) -> None:
        """Write a trial's settings, scores with intervals and grid picture; once for each key."""
        name = f"{'final ' if result.trial.final else ''}{label(result.point)}"
        tags = {TRIAL_TAG: result.key, **process_tags()}
        run = self.records.run(digest_of([self.run, result.key]), name, tags=tags, parent=self.run, once=True)
        row = result.row()
        values = {name: value for name, value in (row | result.patches).items() if "/" in name}
        settings = ("threshold", "cfg_scale", "max_patch_length", "images", "first_seed", "final", "protocol_id")
        self.records.params(run, {name: row[name] for name in settings})
        # The time of the picture, so that a sweep that is resumed writes the same rows.
        self.records.metrics(run, values, time_ms=int(os.path.getmtime(picture) * 1000))
        self.records.artifact(run, picture)
        self.records.end(run, "FINISHED")

    def log_failure(self, failed: Failure) -> None:
        """Write a trial that failed, with its error."""
        tags = {"mlflow.note.content": failed.error, **process_tags()}
        key = digest_of([self.run, self.records.journal.folder.name, str(failed)])
        run = self.records.run(key, "failed trial", tags=tags, parent=self.run)
        self.records.params(run, asdict(failed.point))
        self.records.end(run, "FAILED")

    def log_winner(self, winner: str, command: str) -> None:
        """Write onto the sweep's own page what won, and the command that reproduces it."""
        note = f"**Winner:** {winner}\n\nReproduce it:\n\n    {command}\n"
        self.records.tags(self.run, {"mlflow.note.content": note})

    @contextmanager
    def stage(self, name: str, params: Any) -> Iterator[MlflowTracker]:
        """Open a run below the sweep's for a stage that the sweep runs, as a training."""
        from stages.params import flattened

        key = digest_of([self.run, self.records.journal.folder.name, name])
        run = self.records.run(key, name, tags=process_tags(), parent=self.run)
        self.records.params(run, flattened(params))
        tracker = MlflowTracker(self.records, run, self.run, name)
        with tracker.ending():
            yield tracker


@contextmanager
def open_sweep(name: str, settings: dict[str, Any], *, root: Path) -> Iterator[SweepRuns]:
    """Open the run of a sweep, or go on with the one of an earlier start of the same sweep; it ends as the sweep ends."""
    with recording(root, f"sweep-{name}") as records:
        identity = f"{root.resolve()}:{name}"
        run = records.run(digest_of(identity), f"sweep {name}", tags={SWEEP_TAG: identity})
        # Settings as tags: a sweep may be given more thresholds later, and params cannot be changed.
        records.tags(run, {**process_tags(), **{f"sweep.{key}": value for key, value in settings.items()}})
        try:
            yield SweepRuns(records, run, name)
        except BaseException as error:
            with suppress(OSError):
                records.end(run, status_of(error))
            raise
        records.end(run, "FINISHED")
