"""Sampling as a job: the same images however it is cut, and refusals in a sentence."""

import filecmp
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpar_core.evaluation.sample_files import read_samples
from dpar_core.patches.maps import MadeBy, stated, write_rule
from dpar_core.patches.rule import PatchRule
from stages import sample as stage
from stages.shared.sampler import Files, Sampler
from stages.tracker import NullTracker
from tests.helpers.sample_artifacts import CLASSES, GRID, sample_section, write_artifacts

SAME = ["samples.npz", "samples.json", "tokens.npz", "grid.png", "metrics.json"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return write_artifacts(tmp_path_factory.mktemp("artifacts"))


def run_dpar(artifacts, folder: Path, *, work: Path | None = None, **changes) -> Path:
    inputs = stage.DPARInputs(artifacts.dpar, artifacts.entropy_model, artifacts.tokenizer, artifacts.rule)
    outputs = stage.DPAROutputs(folder / "samples")
    params = stage.Params(sample_section(**changes))
    stage.run_dpar(params, inputs, outputs, NullTracker(), device="cpu", work=work or folder / "work")
    return outputs.samples


def same(one: Path, other: Path, names=SAME) -> bool:
    return filecmp.cmpfiles(one, other, names, shallow=False) == (list(names), [], [])


def test_samples_are_what_the_adm_evaluator_reads(artifacts, tmp_path):
    folder = run_dpar(artifacts, tmp_path)
    images, labels = read_samples(folder / "samples.npz")
    assert images.shape == (11, 8, 8, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [i % CLASSES for i in range(11)]
    assert len(np.unique(images.reshape(11, -1), axis=0)) == 11
    metrics = json.loads((folder / "metrics.json").read_text())
    lengths = stage.patch_lengths(folder)
    assert metrics["patch/patches_per_image"] == pytest.approx(np.mean([len(one) for one in lengths]))
    assert metrics["patch/mean_length"] == pytest.approx(11 * GRID**2 / sum(len(one) for one in lengths))
    assert metrics["patch/threshold_nats"] == pytest.approx(1.8)
    assert GRID**2 > metrics["patch/patches_per_image"] > GRID + 1
    timings = json.loads((folder / "timings.json").read_text())
    assert timings["draw_images_per_s"] == pytest.approx(11 / timings["draw_seconds"]) and "images_per_s" not in timings
    protocol = json.loads((folder / "samples.json").read_text())
    assert protocol["made_by"].keys() == {"model", "tokenizer", "entropy_model"}
    assert protocol["classes"] == ["ape", "bee", "cow"]
    assert Image.open(folder / "grid.png").size[0] > 3 * 8


@pytest.mark.parametrize("gate", ["entropy_model", "decoder"])
def test_batch_size_changes_no_byte_of_the_output(artifacts, tmp_path, gate):
    first = run_dpar(artifacts, tmp_path / "a", gate=gate)
    for number, size in enumerate((1, 3, 64)):
        assert same(first, run_dpar(artifacts, tmp_path / str(number), gate=gate, batch_size=size))


def test_threads_change_no_byte_of_the_output(artifacts, tmp_path):
    first = run_dpar(artifacts, tmp_path / "a")
    torch.set_num_threads(2)
    assert same(first, run_dpar(artifacts, tmp_path / "b"))


def test_a_job_that_was_killed_goes_on_with_the_batches_that_are_whole(artifacts, tmp_path, monkeypatch):
    whole = run_dpar(artifacts, tmp_path / "whole")
    sampled = []
    original = stage.sample_batch

    def dies_in_the_third(job, batch, progress=None):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        sampled.append(batch)
        return original(job, batch, progress)

    monkeypatch.setattr(stage, "sample_batch", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_dpar(artifacts, tmp_path / "killed")
    assert not (tmp_path / "killed" / "samples").exists()
    monkeypatch.setattr(stage, "sample_batch", lambda *a: sampled.append(a[1]) or original(*a))
    assert same(whole, run_dpar(artifacts, tmp_path / "killed"))
    assert sampled == [0, 1, 2]


def test_the_baseline_is_sampled_at_both_steps(artifacts, tmp_path):
    inputs = stage.LlamaGenInputs(artifacts.baseline, artifacts.equal_time, artifacts.tokenizer)
    outputs = stage.LlamaGenOutputs(tmp_path / "llamagen", tmp_path / "llamagen_equal_time")
    tracker = NullTracker()
    params = stage.Params(sample_section(resize=12))
    stage.run_llamagen(params, inputs, outputs, tracker, device="cpu", work=tmp_path / "work")
    one, other = (read_samples(folder / "samples.npz").images for folder in (outputs.samples, outputs.equal_time))
    assert one.shape == other.shape == (11, 12, 12, 3)
    assert not np.array_equal(one, other)
    assert tracker.metrics["patch/patches_per_image"] == GRID**2
    assert "equal_time/perf/images_per_s" in tracker.metrics
    assert json.loads((outputs.samples / "samples.json").read_text())["resized_from"] == 8


@pytest.mark.parametrize("plan", ["balanced", "random"])
def test_a_class_that_was_never_trained_is_not_sampled(tmp_path, capsys, plan):
    made = write_artifacts(tmp_path / "artifacts", dpar_meta={"untrained_classes": [1]})
    folder = run_dpar(made, tmp_path, plan=plan)
    assert set(read_samples(folder / "samples.npz").labels.tolist()) == {0, 2}
    assert json.loads((folder / "samples.json").read_text())["untrained_classes"] == [1]
    assert "1 class had no training images and is left out (bee)" in capsys.readouterr().out
    sampler = Sampler(made.dpar_files, sample_section(), device="cpu")
    with pytest.raises(ValueError, match="has seen no training image of bee: sample other classes"):
        sampler.generate([0, 1], [0, 1])


def test_a_balanced_plan_that_cannot_show_every_class_is_named(tmp_path, capsys):
    run_dpar(write_artifacts(tmp_path / "artifacts"), tmp_path, images=2)
    assert "2 images of a balanced plan are of the first 2 of 3 classes alone" in capsys.readouterr().out.replace("\n ", "")
    assert stage.too_few_for_classes(3, 3) == ""


def test_random_plans_ask_each_images_own_seed():
    labels = [stage.label_of(i, plan="random", seed=50, classes=range(7)) for i in range(400)]
    assert labels[10:] == [stage.label_of(i, plan="random", seed=60, classes=range(7)) for i in range(390)]
    assert min(np.bincount(labels, minlength=7)) > 30


def test_balanced_plans_draw_the_same_number_of_every_class():
    labels = [stage.label_of(i, plan="balanced", seed=0, classes=range(9)) for i in range(450)]
    assert np.bincount(labels).tolist() == [50] * 9


def test_sampling_overrides_the_training_rule_and_says_so(artifacts, tmp_path):
    folder = run_dpar(artifacts, tmp_path, threshold=0.0, max_patch_length=2)
    rule = json.loads((folder / "samples.json").read_text())["rule"]
    assert (rule["threshold"], rule["max_patch_length"]) == (0.0, 2)
    assert json.loads((folder / "metrics.json").read_text())["patch/mean_length"] == 1


@pytest.mark.parametrize("threshold", [2.8, 50.0])
def test_a_threshold_above_the_largest_entropy_is_refused(artifacts, tmp_path, threshold):
    with pytest.raises(ValueError, match=r"makes no sense for 16 codes: expected 0 to ln 16 = 2\.773"):
        run_dpar(artifacts, tmp_path, threshold=threshold)


def test_a_gate_trained_on_another_tokenizer_is_refused(tmp_path):
    strange = write_artifacts(tmp_path, gate_trained_on="0123456789abcdef")
    with pytest.raises(ValueError, match=r"was trained on tokens of tokenizer 0123456789abcdef.*dpar-cli run entropy_model"):
        run_dpar(strange, tmp_path / "run")
    run_dpar(strange, tmp_path / "run", gate="decoder")  # which does not read it


def test_a_model_of_another_kind_or_a_missing_one_is_refused(artifacts):
    with pytest.raises(ValueError, match="holds weights of kind 'gpt', expected 'dpar'"):
        Sampler(replace(artifacts.dpar_files, model=artifacts.baseline), sample_section(), device="cpu")
    with pytest.raises(FileNotFoundError, match="no trained model at"):
        Sampler(Files(Path("nowhere"), artifacts.tokenizer), sample_section(), device="cpu")


def test_a_batch_whose_caches_cannot_fit_is_refused_before_anything_is_drawn(artifacts, tmp_path, monkeypatch):
    class Little:
        available = 100_000

    monkeypatch.setattr(stage.psutil, "virtual_memory", Little)
    with pytest.raises(ValueError, match=r"needs .* GiB of caches.*the images stay the same"):
        run_dpar(artifacts, tmp_path, batch_size=64)


def test_workers_that_share_a_machine_share_its_memory(artifacts, monkeypatch):
    sampler = Sampler(artifacts.dpar_files, sample_section(), device="cpu")

    class JustEnough:
        available = 1.5 * sampler.generator.cache_bytes(4)

    monkeypatch.setattr(stage.psutil, "virtual_memory", JustEnough)
    stage.check_memory(sampler, 4)
    with pytest.raises(ValueError, match=r"by each of 2 workers on one machine.*set sample.batch_size to 2 or less"):
        stage.check_memory(sampler, 4, workers=2)


def test_decoded_pixels_do_not_depend_on_neighbours(artifacts):
    sampler = Sampler(artifacts.dpar_files, sample_section(), device="cpu")
    tokens = torch.randint(16, (5, GRID * GRID), generator=torch.Generator().manual_seed(0))
    whole = sampler.pixels(tokens, resize=10)
    assert np.array_equal(np.concatenate([sampler.pixels(one, resize=10) for one in tokens.split(2)]), whole)


def test_an_edited_rule_is_refused_and_so_is_one_of_another_entropy_model(tmp_path):
    made = write_artifacts(tmp_path)
    text = made.rule.read_text()
    made.rule.write_text(text.replace("1.8", "1.7"))
    with pytest.raises(ValueError, match=r"rule\.json is damaged or was edited .* run `dvc repro -sf patch_maps`"):
        Sampler(made.dpar_files, sample_section(), device="cpu")
    write_rule(made.rule, PatchRule("entropy_rows", 4, 1.8, 4), made_by=MadeBy("0" * 16, "0" * 16))
    with pytest.raises(ValueError, match=r"with entropy model 0{16}, but this run has .* run `dpar-cli run patch_maps`"):
        Sampler(made.dpar_files, sample_section(), device="cpu")


@pytest.mark.parametrize("trained_on", ["fp16", "fp32"])
def test_the_gate_has_the_precision_of_the_entropies_that_dpar_was_trained_on(tmp_path, trained_on):
    rule = PatchRule("entropy_rows", GRID, 1.8, 4)
    made = write_artifacts(tmp_path, dpar_meta={"rule": asdict(rule), **stated(trained_on)})
    made_by = MadeBy.read(json.loads(made.rule.read_text())["made_by"])
    write_rule(made.rule, rule, made_by=replace(made_by, precision="fp16"))
    if trained_on == "fp16":
        sampler = Sampler(made.dpar_files, sample_section(), device="cpu")
        assert sampler.generator.gate_dtype == torch.float16 and sampler.generator.dtype == torch.float32
        assert sampler.protocol()["gate_precision"] == "fp16"
        other = sampler.with_settings(sample_section(precision="bf16"))
        assert (other.generator.gate_dtype, other.generator.dtype) == (torch.float16, torch.bfloat16)
        return
    words = r"trained on patches cut by entropies in fp32, but .*rule\.json holds those in fp16: .*`dpar-cli run train_dpar`"
    with pytest.raises(ValueError, match=words):
        Sampler(made.dpar_files, sample_section(), device="cpu")
    Sampler(made.dpar_files, sample_section(gate="decoder"), device="cpu")  # which asks no entropy model


def test_a_batch_that_was_damaged_is_sampled_again(tmp_path, capsys):
    made = write_artifacts(tmp_path / "made")
    section, work = sample_section(images=4, batch_size=2), tmp_path / "work"
    stage.sample_images(section, made.dpar_files, tmp_path / "a", NullTracker(), device="cpu", work=work, prefix="")
    damaged = work / "batch-000001.npz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    stage.sample_images(section, made.dpar_files, tmp_path / "b", NullTracker(), device="cpu", work=work, prefix="")
    assert f"{damaged} is damaged" in capsys.readouterr().err
    assert (tmp_path / "a" / "samples.npz").read_bytes() == (tmp_path / "b" / "samples.npz").read_bytes()
