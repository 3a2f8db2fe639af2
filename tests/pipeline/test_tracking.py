"""MLflow: one parent a pass, runs that end as they ended, metrics in batches."""

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import tracking
from pipeline.runner import load_stage
from stages.params import load_params, select
from tests.helpers.paths import ROOT


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    params = load_params(ROOT / "params.yaml")
    return tmp_path, params, select(params, load_stage("data").params)


def runs(root: Path):
    client, experiment = tracking.connect(root)
    return client, {run.info.run_name: run for run in client.search_runs([experiment])}


def test_stages_of_one_pass_hang_under_one_parent_with_their_numbers(project):
    root, params, chosen = project
    for stage in ("data", "features"):
        with tracking.open_tracker(stage, params, chosen, root=root) as tracker:
            for step in range(3):
                tracker.log_metrics({"train/loss": 3.0 - step, "eval/x": float(step)}, step=step)
            tracker.log_input("manifest", root / "m.parquet", "abc123")
            (root / "p.png").write_bytes(b"picture")
            tracker.log_picture(root / "p.png")
    client, found = runs(root)
    assert len(found) == 3
    parent = next(run for name, run in found.items() if name.startswith("pass "))
    for stage in ("data", "features"):
        run = found[stage]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert [m.value for m in client.get_metric_history(run.info.run_id, "train/loss")] == [3.0, 2.0, 1.0]
        assert run.inputs.dataset_inputs[0].dataset.digest == "abc123"
        assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["p.png"]
        assert run.data.params["data.source"] == "builtin"
    assert parent.data.metrics["data/eval/x"] == 2.0
    assert parent.data.params["sample.cfg_scale"] == str(params.sample.cfg_scale)


def test_a_stage_that_fails_or_is_stopped_says_so(project):
    root, params, chosen = project
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), tracking.open_tracker(status, params, chosen, root=root):
            raise error
        assert runs(root)[1][status].info.status == status


def test_a_run_whose_process_is_gone_is_closed_by_the_next(project):
    root, params, chosen = project
    client, experiment = tracking.connect(root)
    import socket

    tags = {tracking.PID_TAG: "999999999", tracking.HOST_TAG: socket.gethostname(), "mlflow.runName": "dead"}
    client.create_run(experiment, tags=tags)
    with tracking.open_tracker("data", params, chosen, root=root):
        pass
    assert runs(root)[1]["dead"].info.status == "KILLED"


def test_the_store_of_the_environment_is_obeyed(project, monkeypatch):
    root, params, chosen = project
    uri = f"sqlite:///{root / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with tracking.open_tracker("data", params, chosen, root=root):
        pass
    assert not (root / "mlflow.db").exists()
    assert MlflowClient(uri).get_experiment_by_name(tracking.EXPERIMENT) is not None


def test_a_store_that_cannot_be_used_gets_one_sentence(project, monkeypatch):
    root, params, chosen = project
    (root / "file").write_text("no folder")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/file/x.db")
    with pytest.raises(tracking.TrackingError, match="check MLFLOW_TRACKING_URI"):
        with tracking.open_tracker("data", params, chosen, root=root):
            pass
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
