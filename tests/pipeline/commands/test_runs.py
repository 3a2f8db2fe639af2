"""`dpar-cli runs`: pipeline runs as a table, and what one changed."""

import importlib
import re
import shutil
import socket
import tomllib

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands.runs import run_lines, show_lines, sync_runs
from pipeline.tracking import outbox, reading, store
from pipeline.tracking.journal import Journal
from pipeline.tracking.reading import PipelineRun, pipeline_runs
from pipeline.tracking.ui import APP, HEADLINE_METRICS, check_port, runs_address
from tests.helpers.mlflow_stores import closed_port
from tests.helpers.paths import ROOT


def run(name="demo · DPAR 2.79 / baseline 2.86 nats", steps="480", **metrics):
    params = {"seed": "0", "train.steps": steps, "train.precision": "fp32", "gone": "1"}
    return PipelineRun("0123456789abcdef", name, "FINISHED", 1_700_000_000.0, metrics, params, ["data", "report"])


def test_runs_are_a_table_of_80_columns_with_what_changed_since_the_one_before():
    found = {"dpar_loss": 2.791, "baseline_loss": 2.862, "dpar_distance": 5.53, "baseline_distance": 6.17}
    lines = run_lines([run(training_speed=1.07, **found), run("own params · 2026-11-27 16:40:12", steps="8")])
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("01234567  ") and lines[1].endswith("2.79/2.86  5.53/6.17   1.07  demo")
    assert lines[2].split(maxsplit=1) == ["train.steps", "8 -> 480"]
    assert lines[3].endswith("own params") and lines[4].strip() == "stages data, report"
    assert run_lines([]) == ["no pipeline run yet: dpar-cli run"]


def test_one_run_shows_its_metrics_and_the_params_that_differ():
    lines = show_lines(run(dpar_loss=2.791), {"seed": "0", "train.steps": "8"})
    assert lines[:2] == ["demo · DPAR 2.79 / baseline 2.86 nats", "  FINISHED, 0123456789abcdef"]
    assert lines[2].split() == ["dpar_loss", "2.791"]
    assert lines[3:] == ["params that differ from params.yaml (run, params.yaml):", "  train.steps 480, 8"]
    same = {"seed": "0", "train.steps": "480", "train.precision": "auto"}
    assert show_lines(run(), same)[-1] == "params as in params.yaml"


def test_the_store_is_read_as_mlflow_reads_it(fresh_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert pipeline_runs(tmp_path) == [] and list(tmp_path.iterdir()) == []
    shutil.copy(fresh_store, tmp_path)
    client, experiment = store.connect(tmp_path)
    for number in range(3):
        made = client.create_run(
            experiment, start_time=1000 * number + 1000, run_name=f"run {number}", tags={store.PASS_TAG: "a"}
        )
        client.log_param(made.info.run_id, "train.steps", number)
        for step, value in enumerate((5.0, float("inf"), 3.0)[: number + 1]):
            client.log_metric(made.info.run_id, "dpar_loss", value, step=step)
        below = client.create_run(experiment, tags={"mlflow.parentRunId": made.info.run_id, "dpar.stage": "data"})
        client.log_param(below.info.run_id, "other", "1")
        client.set_terminated(made.info.run_id, "FAILED")
    client.create_run(client.create_experiment("another"), tags={store.PASS_TAG: "a"})
    found = pipeline_runs(tmp_path)
    assert [(one.name, one.status, one.started, one.params, one.stages) for one in found] == [
        (f"run {number}", "FAILED", number + 1, {"train.steps": str(number)}, ["data"]) for number in (2, 1, 0)
    ]
    assert [one.metrics["dpar_loss"] for one in found][::2] == [3.0, 5.0]
    asked = reading._asked(client, experiment)
    assert asked == found
    client.delete_run(found[0].id)
    assert pipeline_runs(tmp_path) == found[1:]
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(store.TrackingError, match="not an SQLite database: restore or move it"):
        pipeline_runs(tmp_path)


def test_sync_sends_what_dead_processes_left_and_leaves_the_living_alone(fresh_store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(fresh_store, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no dvc.yaml in .* go to the project's folder"):
        sync_runs()
    (tmp_path / "dvc.yaml").touch()
    sync_runs()
    dead, living = (Journal(outbox.journal_folder(tmp_path), name) for name in ("dead", "living"))
    for journal in (dead, living):
        journal.write("run", journal.folder.name, {"name": journal.folder.name, "tags": {}, "parent": None, "once": False})
        journal.write("metrics", journal.folder.name, {"values": {"loss": 1.0}, "step": 1})
    dead.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", closed_port().replace("://", "://user:hunter2@"))
    with pytest.raises(store.TrackingError, match="nothing listens there") as away:
        sync_runs()
    assert "hunter2" not in str(away.value) and dead.folder.exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sync_runs()
    said = capsys.readouterr().out.replace("\n  ", " ")
    assert said.startswith("nothing waits for MLflow at sqlite:///")
    assert "sent 3 records of 1 process to MLflow at sqlite:///" in said  # and its end, KILLED, which it could not write
    assert "1 more belong to processes that are still at work" in said
    assert not dead.folder.exists() and living.folder.exists()
    living.close()
    sync_runs()
    assert "sent 3 records of 1 process" in capsys.readouterr().out and outbox.journals(tmp_path) == []


def test_mlflow_finds_the_page_that_sets_what_the_browser_keeps_before_its_own():
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mlflow.app"]
    module, _, name = entries[APP].partition(":")
    first = getattr(importlib.import_module(module), name).router.routes[0]
    address = runs_address("7", 5001)
    assert address == f"http://127.0.0.1:5001{first.path}#/experiments/7/runs?workflowType=machine_learning"
    page = first.endpoint(None).body.decode()
    assert "machine_learning" in page and all(f"metrics.`{metric}`" in page for metric in HEADLINE_METRICS)
    pattern = re.search(r"match\(/(.*)/\)", page)[1]  # by which the page finds the experiment in its address
    assert re.search(pattern, address)[1] == "7"


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ValueError, match="choose another with --port"):
        check_port(other.getsockname()[1])


@pytest.mark.parametrize("port", ["-1", "0", "65536"])
def test_a_port_that_cannot_be_is_refused(port):
    assert CliRunner().invoke(app, ["ui", "--no-browser", "--port", port]).exit_code == 2
