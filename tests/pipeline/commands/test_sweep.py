"""`dpar-cli sweep`: what it writes, what it takes over into params.yaml, and its runs in MLflow."""

import csv
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from dpar_core.evaluation.protocol import Interval, Protocol, Scores
from dpar_core.files import save_weights
from pipeline.cli import app
from pipeline.commands import sweep
from pipeline.sweep import output as sweep_output
from pipeline.sweep import tracking as sweep_tracking
from pipeline.tracking import store
from stages import score
from stages.artifacts import FOLDER, MODELS
from stages.params import ParamsError, load_params, select
from stages.shared.sampler import Files
from stages.tools.sweep import Failure, Outcome, Point, Subject, SweepPlan, Trial, TrialResult
from stages.workers.lock import locked
from tests.helpers.mlflow_stores import delivered
from tests.helpers.paths import ROOT
from tests.helpers.sample_artifacts import write_artifacts


def result(threshold, scale, distance, patches, speed, *, final=False, folder=None):
    key = f"{'f' if final else 's'}{threshold}-{scale}"
    if folder is not None:
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder / f"{key}.png")
    images = 40 if final else 20
    protocol = Protocol("demo", "f", "train", "ref", 90, images, 8, 8, ("png",), 3, 1)
    intervals = {"eval/fd_demo": Interval(distance - 0.1, distance + 0.1)}
    scores = Scores({"eval/fd_demo": distance}, intervals, protocol, {"made_by": {"model": "abc"}}, 8)
    lengths = {"patch/patches_per_image": patches, "patch/mean_length": 64 / patches}
    return TrialResult(key, Trial(Point(threshold, scale), images, 7, final), scores, lengths, 4, 64, speed, 1.5)


@pytest.fixture
def facts(tmp_path):
    trials = tmp_path / "trials"
    trials.mkdir()
    search = [
        result(3.8, 1.0, 1.4, 40.0, 50.0, folder=trials),
        result(3.8, 2.0, 0.9, 40.0, 51.0, folder=trials),
        result(4.2, 1.0, 1.6, 30.0, 60.0, folder=trials),
        result(4.2, 2.0, 1.0, 30.0, 62.0, folder=trials),
    ]
    finals = [result(3.8, 2.0, 1.1, 40.0, 50.0, final=True, folder=trials), result(4.2, 2.0, 1.05, 30.0, 61.0, final=True)]
    failed = [Failure(Point(5.0, 1.0), "no room")]
    outcome = Outcome(search, finals, failed)
    settings = sweep_output.SweepSettings("dpar", "7.6,7.8", "1,2", 20, 60, "grid", False)
    return sweep_output.Facts("t", "eval/fd_demo", settings, outcome, "dpar-cli sweep x", Files(Path(), Path()))


def test_the_front_is_what_nothing_beats_in_both_values():
    rng = np.random.default_rng(0)
    points = [tuple(map(float, row)) for row in rng.integers(0, 12, (60, 2))]
    beaten = [any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points) for p in points]
    front = sweep_output.pareto_front(points)
    assert {points[place] for place in front} == {p for p, lost in zip(points, beaten) if not lost}
    assert len({points[place] for place in front}) == len(front)


def test_files_tell_the_winner_of_the_second_round(facts, tmp_path):
    written = sweep_output.write(facts, tmp_path)
    assert written.metrics["sweep/fd_demo"] == 1.05  # not 0.9, the smallest of the search
    assert written.metrics["sweep/threshold"] == 4.2
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["threshold"] for row in table] == [3.8, 3.8, 4.2, 4.2]
    search, final = (facts.outcome.search[0].scores.protocol.id, facts.outcome.finals[0].scores.protocol.id)
    assert {row["protocol_id"] for row in table} == {search} != {final}  # finals are of another number of images
    finals = pq.read_table(tmp_path / "finals.parquet").to_pylist()
    assert [(row["threshold"], row["protocol_id"]) for row in finals] == [(3.8, final), (4.2, final)]
    assert table[0]["eval/fd_demo_low"] == pytest.approx(1.3)
    with open(tmp_path / "results.csv") as stream:
        assert len(list(csv.DictReader(stream))) == 4
    for name in ("heatmap.png", "pareto.png"):
        assert Image.open(tmp_path / name).size[0] > 400
    page = (tmp_path / "index.html").read_text()
    assert "4.2 nats, cfg 2 has the smallest fd_demo: 1.05" in page
    assert "5 nats, cfg 1: no room" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png") == 4
    assert yaml.safe_load((tmp_path / "dvc.yaml").read_text())["metrics"] == ["metrics.json"]
    assert json.loads((tmp_path / "sweep.json").read_text())["failed"][0]["error"] == "no room"
    assert "4.2" in sweep_output.table(facts)
    long = "dpar-cli sweep threshold --thresholds 3.0 --cfg 3.0 --images 60 --final-images 60 --name threshold-winner"
    text = sweep_output.table(sweep_output.Facts(**{**vars(facts), "command": long}))
    assert max(map(len, text.splitlines())) <= 80
    assert " ".join(text.partition("reproduce")[2].replace("\\\n", " ").split()) == long, "it can be copied"


@pytest.mark.parametrize("keys", ["ab", "ba"])
def test_of_equal_trials_the_winner_leads_the_tables(facts, keys):
    first = facts.outcome.search[0]
    equal = [replace(one, key=key, scores=first.scores) for one, key in zip(facts.outcome.search, keys)]
    for outcome in (Outcome(equal), Outcome([], equal)):
        winner, rows = outcome.winner(facts.distance), sweep_output.table_rows(replace(facts, outcome=outcome))
        assert winner.key == "a" and rows[0][1] == f"{winner.point.cfg_scale:g}"


def test_speeds_of_trials_on_unlike_machines_are_not_compared(facts, tmp_path):
    assert "images/s are each trial" in sweep_output.page(facts, tmp_path)
    assert "cannot be compared" not in sweep_output.table(facts)
    slower = [replace(one, machine="another, 1 threads") for one in facts.outcome.finals]
    unlike = replace(facts, outcome=replace(facts.outcome, finals=slower))
    for text in (sweep_output.page(unlike, tmp_path), " ".join(sweep_output.table(unlike).split())):
        assert sweep_output.UNLIKE in text


def test_a_sweep_without_any_result_still_says_what_failed(facts, tmp_path):
    empty = sweep_output.Facts(**{**vars(facts), "outcome": Outcome(failed=facts.outcome.failed), "command": ""})
    sweep_output.write(empty, tmp_path)
    assert "Every trial failed" in (tmp_path / "index.html").read_text()


def test_the_winner_is_written_into_params_and_nothing_else_changes(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    before = yaml.safe_load(path.read_text())
    said = sweep.apply_winner(path, result(3.95, 1.75, 1.0, 30.0, 9.0), with_threshold=True)
    assert "sample.threshold 3.95" in said
    after = yaml.safe_load(path.read_text())
    assert after["sample"] == before["sample"] | {"cfg_scale": 1.75, "threshold": 3.95, "max_patch_length": 4}
    assert {**after, "sample": None} == {**before, "sample": None}
    old, new = (ROOT / "params.yaml").read_text().split("\n"), path.read_text().split("\n")
    changed = [(a, b) for a, b in zip(old, new) if a != b]
    assert len(changed) == 3
    assert len(old) == len(new)
    assert all(a.partition("#")[2] == b.partition("#")[2] for a, b in changed)


def test_a_winner_that_makes_params_invalid_leaves_them_alone(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    with pytest.raises(ParamsError):
        sweep.apply_winner(path, result(99.0, 1.75, 1.0, 30.0, 9.0), with_threshold=True)
    assert path.read_text() == (ROOT / "params.yaml").read_text()


def test_trials_hang_under_one_run_and_are_written_once(facts, fresh_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(fresh_store, tmp_path)
    finals = [facts.outcome.finals[0], result(4.234567, 2.0, 1.05, 30.0, 61.0, final=True)]
    facts = replace(facts, outcome=replace(facts.outcome, finals=finals))
    picture = tmp_path / "trials" / "s3.8-1.0.png"
    model = MODELS["dpar"].below(tmp_path / FOLDER)
    model.parent.mkdir(parents=True)
    save_weights(model, {"w": torch.ones(2)}, kind="dpar", config={"width": 2}, meta={})
    for _ in range(2):  # the second start finds what the first wrote
        with sweep_tracking.open_sweep("t", facts.settings, distance=facts.distance, root=tmp_path) as runs:
            for one in facts.outcome.search:
                runs.log_trial(one, picture)
            for failed in facts.outcome.failed:
                runs.log_failure(failed)
            runs.log_outcome(facts, sweep_output.winner_metrics(facts), tmp_path)
    delivered(tmp_path)
    client, experiment = store.connect(tmp_path)
    found = client.search_runs([experiment])
    parent = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parent) == 1
    assert len(found) == 1 + 4 + 2  # a failed trial is tried again at every start
    assert (
        parent[0].info.run_name == "sweep t · fd_demo 1.050 at 4.23457 nats, cfg 2" and parent[0].info.status == "FINISHED"
    )
    assert parent[0].data.metrics["dpar_distance"] == 1.05  # the column of pipeline runs
    assert parent[0].data.metrics["sweep/threshold"] == 4.234567  # a setting keeps its digits
    note = parent[0].data.tags["mlflow.note.content"]
    assert "| 4.23457 | 2 | 40 | 1.050 | 0.950 to 1.15 | 30.0 | 61.0 |" in note and "5 nats, cfg 1: no room" in note
    assert "3.8 nats, cfg 2" in note.partition("Within chance")[2] and note.endswith("    dpar-cli sweep x")
    (used,) = client.get_run(parent[0].info.run_id).inputs.model_inputs
    assert client.get_logged_model(used.model_id).tags["mlflow.source.name"] == "dpar-cli sweep"
    trial = next(run for run in found if run.info.run_name == "4.2 nats, cfg 2")
    assert trial.data.metrics["eval/fd_demo"] == trial.data.metrics["dpar_distance"] == 1.0
    assert trial.data.metrics["patch/mean_length"] == 2.133
    assert trial.data.metrics["eval/fd_demo_high"] == pytest.approx(1.1)
    assert trial.data.params["threshold"] == "4.2" and trial.data.tags["mlflow.source.name"] == "dpar-cli sweep"
    assert trial.info.end_time - trial.info.start_time == 1500
    assert [a.path for a in client.list_artifacts(trial.info.run_id)] == [picture.name]
    failed = [run for run in found if run.info.run_name == "failed 5 nats, cfg 1"]
    assert [run.info.status for run in failed] == ["FAILED", "FAILED"]


def test_a_second_sweep_of_the_same_name_is_refused(tmp_path):
    refuse = partial(sweep.refuse_second, "x")
    with locked(tmp_path / "x" / ".lock", busy=refuse):
        with pytest.raises(ValueError, match="sweep x is running already"), locked(tmp_path / "x" / ".lock", busy=refuse):
            pass
        with locked(tmp_path / "y" / ".lock", busy=refuse):
            pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["threshold", "--search", "best"], "--search is 'best', expected grid, random or optuna"),
        (["threshold", "--search", "optuna", "--retrain"], "--retrain trains a model for each threshold of a grid"),
        (["threshold"], "is missing: run `dpar-cli run"),
        (["cfg", "--model", "gan"], "--model is 'gan', expected dpar or llamagen"),
    ],
)
def test_what_cannot_be_swept_gets_a_sentence(tmp_path, monkeypatch, arguments, words):
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, ["sweep", *arguments])
    assert outcome.exit_code != 0
    assert words in str(outcome.exception)


def test_settings_are_listed_with_their_digits():
    assert sweep._listed([None, 3.98765432, 0.1 + 0.2, 1.0]) == "training,3.98765432,0.3,1"


def test_a_model_that_cannot_be_guided_is_not_swept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = load_params(ROOT / "params.yaml")
    params = params.model_copy(update={"model": params.model.model_copy(update={"class_dropout": 0.0})})
    files = write_artifacts(tmp_path).dpar_files
    subject = Subject({None: files}, params.sample, select(params, score.Params), tmp_path / "m", tmp_path / "f", "cpu")
    plan = SweepPlan((Point(None, 1.0), Point(None, 1.5)), 12, 0, 1, 1)
    with pytest.raises(ValueError, match=r"`sample.cfg_scale` 1.5 guides by the null class, which .* 0 never trains"):
        sweep._run("x", "dpar", subject, params, plan, retrain=False, apply=False)
