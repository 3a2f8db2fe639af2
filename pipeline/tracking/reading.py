"""What the MLflow store has of pipeline runs. A SQLite store is read without MLflow, whose import takes seconds."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpar_core.secrets import redacted
from pipeline.tracking.store import (
    EXPERIMENT,
    PASS_TAG,
    SQLITE_PATIENCE,
    TrackingError,
    connect,
    reason,
    sqlite_file,
    tracking_uri,
)

_STAGE_TAG, _PARENT_TAG, _PAGE = "dpar.stage", "mlflow.parentRunId", 1000
# Of what is not deleted, as MLflow's own search has it.
_RUNS = """
SELECT run_uuid, runs.name, status, start_time FROM runs JOIN experiments USING (experiment_id)
WHERE experiments.name = ? AND experiments.lifecycle_stage = 'active' AND runs.lifecycle_stage = 'active'
"""
_VALUES = (
    "SELECT run_uuid, {table}.key, {table}.value{more} FROM {table} JOIN tags AS whose USING (run_uuid) WHERE whose.key = ?"
)


@dataclass
class PipelineRun:
    """A pipeline run. started: seconds since 1970; stages: those that ran in it."""

    id: str
    name: str
    status: str
    started: float
    metrics: dict[str, float] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)


def pipeline_runs(root: Path) -> list[PipelineRun]:
    """Return the pipeline runs of a project, newest first. Raises TrackingError."""
    uri = tracking_uri(root)
    file = sqlite_file(uri)
    if file is None:
        return _asked(*connect(root))
    if not file.exists() or not file.stat().st_size:
        return []
    try:
        with closing(sqlite3.connect(file, timeout=SQLITE_PATIENCE)) as database:
            return _read(database)
    except sqlite3.Error as error:
        raise TrackingError(f"MLflow at {redacted(uri)} cannot be read: {reason(error)}") from error


def _read(database: sqlite3.Connection) -> list[PipelineRun]:
    passes = {one for (one,) in database.execute("SELECT run_uuid FROM tags WHERE key = ?", (PASS_TAG,))}
    found = [
        PipelineRun(identity, name or "", status, milliseconds / 1000)
        for identity, name, status, milliseconds in database.execute(f"{_RUNS} ORDER BY start_time DESC", (EXPERIMENT,))
        if identity in passes
    ]
    runs = {run.id: run for run in found}
    for identity, key, value in database.execute(_VALUES.format(table="params", more=""), (PASS_TAG,)):
        if identity in runs:
            runs[identity].params[key] = value
    for identity, key, value, unknown in database.execute(
        _VALUES.format(table="latest_metrics", more=", is_nan"), (PASS_TAG,)
    ):
        if identity in runs:
            runs[identity].metrics[key] = math.nan if unknown else value
    stages = (
        "SELECT whose.value, tags.value FROM tags JOIN tags AS whose USING (run_uuid) WHERE tags.key = ? AND whose.key = ?"
    )
    for parent, stage in database.execute(stages, (_STAGE_TAG, _PARENT_TAG)):
        if parent in runs:
            runs[parent].stages.append(stage)
    return found


def _asked(client: Any, experiment: str) -> list[PipelineRun]:
    found, stages = [], []
    for run in _pages(client, experiment):
        if PASS_TAG in run.data.tags:
            info, data = run.info, run.data
            found.append(
                PipelineRun(info.run_id, info.run_name, info.status, info.start_time / 1000, data.metrics, data.params)
            )
        elif _STAGE_TAG in run.data.tags:
            stages.append((run.data.tags.get(_PARENT_TAG), run.data.tags[_STAGE_TAG]))
    for run in found:
        run.stages = [stage for parent, stage in stages if parent == run.id]
    return found


def _pages(client: Any, experiment: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=_PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return
