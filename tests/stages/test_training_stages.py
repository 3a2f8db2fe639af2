"""The training stages: what they read and write, and that an interrupted one ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dpar_core.data.shards import TokenShards
from dpar_core.files import load_weights
from dpar_core.models.dpar import DPARConfig
from dpar_core.models.gpt import GPTConfig
from dpar_core.training.checkpoint import Architecture
from dpar_core.training.parallel import Ranks
from stages import entropy_model, train
from stages.params import select
from stages.shared import jobs as training
from stages.shared.jobs import TrainData, TrainJob, train_job
from stages.tracker import NullTracker
from stages.workers.fit import Event
from tests.helpers.processes import gone
from tests.helpers.tiny_shards import ENTROPY_MODEL, GRID, ROOT, tiny_params, write_maps, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tokens(folder / "tokens")
    write_maps(folder / "maps", folder / "tokens")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Silent:
    def begin(self, step):
        pass

    def log(self, step, metrics):
        pass

    def checkpoint(self, step, address):
        pass


def in_process(function, *, root, work, scale, section, on_event):
    """Stands in for Ray Train where a test is about the stage: the same function, one rank, in this process."""
    return function(ranks=Ranks(), hooks=Silent())


def outputs_in(kind, folder: Path):
    return kind(
        **{
            name: folder
            / {"model": "model.safetensors", "snapshots": "snapshots", "curve": "curve.csv"}.get(name, f"{name}.json")
            for name in kind.__dataclass_fields__
        }
    )


def run_stage(name: str, data: Path, out: Path, work: Path, tracker=None, **changes) -> Path:
    """Run one of the three stages on the tiny set."""
    params, tracker = tiny_params(**changes), tracker or NullTracker()
    if name == "entropy_model":
        module, function, inputs, outputs = entropy_model, entropy_model.run, entropy_model.Inputs, entropy_model.Outputs
    elif name == "dpar":
        module, function, inputs, outputs = train, train.run_dpar, train.DPARInputs, train.DPAROutputs
    else:
        module, function, inputs, outputs = train, train.run_llamagen, train.LlamaGenInputs, train.LlamaGenOutputs
    paths = {"tokens": data / "tokens", "patch_maps": data / "maps"}
    read = inputs(**{field: paths[field] for field in inputs.__dataclass_fields__})
    function(select(params, module.Params), read, outputs_in(outputs, out), tracker, device="cpu", work=work)
    return out


def job(data: Path, kind="dpar", **changes) -> TrainJob:
    section = tiny_params(**changes).train
    config = DPARConfig(16, GRID, 32, 2, 1, 1, 1, num_classes=2, ffn_multiple=32)
    if kind != "dpar":
        config = GPTConfig(16, GRID, 32, 2, 2, ffn_multiple=32, num_classes=2 if kind == "llamagen" else None)
    return TrainJob(kind, config, section, 0, data / "tokens", data / "maps" if kind == "dpar" else None)


@pytest.mark.parametrize("name", ["entropy_model", "dpar", "llamagen"])
def test_a_stage_writes_what_others_read(data, tmp_path, monkeypatch, name):
    monkeypatch.setattr(training.ray_train, "fit", in_process)
    tracker = NullTracker()
    out = run_stage(name, data, tmp_path / "out", tmp_path / "work", tracker)
    kind = "dpar" if name == "dpar" else "gpt"
    weights = load_weights(out / "model.safetensors", kind=kind)
    shards = TokenShards(data / "tokens", "train")
    assert weights.meta["tokens"] == shards.digest and weights.meta["tokenizer"] == shards.meta.tokenizer
    assert weights.meta["step"] == 12 and weights.config["codebook_size"] == 16
    config = (DPARConfig if kind == "dpar" else GPTConfig)(**weights.config)
    training.build(config, 0).load_state_dict(weights.state)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["parameters"] == sum(value.numel() for value in weights.state.values())
    assert metrics["images"] == 96 and metrics["epochs"] == pytest.approx(96 / 36)
    rows = [line.split(",") for line in (out / "curve.csv").read_text().splitlines()]
    assert rows[0] == ["step", "train/loss", "validation/loss"] and [row[0] for row in rows[1:]] == ["4", "8", "12"]
    assert float(rows[-1][2]) == metrics["validation/loss"]
    timings = json.loads((out / "timings.json").read_text())
    assert [row["step"] for row in timings["curve"]] == [4, 8, 12] and timings["seconds"] > 0
    assert tracker.inputs["tokens"] == shards.digest
    if name == "dpar":
        assert weights.meta["entropy_model"] == ENTROPY_MODEL and weights.meta["rule"]["threshold"] == 0.5
    if name == "llamagen":
        (kept,) = (out / "snapshots").iterdir()
        assert kept.name == "step-00000006.safetensors" and load_weights(kept, kind="gpt").meta["step"] == 6


def test_with_auto_the_baseline_is_kept_eight_per_cent_apart(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training.ray_train, "fit", in_process)
    out = run_stage("llamagen", data, tmp_path / "out", tmp_path / "work", equal_time_step="auto")
    steps = [load_weights(path, kind="gpt").meta["step"] for path in sorted((out / "snapshots").iterdir())]
    assert steps == [6, 7, 8, 9, 10, 11]
    assert tiny_params(equal_time_step="auto", steps=1000).train.snapshot_steps() == (
        540,
        583,
        630,
        681,
        735,
        794,
        857,
        926,
    )


def test_without_an_equal_time_step_nothing_is_kept_on_the_way(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training.ray_train, "fit", in_process)
    out = run_stage("llamagen", data, tmp_path / "out", tmp_path / "work", equal_time_step=None)
    assert not list((out / "snapshots").iterdir())


def test_a_finished_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training.ray_train, "fit", in_process)
    run_stage("llamagen", data, tmp_path / "whole", tmp_path / "work")
    (last,) = (tmp_path / "work").glob("run-*/step-00000012")
    os.truncate(last / "model.safetensors", 100)
    opened, bar = [], []

    def reported(function, *, on_event, **same):
        on_event(Event("begin", 10))
        on_event(Event("checkpoint", 12))
        return in_process(function, on_event=on_event, **same)

    class Tracker(NullTracker):
        def _progress(self, total, description, done, unit):
            opened.append((done, total))
            return self

        def advance(self, amount=1, **values):
            bar.append(amount)

    monkeypatch.setattr(training.ray_train, "fit", reported)
    run_stage("llamagen", data, tmp_path / "again", tmp_path / "work", Tracker())
    assert (opened, bar) == ([(10, 12)], [2])
    for file in ("model.safetensors", "curve.csv"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    monkeypatch.setattr(training.ray_train, "fit", lambda *_, **__: pytest.fail("a whole run was trained again"))
    run_stage("llamagen", data, tmp_path / "third", tmp_path / "work")


@pytest.mark.parametrize("kind", ["entropy_model", "dpar", "llamagen"])
def test_two_ranks_see_together_what_one_would(data, kind):
    one = TrainData(job(data, kind), Ranks())
    two = [TrainData(job(data, kind, workers=2), Ranks(rank, 2)) for rank in (0, 1)]
    whole = one.micro_batch(7, 0)
    parts = [half.micro_batch(7, 0) for half in two]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert (whole.labels is None) == (kind == "entropy_model")
    if kind == "dpar":
        assert torch.equal(whole.layout.lengths, torch.cat([part.layout.lengths for part in parts]))
    validation = [list(half.validation()) for half in two]
    assert len(validation[0]) == len(validation[1])
    assert sum(weight for rank in validation for _, weight in rank) == 5


def test_labels_and_patches_belong_to_the_tokens(data):
    batch = TrainData(job(data), Ranks()).micro_batch(0, 0)
    shards = TokenShards(data / "tokens", "train")
    known = {tuple(view): label for i, label in enumerate(shards.labels) for view in shards.all_views(i).tolist()}
    assert [known[tuple(row)] for row in batch.tokens.tolist()] == batch.labels.tolist()
    assert batch.layout.images == 8 and int(batch.layout.lengths.sum()) == batch.tokens.numel()


def test_a_models_file_names_the_classes_without_training_images(data):
    shards = TokenShards(data / "tokens", "train")
    assert "untrained_classes" not in train.classes_of(shards)
    shards.labels = np.where(shards.labels == 0, 1, shards.labels)
    assert train.classes_of(shards)["untrained_classes"] == [0]


def test_a_run_is_named_by_what_decides_its_result(data):
    name = job(data).digest({"tokens": "a"})
    assert job(data, workers=2, keep_last=5, log_every=3, checkpoint_every=1).digest({"tokens": "a"}) == name
    assert job(data, equal_time_step=3).digest({"tokens": "a"}) == name
    assert job(data, lr=0.1).digest({"tokens": "a"}) != name
    assert job(data).digest({"tokens": "b"}) != name
    assert job(data, "llamagen").digest({"tokens": "a"}) != name


@pytest.mark.parametrize("module", [train, entropy_model])
def test_a_change_of_placement_keeps_the_work_folder(module):
    one, two, other = (
        module.identity(select(tiny_params(**changes), module.Params)) for changes in ({}, {"workers": 2}, {"lr": 0.1})
    )
    assert one == two and one != other


def test_patch_maps_of_other_shards_are_refused(data, tmp_path):
    write_tokens(tmp_path / "tokens", train=20)
    with pytest.raises(ValueError, match=r"was made with token shards .* run `dpar-cli run patch_maps`"):
        train.run_dpar(
            select(tiny_params(), train.Params),
            train.DPARInputs(tmp_path / "tokens", data / "maps"),
            outputs_in(train.DPAROutputs, tmp_path),
            NullTracker(),
            device="cpu",
            work=tmp_path / "work",
        )


def test_a_missing_shard_is_reported_before_anything_starts(tmp_path, data):
    write_tokens(tmp_path / "tokens")
    (tmp_path / "tokens" / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard train-000001\.tar is missing: run"):
        run_stage("llamagen", tmp_path, tmp_path / "out", tmp_path / "work")


def test_a_short_shard_stops_the_run_with_a_sentence(tmp_path):
    write_tokens(tmp_path / "tokens")
    shard = tmp_path / "tokens" / "train-000001.tar"
    os.truncate(shard, shard.stat().st_size // 3)
    with pytest.raises(OSError, match=r"shard train-000001\.tar is shorter than its index says"):
        train_job(job(tmp_path, "llamagen"), str(tmp_path / "run"), ranks=Ranks(), hooks=Silent())


def test_a_checkpoint_of_another_architecture_is_refused(data, tmp_path):
    train_job(job(data, "llamagen", steps=2), str(tmp_path), ranks=Ranks(), hooks=Silent())
    other = job(data, "entropy_model", steps=4)
    assert isinstance(other.architecture, Architecture)
    with pytest.raises(ValueError, match="num_classes 2 against None of this run"):
        train_job(other, str(tmp_path), ranks=Ranks(), hooks=Silent())


STAGE = """
from pathlib import Path
from tests.stages.test_training_stages import run_stage
from stages.tracker import PrintTracker
import torch
torch.set_num_threads(1)
run_stage({name!r}, Path({data!r}), Path({out!r}), Path({work!r}), PrintTracker(), steps=60, checkpoint_every=5,
          equal_time_step=33)
"""


def stage_process(name, data, out, work) -> subprocess.Popen:
    script = STAGE.format(name=name, data=str(data), out=str(out), work=str(work))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_stage_killed_in_the_middle_ends_with_the_same_bytes(data, tmp_path, monkeypatch):
    """Through Ray Train, kill -9 of the driver; the undisturbed run is the same loop in this process."""
    killed = stage_process("llamagen", data, tmp_path / "out", tmp_path / "work")
    while killed.poll() is None and not list((tmp_path / "work").glob("run-*/step-*")):
        time.sleep(0.02)
    assert killed.poll() is None, killed.stdout.read()
    (trains,) = psutil.Process(killed.pid).children()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert gone(trains.pid)  # the training process does not outlive who started it
    (run,) = (tmp_path / "work").glob("run-*")
    steps = sorted(int(path.name[5:]) for path in run.glob("step-*"))
    assert steps and steps[-1] < 60 and not (tmp_path / "out").exists()

    again = stage_process("llamagen", data, tmp_path / "out", tmp_path / "work")
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert f"step {steps[-1] - 3} " not in output and "step 60 train/loss=" in output

    monkeypatch.setattr(training.ray_train, "fit", in_process)
    run_stage("llamagen", data, tmp_path / "whole", tmp_path / "other", steps=60, checkpoint_every=5, equal_time_step=33)
    for file in ("model.safetensors", "snapshots/step-00000033.safetensors", "curve.csv", "metrics.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
