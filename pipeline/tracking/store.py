"""The MLflow store: where it is, how it is opened, and what is wrong with it in one sentence."""

from __future__ import annotations

import glob
import os
import re
import secrets
import sqlite3
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

from dpar_core.secrets import redacted
from stages.workers import lock

EXPERIMENT = "dpar"
PASS_TAG, PID_TAG, HOST_TAG, STARTED_TAG = "dpar.pass", "dpar.pid", "dpar.host", "dpar.started"
SQLITE_PATIENCE = 10.0  # seconds to wait for another process's transaction before saying that it holds the store


class TrackingError(RuntimeError):
    """MLflow could not be written; the message names the address, the reason and the way out."""


def quiet_environment() -> None:
    """Set what keeps MLflow and its libraries quiet, within the machine and short of patience. Before importing them."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false"),
        ("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false"),
        ("MLFLOW_LOGGING_LEVEL", "CRITICAL"),  # it logs its errors with pages of SQL; ours is one sentence
        ("GIT_PYTHON_REFRESH", "quiet"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "6"),  # MLflow's own 120 s and 7 retries are minutes of silence
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
    ):
        os.environ.setdefault(name, value)


def store_root(root: Path) -> Path:
    """Return the folder that holds the store of a project.

    `dvc exp run --temp` and `--queue` work in a copy below `.dvc/tmp/exps`, which is removed at the end: their runs belong
    to the project that the copy was made of.
    """
    root = root.resolve()
    for folder in root.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return root


def tracking_uri(root: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or the SQLite store in the project."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named:
        return named
    path = store_root(root) / "mlflow.db"
    # An address cannot hold these characters, and SQLAlchemy has no way to escape them in a path: name it from here.
    return f"sqlite:///{os.path.relpath(path) if re.search(r'[?#%]', str(path)) else path}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file that SQLAlchemy opens for a SQLite address, None where it is another kind of address or in memory."""
    if not uri.startswith("sqlite:///"):
        return None
    name: str | None = uri.removeprefix("sqlite:///").split("?")[0]
    if "%" in uri:  # which SQLAlchemy decodes since 2.1
        from sqlalchemy.engine import make_url

        name = make_url(uri).database
    return Path(name) if name and name != ":memory:" else None


def connect(root: Path) -> tuple[Any, str]:
    """Return (client, experiment id); store and experiment are made once, under a lock. Raises TrackingError."""
    uri = tracking_uri(root)
    try:
        with locked(root):
            if file := sqlite_file(uri):
                _open_sqlite(uri, file)
            client = _client(uri)
            here = None if os.environ.get("MLFLOW_TRACKING_URI") else (store_root(root) / "mlartifacts").as_uri()
            return client, _experiment(client, root, here)
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(f"MLflow at {redacted(uri)} cannot be used: {reason(error)}") from error


def _client(uri: str) -> Any:
    quiet_environment()
    from mlflow import MlflowClient

    if not uri.startswith(("http:", "https:", "databricks")):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 2  # its 15 tries take 54 minutes
    return MlflowClient(tracking_uri=uri)


def _experiment(client: Any, root: Path, here: str | None) -> str:
    """Return the experiment's id. here: where its artifacts belong, None where the store decides."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        # Without this tag the pages open as those of a product for language models.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        created: str = client.create_experiment(EXPERIMENT, artifact_location=here, tags=kind)
        return created
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {EXPERIMENT!r} was deleted: bring it back with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, or end it with `mlflow gc`"
        )
    if here is not None and experiment.artifact_location != here:
        _move_artifacts(store_root(root) / "mlflow.db", experiment.artifact_location, here)
    found: str = experiment.experiment_id
    return found


def _move_artifacts(database: Path, old: str, new: str) -> None:
    """Let the runs of a project that was copied or moved keep their artifacts in it, not where the original was."""
    with closing(sqlite3.connect(database, timeout=SQLITE_PATIENCE)) as connection, connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = ? WHERE name = ? AND artifact_location = ?", (new, EXPERIMENT, old)
        )
        connection.execute(
            "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
            (new, len(old) + 1, len(old) + 1, f"{old}/"),
        )
        connection.execute(
            "UPDATE logged_models SET artifact_location = ? || substr(artifact_location, ?)"
            " WHERE substr(artifact_location, 1, ?) = ?",
            (new, len(old) + 1, len(old) + 1, f"{old}/"),
        )


def _open_sqlite(uri: str, file: Path) -> None:
    """Raise what keeps a SQLite file from being written, in seconds and without MLflow's retries; make a new one.

    A new one is made while its empty file is locked, so that no other process, of another project either, makes it too.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file, timeout=SQLITE_PATIENCE, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        if not file.stat().st_size:
            _make_sqlite(uri, file)
        connection.execute("ROLLBACK")


def _make_sqlite(uri: str, file: Path) -> None:
    """Make a new SQLite store whole or not at all: a process that ends among MLflow's migrations leaves a file that no later
    one can use, and on a busy machine they take long."""
    for left in file.parent.glob(f"{glob.escape(file.name)}.new-*"):
        left.unlink()
    ending = (
        f".new-{secrets.token_hex(4)}"  # another each time: MLflow keeps a connection to each address that it has opened
    )
    address, mark, query = uri.partition("?")
    _client(f"{address}{ending}{mark}{query}").get_experiment_by_name(EXPERIMENT)
    os.replace(f"{file}{ending}", file)


_REASONS = (
    (r"database is locked|database table is locked", "another process holds the database: end it, or wait for it"),
    (r"readonly database|read-only|Read-only", "the store is read-only: make it writable for this user"),
    (r"database or disk is full|No space left|Disk quota|disk I/O error", "the disk is full or fails: free some space"),
    (
        r"unable to open database file|Not a directory|File exists",
        "the database file cannot be opened: check that its folder exists and is writable",
    ),
    (r"file is not a database|malformed|disk image", "the file is damaged or not an SQLite database: restore or move it"),
    (
        r"_alembic_tmp_\w+ already exists",
        "a process was stopped while it changed the tables: restore the file, or move it away, then `dpar-cli runs sync`",
    ),
    (r"out-of-date database schema", "it was made by another version of MLflow: `mlflow db upgrade` with its address"),
    (
        r"filesystem tracking backend",
        "MLflow keeps no runs in folders: set MLFLOW_TRACKING_URI to http://... or sqlite:///...",
    ),
    (r"Connection refused", "nothing listens there: start the server, or set MLFLOW_TRACKING_URI"),
    (r"timed out|Timeout", "it accepts connections but does not answer: look at the server"),
    (
        r"Name or service not known|resolve|getaddrinfo|nodename nor servname",
        "the name of its host is unknown: check MLFLOW_TRACKING_URI",
    ),
    (r"Invalid Host header|\b403\b|PERMISSION_DENIED", "it refuses this client (HTTP 403): check the rights of your user"),
    (
        r"\b401\b|CUSTOMER_UNAUTHORIZED|UNAUTHENTICATED",
        "it asks for a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    (r"error code (5\d\d)|\b(50[0234])\b", "it answers with a server error (HTTP 5xx): look at its log"),
    (r"error code 404|ENDPOINT_NOT_FOUND", "the server at this address is not MLflow (HTTP 404): check MLFLOW_TRACKING_URI"),
    (r"Connection aborted|reset by peer|Remote end closed|Max retries", "the connection broke: look at the server"),
)


def reason(error: BaseException) -> str:
    """Return what an error of MLflow, SQLAlchemy or the network means, with the way out, on one line."""
    text = str(error) or type(error).__name__
    for pattern, sentence in _REASONS:
        if re.search(pattern, text):
            return sentence
    first = redacted(" ".join(text.split("\n", 1)[0].split()))[:200]
    return f"{first} ({type(error).__name__}): check MLFLOW_TRACKING_URI"


def locked(root: Path) -> AbstractContextManager[None]:
    """Hold the lock under which runs are found and made: two processes never make the same one."""
    return lock.locked(store_root(root) / "work" / ".mlflow.lock")
