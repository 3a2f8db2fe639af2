"""The stages that time the two models in turns, and the choice of the baseline's model at equal training time."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dpar_core.data.shards import TokenShards
from dpar_core.files import load_weights, save_weights
from dpar_core.turns import Turns
from stages import time_sampling, time_training
from stages.params import select
from stages.shared import pace
from stages.shared.configs import dpar_config, llamagen_config
from stages.shared.jobs import build
from stages.tracker import NullTracker
from stages.train import snapshot_name
from tests.helpers import sample_artifacts
from tests.helpers.tiny_shards import CODES, GRID, tiny_params, write_maps, write_tokens


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("dpar_core.turns.SHORTEST", 0.001)
    monkeypatch.setattr(time_training, "SECONDS", 0.1)
    monkeypatch.setattr(time_sampling, "SECONDS", 0.1)


@pytest.fixture
def inputs(tmp_path):
    write_tokens(tmp_path / "tokens")
    write_maps(tmp_path / "maps", tmp_path / "tokens")
    params, shape = tiny_params(), {"codebook_size": CODES, "row_width": GRID, "num_classes": 2}
    meta = {"tokens": TokenShards(tmp_path / "tokens", "train").digest}

    def save(name: str, kind: str, config, step: int) -> Path:
        weights = build(config, step).state_dict()
        save_weights(tmp_path / name, weights, kind=kind, config=vars(config), meta={**meta, "step": step})
        return tmp_path / name

    dpar = save("dpar.safetensors", "dpar", dpar_config(params.model, **shape), 12)
    baseline = llamagen_config(params.model, **shape)
    for step in (6, 7, 8, 9, 10, 11):
        save(f"snapshots/{snapshot_name(step)}", "gpt", baseline, step)
    llamagen = save("llamagen.safetensors", "gpt", baseline, 12)
    return time_training.Inputs(tmp_path / "tokens", tmp_path / "maps", dpar, llamagen, tmp_path / "snapshots")


def run(inputs, folder: Path, **changes) -> dict:
    params = select(tiny_params(**changes), time_training.Params)
    outputs = time_training.Outputs(folder / "training.json", folder / "equal_time.safetensors")
    time_training.run(params, inputs, outputs, NullTracker(), device="cpu", work=folder)
    return json.loads(outputs.speed.read_text())


@pytest.mark.parametrize(("ratio", "step"), [(1.4, 9), (1.2, 10), (1.02, 12), (0.9, 12), (3.0, 6)])
def test_the_baseline_is_taken_where_it_had_trained_as_long(inputs, tmp_path, monkeypatch, ratio, step):
    turns = Turns((1.0,) * 8, (ratio,) * 8)
    monkeypatch.setattr(time_training, "take_turns", lambda *programs, **settings: turns)
    found = run(inputs, tmp_path / "out", equal_time_step="auto")
    assert found["ratio"] == pytest.approx(ratio) and found["equal_time"]["needed"] == pytest.approx(12 / ratio)
    assert found["equal_time"]["step"] == step
    assert load_weights(tmp_path / "out/equal_time.safetensors", kind="gpt").meta["step"] == step


@pytest.mark.parametrize(("asked", "step"), [(7, 7), (None, 12)])
def test_a_step_that_was_asked_for_is_taken_whatever_the_speed(inputs, tmp_path, asked, step):
    run(inputs, tmp_path / "out", equal_time_step=asked)
    assert load_weights(tmp_path / "out/equal_time.safetensors", kind="gpt").meta["step"] == step


def test_both_models_take_real_steps_and_the_turns_are_kept(inputs, tmp_path):
    run(inputs, tmp_path / "out", equal_time_step="auto")
    found = pace.read_pace(tmp_path / "out/training.json")
    assert found.unit == "step" and found.images == 8 and len(found.turns.first) >= 6
    assert found.images_per_s["dpar"] == pytest.approx(8 / found.seconds["dpar"])


def test_a_model_of_other_tokens_is_not_timed(inputs, tmp_path):
    write_tokens(tmp_path / "others", train=20)
    others = time_training.Inputs(tmp_path / "others", *list(vars(inputs).values())[1:])
    with pytest.raises(ValueError, match="run `dpar-cli run train_dpar`"):
        run(others, tmp_path / "out")


def test_sampling_is_timed_in_turns_too(tmp_path):
    made = sample_artifacts.write_artifacts(tmp_path)
    inputs = time_sampling.Inputs(made.dpar, made.baseline, made.entropy_model, made.tokenizer, made.rule)
    params = time_sampling.Params(sample_artifacts.sample_section(batch_size=4))
    tracker = NullTracker()
    time_sampling.run(
        params, inputs, time_sampling.Outputs(tmp_path / "sampling.json"), tracker, device="cpu", work=tmp_path
    )
    found = pace.read_pace(tmp_path / "sampling.json")
    assert (found.unit, found.images) == ("image", 4)
    assert tracker.metrics["speed/sampling_ratio"] == pytest.approx(found.turns.ratio)
    for name, parts in found.parts.items():  # shares of the pace measured in turns, whatever one more batch took
        assert sum(parts.values()) - parts["decoding to pixels"] == pytest.approx(found.seconds[name])


def test_a_damaged_or_missing_file_of_speeds_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `dpar-cli run time_training`"):
        pace.read_pace(tmp_path / "training.json")
    (tmp_path / "sampling.json").write_text('{"unit": "image", "images": 4, "turns": {"dpar": [1.0], "llamagen": [1.0]}}')
    with pytest.raises(ValueError, match=r"is damaged.*run `dvc repro -sf time_sampling`"):
        pace.read_pace(tmp_path / "sampling.json")


def test_timing_waits_for_a_helper_that_works_but_not_for_ever():
    code = "import time\nuntil = time.monotonic() + 60\nwhile time.monotonic() < until: pass"
    busy = subprocess.Popen([sys.executable, "-c", code])
    resting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        started = time.monotonic()
        pace.wait_for_helpers(longest=1.0, busy=0.02, look=0.3)  # a share that a crowded machine leaves it too
        assert time.monotonic() - started >= 1.0
        busy.kill()
        busy.wait()
        started = time.monotonic()
        pace.wait_for_helpers(longest=60.0, look=0.1)
        assert time.monotonic() - started < 30
    finally:
        for helper in (busy, resting):
            helper.kill()
            helper.wait()
