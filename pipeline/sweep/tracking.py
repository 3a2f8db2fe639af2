"""MLflow for sweeps: one run for the sweep, one below it for every trial, each written once however often it is resumed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import tracking

SWEEP_TAG, TRIAL_TAG = "dpar.sweep", "dpar.trial"


class SweepRuns:
    """The sweep's run and those of its trials."""

    def __init__(self, client: Any, experiment: str, run: str, name: str) -> None:
        self.client, self.experiment, self.run = client, experiment, run
        self.tracker = tracking.MlflowTracker(client, run, run, f"sweep {name}")
        self.known = {one.data.tags[TRIAL_TAG] for one in self._trials()}

    def _trials(self) -> list[Any]:
        words = f"tags.`mlflow.parentRunId` = '{self.run}' and attributes.status = 'FINISHED'"
        found = self.client.search_runs([self.experiment], filter_string=words, max_results=5000)
        return [run for run in found if TRIAL_TAG in run.data.tags]

    def log_trial(self, result: dict[str, Any], picture: Path) -> None:
        """Write a trial's settings, scores with intervals and grid picture; once for each key."""
        from mlflow.entities import Metric, Param

        if result["key"] in self.known:
            return
        self.known.add(result["key"])
        shown = "" if result["threshold"] is None else f"{result['threshold']:g} nats, "
        tags = {
            "mlflow.parentRunId": self.run, TRIAL_TAG: result["key"], **_process(),
            "mlflow.runName": f"{'final ' if result['final'] else ''}{shown}cfg {result['cfg_scale']:g}",
        }  # fmt: skip
        run = self.client.create_run(self.experiment, tags=tags).info.run_id
        values = {name: value for name, value in result.items() if "/" in name and isinstance(value, int | float)}
        for name, (low, high) in result["intervals"].items():
            values |= {f"{name}_low": low, f"{name}_high": high}
        settings = ("threshold", "cfg_scale", "max_patch_length", "images", "first_seed", "final", "protocol_id")
        params = [Param(name, str(result[name])) for name in settings]
        now = int(os.path.getmtime(picture) * 1000)
        self.client.log_batch(run, metrics=[Metric(n, float(v), now, 0) for n, v in values.items()], params=params)
        self.client.log_artifact(run, str(picture))
        self.client.set_terminated(run, "FINISHED")

    def log_failure(self, failed: dict[str, Any]) -> None:
        """Write a trial that failed, with what it said."""
        tags = {"mlflow.parentRunId": self.run, "mlflow.runName": "failed trial", "mlflow.note.content": failed["error"]}
        run = self.client.create_run(self.experiment, tags=tags | _process()).info.run_id
        from mlflow.entities import Param

        self.client.log_batch(run, params=[Param(name, str(failed[name])) for name in ("threshold", "cfg_scale")])
        self.client.set_terminated(run, "FAILED")

    def log_winner(self, winner: str, command: str) -> None:
        """Say on the sweep's own page what won, and the command that does it again."""
        self.client.set_tag(self.run, "mlflow.note.content", f"**Winner:** {winner}\n\nDo it again:\n\n    {command}\n")

    @contextmanager
    def stage(self, name: str, params: Any) -> Iterator[tracking.MlflowTracker]:
        """Open a run below the sweep's for a stage that the sweep runs, as a training."""
        from pipeline.runner import whole_params

        run = self.client.create_run(
            self.experiment, tags={"mlflow.parentRunId": self.run, "mlflow.runName": name, **_process()}
        )
        tracker = tracking.MlflowTracker(self.client, run.info.run_id, self.run, name)
        tracker.log_params(whole_params(params))
        try:
            yield tracker
            tracker.close("FINISHED")
        except BaseException as error:
            tracker.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise


@contextmanager
def open_sweep(name: str, settings: dict[str, Any], *, root: Path) -> Iterator[SweepRuns]:
    """Open the run of a sweep, or go on with the one of an earlier start of the same sweep; it ends as the sweep ends."""
    client, experiment = tracking.connect(root)
    with tracking.locked(root):
        tracking.close_dead_runs(client, experiment)
        identity = f"{root.resolve()}:{name}"
        found = client.search_runs([experiment], filter_string=f"tags.`{SWEEP_TAG}` = '{identity}'", max_results=1)
        if found:
            run = found[0].info.run_id
            client.update_run(run, status="RUNNING")
        else:
            run = client.create_run(experiment, tags={SWEEP_TAG: identity, "mlflow.runName": f"sweep {name}"}).info.run_id
        for key, value in _process().items():
            client.set_tag(run, key, value)
    for key, value in settings.items():  # tags, as a sweep may be given more thresholds later and params are for ever
        client.set_tag(run, f"sweep.{key}", str(value))
    runs = SweepRuns(client, experiment, run, name)
    try:
        yield runs
        runs.tracker.flush()
        client.set_terminated(run, "FINISHED")
    except BaseException as error:
        client.set_terminated(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def _process() -> dict[str, str]:
    return {tracking.PID_TAG: str(os.getpid()), tracking.HOST_TAG: socket.gethostname()}
