"""Sweeps: trials are functions of their settings, finished ones are kept, bad settings and failures get a sentence."""

import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from dpar_core.data.manifest import write_manifest
from dpar_core.evaluation.features import DemoClassifier
from dpar_core.evaluation.scores import compare
from dpar_core.files import save_weights, write_record
from stages import params as P
from stages import score
from stages.data import builtin_manifest
from stages.shared.scoring import make_reference, measure_images, settings_of
from stages.tools import sweep
from stages.tools.sweep import Point, Subject, SweepPlan, Trial
from stages.tracker import NullTracker
from stages.workers import cluster
from tests.helpers.sample_artifacts import ROOT, sample_section, write_artifacts


@pytest.fixture(scope="module")
def ray_here():
    """One start of Ray for all sweeps of this file: `connected` takes the one that is there."""
    with cluster.connected():
        yield


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    artifacts = write_artifacts(folder)
    params = P.load_params(ROOT / "params" / "smoke.yaml")
    builtin = params.data.builtin.model_copy(update={"train_crops": 27, "validation_crops": 9})
    write_manifest(folder / "manifest.parquet", builtin_manifest(builtin, seed=0))
    torch.manual_seed(0)
    save_weights(
        folder / "c.safetensors", DemoClassifier(9).state_dict(), kind="demo_classifier", config={"num_classes": 9}, meta={}
    )
    scored = replace(P.select(params, score.Params), data=params.data.model_copy(update={"image_size": 8}))
    settings = scored.score.model_copy(update={"bootstrap": 5})
    return Subject(
        {None: artifacts.dpar_files},
        sample_section(),
        replace(scored, score=settings),
        folder / "manifest.parquet",
        folder / "c.safetensors",
        "cpu",
    )


def plan(**changes):
    points = tuple(Point(threshold, scale) for threshold in (1.0, 2.6) for scale in (1.0, 2.0))
    return SweepPlan(points, **{"images": 12, "final_images": 15, "finalists": 2, "concurrency": 1, **changes})


def run(subject, plan, folder):
    reported = []
    outcome = sweep.sweep(subject, plan, folder / "trials", folder / "work", NullTracker(), finished=reported.append)
    return outcome, reported


def without_clock(results):
    return [replace(one, seconds=0.0, images_per_s=0.0) for one in results]


@pytest.mark.slow
def test_a_grid_is_searched_the_best_are_drawn_again_and_a_second_start_runs_only_what_is_missing(
    ray_here, subject, tmp_path
):
    outcome, reported = run(subject, plan(), tmp_path)
    assert [one.point for one in outcome.search] == [Point(1.0, 1.0), Point(1.0, 2.0), Point(2.6, 1.0), Point(2.6, 2.0)]
    assert not outcome.failed
    assert len(reported) == 6
    best = sorted(outcome.search, key=lambda one: one.value("eval/fd_demo"))[:2]
    assert [one.point.threshold for one in outcome.finals] == [one.point.threshold for one in best]
    assert {one.trial.images for one in outcome.finals} == {15}
    assert {one.trial.first_seed for one in outcome.finals}.isdisjoint({one.trial.first_seed for one in outcome.search})
    distances = [one.value("eval/fd_demo") for one in outcome.finals]
    assert outcome.winner("eval/fd_demo").value("eval/fd_demo") == min(distances)
    fewer, more = (outcome.search[number].patches_per_image for number in (2, 0))
    assert fewer < more  # a higher threshold makes longer patches

    trials = tmp_path / "trials"
    gone, *kept = [one.key for one in outcome.search]
    (trials / f"{gone}.json").unlink()
    before = {key: (trials / f"{key}.json").stat().st_mtime_ns for key in kept}
    again, _ = run(subject, plan(), tmp_path)
    assert {key: (trials / f"{key}.json").stat().st_mtime_ns for key in kept} == before
    assert without_clock(again.search) == without_clock(outcome.search)
    assert without_clock(again.finals) == without_clock(outcome.finals)


def test_a_trial_is_the_same_whatever_its_batches_and_goes_on_with_those_that_are_there(subject, tmp_path, monkeypatch):
    trial = Trial(Point(1.5, 2.0), 9, 77, final=False)
    results = []
    for name, batch in (("a", 4), ("b", 3)):
        (tmp_path / name).mkdir()
        one = replace(subject, sample=subject.sample.model_copy(update={"batch_size": batch}))
        results.append(sweep.run_trial(one, trial, tmp_path / name, tmp_path / name))
    assert without_clock(results[:1]) == without_clock(results[1:])
    assert (tmp_path / "a" / f"{results[0].key}.png").read_bytes() == (tmp_path / "b" / f"{results[1].key}.png").read_bytes()

    sampled, original = [], sweep.sample.sample_batch

    def breaks_off(job, batch, progress=None):
        if len(sampled) == 2:
            sampled.append("cut")
            raise KeyboardInterrupt
        sampled.append(batch)
        return original(job, batch, progress)

    monkeypatch.setattr(sweep.sample, "sample_batch", breaks_off)
    (tmp_path / "c").mkdir()
    with pytest.raises(KeyboardInterrupt):
        sweep.run_trial(subject, trial, tmp_path / "c", tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.json"))
    result = sweep.run_trial(subject, trial, tmp_path / "c", tmp_path / "c")
    assert sampled == [0, 1, "cut", 2]
    assert without_clock([result]) == without_clock(results[:1])

    (tmp_path / "d").mkdir()
    sampled[1:] = []
    with pytest.raises(KeyboardInterrupt):
        sweep.run_trial(subject, trial, tmp_path / "d", tmp_path / "d")
    threes = replace(subject, sample=subject.sample.model_copy(update={"batch_size": 3}))
    assert without_clock([sweep.run_trial(threes, trial, tmp_path / "d", tmp_path / "d")]) == without_clock(results[:1])
    assert not [path for path in (tmp_path / "d").iterdir() if path.is_dir() and path.name.startswith(result.key)]


def test_a_trial_s_score_is_that_of_its_images_drawn_one_by_one(subject, tmp_path):
    trial = Trial(Point(2.0, 1.5), 8, 5, final=False)
    result = sweep.run_trial(subject, trial, tmp_path, tmp_path)
    sampler = sweep.sample.Sampler(subject.files(trial.point), subject.section(trial), device="cpu")
    images, counts = [], []
    for place in range(8):
        sampled = sampler.generate([place % 3], [5 + place])
        images.append(sampler.pixels(sampled.tokens))
        counts.append(len(sampled.patch_lengths[0]))
    network = sweep._network(subject)
    scored = subject.score
    reference = make_reference(scored.score, scored.data, subject.manifest, network, NullTracker(), cache=tmp_path)
    measured = measure_images(network, np.concatenate(images))
    scores, _ = compare(measured, reference, settings_of(scored.score), seed=scored.seed)
    assert result.value("eval/fd_demo") == pytest.approx(scores["eval/fd_demo"], rel=1e-9)
    assert result.patches_per_image == pytest.approx(np.mean(counts))


def test_trials_scored_against_a_file_that_was_replaced_are_others(subject, tmp_path):
    def against(side, seed):
        images = np.random.default_rng(seed).integers(0, 256, (20, side, side, 3), np.uint8)
        np.savez(tmp_path / "reference.npz", arr_0=images)
        settings = subject.score.score.model_copy(update={"reference": str(tmp_path / "reference.npz")})
        outside = replace(subject, score=replace(subject.score, score=settings))
        scored, network = outside.score, sweep._network(outside)
        reference = make_reference(
            scored.score, scored.data, outside.manifest, network, NullTracker(), cache=tmp_path / str(seed)
        )
        return replace(outside, outside=outside.reads_from_outside(reference, network))

    trial = Trial(Point(1.0, 1.0), 6, 1, final=False)
    one = against(8, 0)
    first = sweep.run_trial(one, trial, tmp_path, tmp_path)
    other = against(8, 1)
    assert other.key(trial) != one.key(trial) and subject.outside == ""
    assert sweep.run_trial(other, trial, tmp_path, tmp_path).scores.values != first.scores.values
    with pytest.raises(ValueError, match=r"score.reference or score.features_file changed while the sweep ran"):
        sweep.run_trial(one, trial, tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"the trial holds images of 8 x 8 pixels, the reference reference.npz of 12 x 12"):
        sweep.run_trial(against(12, 2), trial, tmp_path, tmp_path)


@pytest.mark.slow
def test_a_failed_trial_is_reported_and_sinks_no_other(ray_here, subject, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    files = replace(subject.models[None], model=broken)
    outcome, _ = run(replace(subject, models={**subject.models, 1.0: files}), plan(final_images=0), tmp_path)
    assert [one.point.threshold for one in outcome.search] == [2.6, 2.6]
    assert [one.point.threshold for one in outcome.failed] == [1.0, 1.0]
    assert "is not a safetensors file" in outcome.failed[0].error


@pytest.mark.slow
def test_optuna_goes_on_from_the_trials_it_finds(ray_here, subject, tmp_path):
    first, _ = run(subject, plan(search="optuna", trials=2, final_images=0), tmp_path)
    assert len(first.search) == 2
    again, _ = run(subject, plan(search="optuna", trials=3, final_images=0), tmp_path)
    assert len(again.search) == 3
    assert without_clock(again.search[:2]) == without_clock(first.search)
    for one in again.search:
        assert 1.0 <= one.point.threshold <= 2.6
        assert 1.0 <= one.point.cfg_scale <= 2.0


@pytest.fixture
def distances(subject, tmp_path, monkeypatch):
    """A trial's result at once: the distance is `of` its point. Trials run here, in the order of Optuna's questions."""
    made = sweep.run_trial(subject, Trial(Point(1.0, 1.0), 6, 1, final=False), tmp_path, tmp_path)

    def of(point):
        return (point.threshold - 1.7) ** 2 + (point.cfg_scale - 1.2) ** 2

    def tune(runner, space, trial, progress, *, searcher, samples):
        for number in range(samples):
            one = trial(sweep.point_of(searcher.suggest(str(number))))
            scores = replace(made.scores, values={**made.scores.values, "eval/fd_demo": of(one.point)})
            result = replace(made, key=subject.key(one), trial=one, scores=scores)
            path = runner.folder / f"{result.key}.json"
            write_record(path, {**asdict(result), "scores": result.scores.to_json()})
            later = 10**18 + 10**9 * len(list(runner.folder.glob("*.json")))  # whatever the clock's resolution
            os.utime(path, ns=(later, later))
            searcher.on_trial_complete(str(number), {"distance": of(one.point)})

    monkeypatch.setattr(sweep._Runner, "_tune", tune)
    return of


def test_an_interrupted_optuna_search_is_the_one_that_was_not(subject, distances, tmp_path):
    whole, _ = run(subject, plan(search="optuna", trials=16, final_images=0), tmp_path / "whole")
    for trials in (3, 11, 16):
        parts, _ = run(subject, plan(search="optuna", trials=trials, final_images=0), tmp_path / "parts")
        assert [one.point for one in parts.search] == [one.point for one in whole.search[:trials]]
    found = min((distances(one.point), one.point.threshold) for one in whole.search)
    best = whole.winner("eval/fd_demo")
    assert (best.value("eval/fd_demo"), best.point.threshold) == found
    started = np.mean([distances(one.point) for one in whole.search[:10]])
    assert np.mean([distances(one.point) for one in whole.search[10:]]) < started / 2  # it is the minimum that is sought


def test_a_search_in_another_box_knows_the_trials_inside_it_alone(subject, distances, tmp_path):
    wide, _ = run(subject, plan(search="optuna", trials=8, final_images=0), tmp_path)
    corners = (Point(1.23456789, 1.0), Point(1.9000049, 2.0))
    narrow, reported = run(subject, replace(plan(search="optuna", trials=9, final_images=0), points=corners), tmp_path)
    assert len(narrow.search) == 9
    assert all(1.23456789 <= one.point.threshold <= 1.9000049 for one in narrow.search)
    known = [one for one in wide.search if 1.23456789 <= one.point.threshold <= 1.9000049]
    assert 0 < len(known) < 8
    assert reported == narrow.search[: len(known)] == known


def test_points_that_were_asked_for_are_tried_with_all_their_digits():
    asked = Point(1.23456789, 1.000049)
    assert sweep.point_of({"point": asdict(asked)}) == asked
    assert sweep._short(1.23456789, 1.0, 2.0) == 1.2346
    assert sweep._points(replace(plan(search="random", trials=3), points=(asked,))) == [asked] * 3


def test_a_random_search_follows_from_its_plan():
    points = sweep._points(plan(search="random", trials=5))
    assert points == sweep._points(plan(search="random", trials=5))
    assert len(set(points)) == 5
    assert points[:3] == sweep._points(plan(search="random", trials=3))


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([Point(2.0, 1.0), Point(9.0, 1.0)], r"thresholds 9 make no sense for 16 codes: expected 0 to ln 16 = 2\.773"),
        ([Point(2.0, 0.5)], "cfg scales 0.5: expected numbers from 1"),
        ([Point(2.0, float("nan"))], "cfg scales nan: expected numbers from 1"),
        ([Point(2.0, float("inf"))], "cfg scales inf: expected numbers from 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_first_trial(subject, points, words):
    with pytest.raises(ValueError, match=words):
        sweep.check_points(points, subject.models[None])


def test_too_few_images_for_a_distance_are_refused_before_the_first_trial(subject, tmp_path):
    strict = subject.score.score.model_copy(update={"allow_singular": False})
    strictly = replace(subject, score=replace(subject.score, score=strict))
    with pytest.raises(ValueError, match="the samples are 12 images, and the covariance of 64 features"):
        run(strictly, plan(), tmp_path)
    assert not (tmp_path / "work" / "tune").exists()


@pytest.mark.slow
def test_more_trials_at_once_than_the_machine_holds_are_refused(ray_here, subject, tmp_path):
    with pytest.raises(ValueError, match="`--concurrency` asks for 4096 workers"):
        run(subject, plan(concurrency=4096), tmp_path)
    assert not list((tmp_path / "trials").glob("*.json"))


def test_a_result_is_read_as_written_and_one_that_was_damaged_is_none(subject, tmp_path, capsys):
    result = sweep.run_trial(subject, Trial(Point(2.0, 1.0), 6, 1, final=True), tmp_path, tmp_path)
    assert sweep.read_result(tmp_path, result.key) == result and "threads, torch" in result.machine
    path = tmp_path / f"{result.key}.json"
    path.write_text(path.read_text().replace('"images_per_s": ', '"images_per_s": 1'))
    assert sweep.read_result(tmp_path, result.key) is None
    assert "was edited" in capsys.readouterr().err
