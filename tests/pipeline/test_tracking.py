"""MLflow: one parent per pipeline run, runs that end as they ended, and nothing lost while the store is away."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from dpar_core.files import digest_of, save_weights, write_record
from pipeline.runner import load_stage
from pipeline.tracking import journal, models, outbox, reading, store, summary, system, tracker
from pipeline.tracking.journal import Journal
from pipeline.tracking.outbox import Away, Outbox, sync
from stages.artifacts import HEADLINE, MODELS, REPORT_PAGE, SAMPLE_GRID, SAMPLE_PROTOCOL, SAMPLES, Artifact
from stages.params import load_params, select
from stages.workers.child import command
from tests.helpers.mlflow_stores import closed_port, delivered, failing_server, headline_of_a_run, runs, silent_server
from tests.helpers.paths import ROOT


@pytest.fixture
def project(fresh_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracker, "CLOSE_SECONDS", 120.0)  # importing MLflow takes long on a busy machine
    shutil.copy(fresh_store, tmp_path)
    params = load_params(ROOT / "params.yaml")
    return tmp_path, params, select(params, load_stage("data").params)


def journal_of_a_run(root: Path, *, steps: int = 3, close: bool = True) -> Journal:
    """Write what a stage would."""
    journal = Journal(outbox.journal_folder(root), "train")
    journal.write("run", "parent", {"name": "pass", "tags": {store.PASS_TAG: "parent"}, "parent": None, "once": False})
    journal.write("run", journal.folder.name, {"name": "train", "tags": {}, "parent": "parent", "once": False})
    journal.write("params", journal.folder.name, {"lr": "0.1"})
    now = int(time.time() * 1000) - steps
    for step in range(steps):
        journal.write("metrics", journal.folder.name, {"values": {"loss": 3.0 - step}, "step": step}, time_ms=now + step)
    picture = root / "p.png"
    picture.write_bytes(b"picture")
    journal.write_file(journal.folder.name, picture)
    made_model = models.LoggedModel("dpar", "d1ge57", "dpar", True, "", {"width": "32"}, {})
    measured = [["loss", 3.0 - steps + 1, steps - 1, now + steps - 1]]
    journal.write("model", journal.folder.name, {**vars(made_model), "dataset": ["tokens", "abc"], "metrics": measured})
    picture.unlink()
    if close:
        for run in (journal.folder.name, "parent"):
            journal.write("end", run, {"status": "FINISHED"})
        journal.close()
    return journal


def history(root: Path, name: str = "train") -> list[float]:
    client, found = runs(root)
    rows = client.get_metric_history(found[name].info.run_id, "loss")
    return [row.value for row in sorted(rows, key=lambda row: (row.timestamp, row.step))]


def test_the_stages_of_a_pipeline_run_share_the_process_that_delivers_their_journals(project, monkeypatch):
    root, params, chosen = project
    dvc = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(tracker, "pass_identity", lambda _: ("a run", "at noon", psutil.Process(dvc.pid)))
    couriers = set()
    for stage in ("data", "patch_maps"):
        with tracker.open_tracker(stage, params, chosen, root=root) as one:
            one.log_metrics({"train/loss": 3.0})
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.ZombieProcess):  # of an earlier test
                couriers |= {process.pid} if str(root) in process.cmdline() else set()
        assert not outbox.journals(root)  # a stage ends when MLflow has all of it
    assert len(couriers) == 1
    dvc.communicate()
    ended = time.monotonic() + 120
    while outbox.at_work(root, digest_of(["a run", store.tracking_uri(root)])):
        assert time.monotonic() < ended, "it outlives its pipeline run"
        time.sleep(0.05)


@pytest.fixture
def by_hand(monkeypatch):
    """No process beside this one delivers: the test does."""
    monkeypatch.setattr(tracker, "launch", lambda *_: None)


def test_one_pipeline_run_through_the_client(project, by_hand, monkeypatch):
    root, params, chosen = project
    artifacts = root / "artifacts"
    meta = {"tokens": "0123", "classes": ["x" * 300], "step": 7}
    digest = save_weights(made(MODELS["dpar"], root), {}, kind="dpar", config={"width": 32}, meta=meta)
    made(SAMPLES["dpar"], root).mkdir()
    write_record(SAMPLES["dpar"].below(artifacts) / SAMPLE_PROTOCOL, {"made_by": {"model": digest, "tokenizer": digest}})
    (SAMPLES["dpar"].below(artifacts) / SAMPLE_GRID).write_bytes(b"grid")
    made(HEADLINE, root).write_text(json.dumps(headline_of_a_run()))
    REPORT_PAGE.below(artifacts).write_text("<html>")
    (root / "dvc.lock").write_text("schema: '2.0'")
    monkeypatch.setattr(system, "FIRST_SECONDS", 0.01)
    with tracker.open_tracker("train_dpar", params, chosen, root=root) as one:
        one.log_input("tokens", root / "tokens", "abc123")
        for step in range(3):
            one.log_metrics({"train/loss": 3.0 - step}, step=step)
        one.log_metrics({"validation/loss": 2.79, "train/loss": 1.5})
        (root / "p.png").write_bytes(b"picture")
        one.log_picture(root / "p.png")
        time.sleep(0.05)
    with tracker.open_tracker("score_dpar", params, chosen, root=root) as one:
        one.log_input("reference", root / "m.parquet", "def456")
        one.log_metrics({"eval/fd_demo": 3.5, "eval/recall": 0.5})
    with tracker.open_tracker("report", params, chosen, root=root):
        pass
    sync(Outbox(root, print))
    client, found = runs(root)
    parent = found.pop("own params · DPAR 2.79 / baseline 2.86 nats")
    assert sorted(found) == ["08 train_dpar", "14 score_dpar", "16 report"]
    assert {run.info.status for run in (parent, *found.values())} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    said = {"dpar_loss": 2.791, "baseline_loss": 2.862, "training_speed": 1.07}  # by the report
    assert parent.data.metrics == {**said, "dpar_distance": 3.5}
    assert {"mlflow.user", "dpar.code.source"} < set(parent.data.tags) and len(parent.data.tags["dpar.dvc_lock"]) == 16
    assert parent.data.tags["mlflow.source.name"] == "dvc repro"
    assert parent.data.tags["mlflow.note.content"].startswith("**No clear difference at equal steps.**")
    assert parent.data.params["sample.cfg_scale"] == str(params.sample.cfg_scale)
    assert {one.path for one in client.list_artifacts(parent.info.run_id)} == {"index.html", "grid.png"}
    training, scoring, _ = (run for _, run in sorted(found.items()))
    assert [m.value for m in client.get_metric_history(training.info.run_id, "train/loss")] == [3.0, 2.0, 1.0]
    assert len(client.get_metric_history(training.info.run_id, "validation/loss")) == 1
    assert training.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert training.inputs.dataset_inputs[0].dataset.digest == "abc123"
    assert [one.path for one in client.list_artifacts(training.info.run_id)] == ["p.png"]
    (model,) = client.search_logged_models([parent.info.experiment_id])
    assert (model.name, model.model_type, model.status, model.source_run_id) == (
        "dpar",
        "dpar",
        "READY",
        training.info.run_id,
    )
    assert model.params == {"width": "32", "tokens": "0123", "step": "7"}
    assert model.tags["dpar.digest"] == digest and model.tags["dpar.file"] == "artifacts/models/dpar/model.safetensors"
    assert {(m.key, m.value, m.dataset_name, m.dataset_digest, m.run_id) for m in model.metrics} == {
        ("train/loss", 1.0, "tokens", "abc123", training.info.run_id),
        ("validation/loss", 2.79, "tokens", "abc123", training.info.run_id),
        ("eval/fd_demo", 3.5, "reference", "def456", scoring.info.run_id),
        ("eval/recall", 0.5, "reference", "def456", scoring.info.run_id),
    }
    training, scoring = (client.get_run(run.info.run_id) for run in (training, scoring))
    assert [one.model_id for one in training.outputs.model_outputs] == [model.model_id]
    assert [one.model_id for one in scoring.inputs.model_inputs] == [model.model_id]


def made(artifact: Artifact, root: Path) -> Path:
    """Return the place of an artifact, its folder made."""
    path = artifact.below(root / "artifacts")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_stage_that_fails_or_is_stopped_ends_so(project, monkeypatch, error, status):
    root, params, chosen = project
    monkeypatch.setattr(tracker, "launch", lambda *_: None)
    with pytest.raises(error, match="why"), tracker.open_tracker("data", params, chosen, root=root):
        raise error("why")
    (folder,) = outbox.journals(root)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["data"]["status"] for event in events if event["op"] == "end"] == [status, status]


def test_a_run_whose_process_is_gone_is_closed_by_the_next(project):
    root, *_ = project
    client, experiment = store.connect(root)
    host = {store.HOST_TAG: socket.gethostname()}
    client.create_run(experiment, tags=host | {store.PID_TAG: "999999999", "mlflow.runName": "dead"})
    client.create_run(experiment, tags=host | {store.PID_TAG: str(os.getpid()), "mlflow.runName": "alive"})
    reused = {store.PID_TAG: str(os.getpid()), store.STARTED_TAG: "1000.0", "mlflow.runName": "its number is another's now"}
    client.create_run(experiment, tags=host | reused)
    journal_of_a_run(root)
    sync(Outbox(root, print))
    status = {name: run.info.status for name, run in runs(root)[1].items()}
    assert (status["dead"], status["alive"], status["its number is another's now"]) == ("KILLED", "RUNNING", "KILLED")


def test_a_journal_whose_writer_was_killed_is_delivered_and_its_runs_end_killed(project):
    root, *_ = project
    journal = journal_of_a_run(root, close=False)
    assert sync(Outbox(root, print)) == 0  # its writer lives: it is left alone
    with open(journal.folder / "events.jsonl", "a") as stream:
        stream.write('{"op": "metrics", "run": "tr')  # killed in the middle of a line
    journal.close()
    sync(Outbox(root, print))
    assert history(root) == [3.0, 2.0, 1.0]
    assert {name: run.info.status for name, run in runs(root)[1].items()} == {"train": "KILLED", "pass": "KILLED"}


def check_model(client: MlflowClient, run) -> None:
    """Check that the journal's model is there once, linked once."""
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (model.status, model.source_run_id, len(model.metrics)) == ("READY", run.info.run_id, 1)
    assert [one.model_id for one in client.get_run(run.info.run_id).outputs.model_outputs] == [model.model_id]


def test_a_journal_has_its_name_only_once_it_is_locked(tmp_path, monkeypatch):
    """Found unlocked, it would be that of a process that is gone: it would be removed while its writer begins."""
    seen = []
    monkeypatch.setattr(journal, "lock_descriptor", lambda _: seen.append(list(tmp_path.glob("*/events.jsonl"))))
    Journal(tmp_path, "one").close()
    assert seen == [[]] and len(list(tmp_path.glob("*/events.jsonl"))) == 1


def test_sending_a_journal_again_from_any_event_on_changes_nothing(project):
    root, *_ = project
    folder = journal_of_a_run(root).folder
    copy = root / "copy"
    shutil.copytree(folder, copy)
    sender = Outbox(root, print)
    sync(sender)
    before = history(root)
    lengths = [0, *(len(line) for line in (copy / "events.jsonl").read_bytes().splitlines(keepends=True))]
    for upto in range(0, len(lengths), 3):
        again = folder.parent / "19700101T000000.000000-again"
        shutil.copytree(copy, again)
        (again / "sent.json").write_text(json.dumps({"values": sum(lengths[:upto]), "artifacts": 0}))
        sync(Outbox(root, print))
    client, found = runs(root)
    assert history(root) == before == [3.0, 2.0, 1.0]
    assert len(found) == 2
    check_model(client, found["train"])
    assert [a.path for a in client.list_artifacts(found["train"].info.run_id)] == ["p.png"]


def test_a_store_that_breaks_at_any_request_gets_every_value_once(project, monkeypatch):
    root, *_ = project
    journal_of_a_run(root)
    calls = [0]

    def fragile(name):
        real = getattr(MlflowClient, name)

        def call(*words, **named):
            calls[0] += 1
            if calls[0] % 2:
                result = real(*words, **named)  # it is done, and the answer is lost
                raise ConnectionError(f"Connection aborted after {result}")
            return real(*words, **named)

        monkeypatch.setattr(MlflowClient, name, call)

    for name in (
        "create_run",
        "log_batch",
        "log_artifact",
        "set_terminated",
        "update_run",
        "create_logged_model",
        "finalize_logged_model",
        "log_outputs",
    ):
        fragile(name)
    failures = 0
    while outbox.journals(root):
        try:
            sync(Outbox(root, print))
        except Away as error:
            failures += 1
            assert "the connection broke" in str(error)
    assert failures >= 9  # two runs made and ended, params, metrics, a model with its links, a picture
    assert history(root) == [3.0, 2.0, 1.0]
    client, found = runs(root)
    assert len(found) == 2
    check_model(client, found["train"])


def test_what_mlflow_refuses_is_named_and_left_out_alone(project):
    root, *_ = project
    journal = journal_of_a_run(root, close=False)
    journal.write("metrics", journal.folder.name, {"values": {"no/good\x00": 1.0, "x" * 300: 1.0}, "step": 0})
    journal.write("metrics", journal.folder.name, {"values": {"loss": 0.5}, "step": 9})
    journal.close()
    said = []
    sync(Outbox(root, said.append))
    assert history(root) == [3.0, 2.0, 1.0, 0.5]
    assert len(said) == 1 and "refused a record of" in said[0] and "left out" in said[0]


def test_a_store_that_was_emptied_gets_the_whole_journal_again(project):
    root, *_ = project
    journal = journal_of_a_run(root, close=False)
    sender = Outbox(root, print)
    with outbox.held(journal.folder) as mine:
        assert mine
        sender.deliver(journal.folder)
        with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database, database:
            models = [f"logged_model_{kind}" for kind in ("metrics", "params", "tags")]
            for table in ("metrics", "latest_metrics", "params", "tags", *models, "logged_models", "inputs", "runs"):
                database.execute(f"DELETE FROM {table}")
        journal.write("metrics", journal.folder.name, {"values": {"loss": 0.5}, "step": 9})
        sender.deliver(journal.folder)
    journal.close()
    sync(sender)
    assert history(root) == [3.0, 2.0, 1.0, 0.5]


def test_a_process_that_ends_while_it_makes_the_store_leaves_none_behind(tmp_path, monkeypatch):
    from mlflow.store.db import utils

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    upgrade = utils._upgrade_db

    def ends_within(engine):
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE _alembic_tmp_model_version_tags (key INTEGER)")
        raise RuntimeError("killed")

    monkeypatch.setattr(utils, "_upgrade_db", ends_within)
    with pytest.raises(store.TrackingError, match="killed"):
        store.connect(tmp_path)
    assert not (tmp_path / "mlflow.db").stat().st_size
    monkeypatch.setattr(utils, "_upgrade_db", upgrade)
    _, experiment = store.connect(tmp_path)
    assert experiment and sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "work"]


@contextlib.contextmanager
def locked_database(root):
    store.connect(root)
    with contextlib.closing(sqlite3.connect(root / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield f"sqlite:///{root / 'mlflow.db'}"


@contextlib.contextmanager
def folder_for_a_database(root):
    (root / "folder.db").mkdir()
    yield f"sqlite:///{root / 'folder.db'}"


@contextlib.contextmanager
def broken_database(root):
    (root / "mlflow.db").write_bytes(b"no database at all" * 100)
    yield f"sqlite:///{root / 'mlflow.db'}"


@contextlib.contextmanager
def deleted_experiment(root):
    client, experiment = store.connect(root)
    client.delete_experiment(experiment)
    yield f"sqlite:///{root / 'mlflow.db'}"


@contextlib.contextmanager
def read_only_database(root):
    store.connect(root)
    with open(root / "mlflow.db", "r+b") as file:  # the version of its format for writing: SQLite only reads later ones
        file.seek(18)
        file.write(bytes([3]))
    yield f"sqlite:///{root / 'mlflow.db'}"


@contextlib.contextmanager
def full_disk(root):
    store.connect(root)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((root / "mlflow.db").stat().st_size // 4, before[1]))
    try:
        yield f"sqlite:///{root / 'mlflow.db'}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("outage", "words"),
    [
        (lambda root: contextlib.nullcontext(closed_port()), "nothing listens there: start the server"),
        (lambda root: silent_server(), "accepts connections but does not answer"),
        (lambda root: failing_server(500), "server error"),
        (lambda root: failing_server(401), "asks for a login: set MLFLOW_TRACKING_USERNAME"),
        (lambda root: failing_server(404), "is not MLflow"),
        (lambda root: contextlib.nullcontext("http://user:hunter2@no.such.host.invalid"), "name of its host is unknown"),
        (locked_database, "another process holds the database"),
        (folder_for_a_database, "cannot be opened"),
        (broken_database, "damaged or not an SQLite database"),
        (deleted_experiment, "mlflow experiments restore --experiment-id"),
        (read_only_database, "the store is read-only: make it writable"),
        (full_disk, "the disk is full or fails: free some space"),
    ],
    ids=[
        "closed",
        "silent",
        "500",
        "401",
        "404",
        "unknown host",
        "locked",
        "folder",
        "broken",
        "deleted",
        "read-only",
        "full",
    ],
)
def test_a_store_that_cannot_be_used_gets_one_sentence_and_loses_nothing(project, fresh_store, monkeypatch, outage, words):
    root, *_ = project
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(store, "SQLITE_PATIENCE", 0.2)
    with outage(root) as uri:
        journal = journal_of_a_run(root)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(Away, match=words) as caught:
            sync(Outbox(root, print))
        assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)
    shutil.copy(fresh_store, root / "good.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'good.db'}")
    assert sync(Outbox(root, print)) > 0
    assert not journal.folder.exists()
    assert history(root) == [3.0, 2.0, 1.0]


def test_while_the_store_is_silent_a_stage_does_not_wait_and_the_next_brings_all(project, monkeypatch, capfd):
    root, params, chosen = project
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with silent_server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("://", "://user:hunter2@"))
        with tracker.open_tracker("data", params, chosen, root=root) as one:
            began = time.monotonic()
            for step in range(200):
                one.log_metrics({"loss": float(step)}, step=step)
            seconds = time.monotonic() - began
        assert seconds < 60, "200 local lines, no request"
        said = capfd.readouterr().err
        assert said.count("MLflow at") == 1 and "dpar-cli runs sync" in said and "hunter2" not in said
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with tracker.open_tracker("tokenize_images", params, chosen, root=root):
        pass
    assert history(root, "01 data") == [float(step) for step in range(200)]
    _, found = runs(root)
    assert {run.info.status for run in found.values()} == {"FINISHED"} and len(found) == 3


def test_a_process_that_delivers_and_is_killed_is_named_and_another_one_goes_on(project, monkeypatch, capfd):
    root, params, chosen = project
    begun = []

    def launch(root, key, _):
        if begun:  # what the second one does
            outbox.lock_file(root, key).unlink()
            for folder in outbox.journals(root):
                if outbox.bury(folder):
                    outbox.Outbox(root, print).deliver(folder)
                    shutil.rmtree(folder)
        begun.append(key)

    def killed(root, key):
        outbox.lock_file(root, key).touch()  # which a process that leaves by itself removes
        return False

    monkeypatch.setattr(tracker, "launch", launch)
    monkeypatch.setattr(tracker, "at_work", killed)
    with tracker.open_tracker("data", params, chosen, root=root) as one:
        one.log_metrics({"loss": 2.0}, step=1)
    said = capfd.readouterr().err
    assert "ended too early" in said and "slow" not in said and len(begun) == 2
    assert history(root, "01 data") == [2.0]


KILLED = """
from pathlib import Path
from pipeline.runner import load_stage
from pipeline.tracking.tracker import open_tracker
from stages.artifacts import HEADLINE, MODELS, REPORT_PAGE, SAMPLE_GRID, SAMPLE_PROTOCOL, SAMPLES, Artifact
from stages.params import load_params, select
import sys, time
def main():
    params = load_params(Path({params!r}))
    with open_tracker("data", params, select(params, load_stage("data").params), root=Path({root!r})) as one:
        one.log_metrics({{"loss": 1.0}}, step=1)
        Path({root!r}, "ready").touch()
        time.sleep(300)
main()
"""


def test_runs_of_a_killed_process_end_by_themselves(project):
    root, *_ = project
    code = KILLED.format(params=str(ROOT / "params.yaml"), root=str(root))
    child = subprocess.Popen([sys.executable, "-c", code])
    while not (root / "ready").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    delivered(root)  # nobody started anything: the process beside the killed one did it
    assert {run.info.status for run in runs(root)[1].values()} == {"KILLED"}
    assert history(root, "01 data") == [1.0]


def test_a_copied_project_keeps_its_artifacts_in_itself(project):
    root, *_ = project
    original, copied = root / "original", root / "copied here"
    original.mkdir()
    shutil.move(root / "mlflow.db", original)
    journal_of_a_run(original)
    sync(Outbox(original, print))
    shutil.copytree(original, copied)
    shutil.rmtree(original)
    journal = Journal(outbox.journal_folder(copied), "later")
    journal.write("run", "later", {"name": "later", "tags": {}, "parent": None, "once": False})
    (copied / "q.png").write_bytes(b"other")
    journal.write_file("later", copied / "q.png")
    journal.close()
    sync(Outbox(copied, print))
    assert not original.exists()
    client, found = runs(copied)
    (model,) = client.search_logged_models([found["train"].info.experiment_id])
    assert model.artifact_location.startswith((copied / "mlartifacts").as_uri() + "/")
    for name, file in (("train", "p.png"), ("later", "q.png")):
        assert found[name].info.artifact_uri.startswith((copied / "mlartifacts").as_uri() + "/")
        assert [a.path for a in client.list_artifacts(found[name].info.run_id)] == [file]


@pytest.mark.parametrize("name", ["plain", "mit Leerzeichen und ü", "50% of #1?"])
def test_a_project_may_lie_in_any_folder(project, monkeypatch, name):
    root = project[0] / name
    root.mkdir()
    shutil.move(project[0] / "mlflow.db", root)
    monkeypatch.chdir(root)
    journal_of_a_run(root)
    sync(Outbox(root, print))
    assert (root / "mlflow.db").exists() and (root / "mlartifacts").is_dir()
    client, found = runs(root)
    assert [a.path for a in client.list_artifacts(found["train"].info.run_id)] == ["p.png"]
    assert sorted(path.name for path in root.iterdir()) == ["mlartifacts", "mlflow.db", "work"]


@pytest.mark.parametrize("inner", ["standalone/tmpabc", "tmpxyz"])
def test_experiments_in_a_copy_of_the_project_are_tracked_in_the_project(project, monkeypatch, inner):
    root = project[0]
    copy = root / ".dvc" / "tmp" / "exps" / inner
    copy.mkdir(parents=True)
    assert store.tracking_uri(copy) == store.tracking_uri(root) == f"sqlite:///{root / 'mlflow.db'}"
    assert outbox.journal_folder(copy) == root / "work" / "tracking"
    monkeypatch.setenv("DVC_STAGE", "data")
    assert tracker.pass_identity(copy)[0] != tracker.pass_identity(root)[0]


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////p/mlflow.db", "/p/mlflow.db"),
        ("sqlite:///p.db?timeout=5", "p.db"),
        ("sqlite:////a%20b%25/x.db", "/a b%/x.db"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("http://host/sqlite:///p.db", None),
    ],
)
def test_the_file_of_a_sqlite_address_is_the_one_that_sqlalchemy_opens(uri, file):
    assert store.sqlite_file(uri) == (file and Path(file))
    if file:
        from sqlalchemy.engine import make_url

        assert make_url(uri).database == file


def test_runs_are_read_from_the_file_of_an_encoded_address(project, monkeypatch):
    root = project[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/my%20runs/100%25.db")
    journal_of_a_run(root)
    sync(Outbox(root, print))
    assert (root / "my runs" / "100%.db").stat().st_size
    assert [path.name for path in root.rglob("*.db") if path.stat().st_size] == ["mlflow.db", "100%.db"]
    assert [run.name for run in reading.pipeline_runs(root)] == ["pass"]


def test_the_store_of_the_environment_is_obeyed(project, monkeypatch):
    root, *_ = project
    (root / "mlflow.db").rename(root / "elsewhere.db")
    uri = f"sqlite:///{root / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    journal_of_a_run(root)
    sync(Outbox(root, print))
    assert not (root / "mlflow.db").exists()
    assert MlflowClient(uri).get_experiment_by_name(store.EXPERIMENT) is not None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dvc", "repro"], True),
        (["/usr/bin/python3.11", "-P", "-m", "dvc", "exp", "run"], True),
        (["python", "/x/.venv/bin/dvc", "repro"], True),
        (["python", "-W", "ignore", "/x/bin/dvc", "repro"], True),
        (["su", "-", "dvc"], False),
        (["bash", "-c", "dvc repro && echo"], False),
        (["python", "-m", "pytest", "dvc"], False),
        (["python", "train.py", "dvc"], False),
        (["vim", "dvc"], False),
        ([], False),
    ],
)
def test_only_dvc_itself_is_a_pipeline_run(words, expected):
    assert tracker._is_dvc(words) is expected


def test_without_dvc_a_stage_is_a_pipeline_run_of_its_own(project, monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert f"-{os.getpid()}-" in tracker.pass_identity(project[0])[0]


def test_passwords_reach_neither_the_journal_nor_mlflow(project):
    root, *_ = project
    journal = journal_of_a_run(root, close=False)
    journal.write("params", journal.folder.name, {"train.storage": "s3://AKIA:hunter2@bucket/runs?token=hunter2"})
    journal.close()
    assert "hunter2" not in (journal.folder / "events.jsonl").read_text()
    sync(Outbox(root, print))
    assert runs(root)[1]["train"].data.params["train.storage"] == "s3://***@bucket/runs?token=***"


def test_a_module_in_the_current_folder_is_not_run_in_place_of_ours(tmp_path):
    for name in ("stages", "safetensors", "pipeline", "dpar_core"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the current folder was run')")
    code = "import sys; from pipeline.tracking import journal; import stages; print(stages.__file__)"
    (tmp_path / "on_path").mkdir()
    (tmp_path / "on_path" / "stages.py").write_text("raise SystemExit('the stages.py of PYTHONPATH was run')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path / "on_path"), str(ROOT)))}
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(ROOT / "stages" / "__init__.py"), found.stderr
    line = command("pipeline.tracking.outbox")
    found = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "not enough values" in found.stderr, "it got as far as looking for the project's folder"


def test_a_pipeline_run_ends_as_its_worst_stage_did(project):
    root, *_ = project
    journal = Journal(outbox.journal_folder(root), "train")
    for key, stage, status in (("one", "data", "FAILED"), ("two", "features", "FINISHED")):
        journal.write("run", "parent", {"name": "whole", "tags": {}, "parent": None, "once": False})
        journal.write("run", key, {"name": stage, "tags": {}, "parent": "parent", "once": False})
        if status != "FINISHED":
            journal.write("tags", "parent", {summary.WORST_TAG: status})
        for run in (key, "parent"):
            journal.write("end", run, {"status": status})
    journal.close()
    sync(Outbox(root, print))
    _, found = runs(root)
    assert {name: run.info.status for name, run in found.items()} == {
        "whole": "FAILED",
        "data": "FAILED",
        "features": "FINISHED",
    }
