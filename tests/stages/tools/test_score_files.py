"""Scores outside the workflow: references of every kind, one protocol a column, planted truths, bad input."""

import numpy as np
import pytest
from PIL import Image

from dpar_core.data.manifest import write_manifest
from dpar_core.evaluation.features import FeatureNetwork, Features
from dpar_core.evaluation.image_sets import ImageSet
from dpar_core.evaluation.measure import Measured
from dpar_core.evaluation.metrics import FeatureMoments, frechet_distance
from dpar_core.evaluation.protocol import Protocol, ScoreError, Scores, read_scores, refuse_mixed
from dpar_core.evaluation.reference import Reference
from dpar_core.evaluation.scores import compare, protocol_of
from dpar_core.files import write_record
from stages import params as P
from stages.data import builtin_manifest
from stages.shared.scoring import measure_images, reference_of, score_images
from stages.tools import score_files
from stages.tracker import NullTracker
from tests.helpers.tiny_data import ROOT

SMOKE = P.load_params(ROOT / "params" / "smoke.yaml")


def settings(images, **changes):
    given = {"neighbours": 3, "bootstrap": 20, "allow_singular": True, **changes}
    return score_files.settings_for("demo", images=images, **given)


def pictures(seed, count=24, size=32):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_the_same_images_give_the_same_reference_from_npz_folder_and_statistics(tmp_path, network):
    images = pictures(0)
    npz(tmp_path / "a.npz", arr_0=images)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number:03d}.png")
    found = network(images)
    pool, spatial = FeatureMoments.of(found.pool), FeatureMoments.of(found.spatial)
    npz(tmp_path / "s.npz", mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance, arr_0=images)
    against = [
        reference_of(tmp_path / name, network, NullTracker(), cache=tmp_path / "cache")
        for name in ("a.npz", "folder", "s.npz")
    ]
    samples = npz(tmp_path / "mine.npz", arr_0=pictures(1))
    scores = [score_images(samples, one, network, settings(24), NullTracker(), seed=0) for one in against]
    names = list(scores[0].values)
    assert {"eval/fd_demo", "eval/sfd_demo", "eval/is_demo", "eval/precision", "eval/recall", "eval/kid_demo"} <= set(names)
    for other in scores[1:]:
        for name in names:
            assert other.values[name] == pytest.approx(scores[0].values[name], rel=1e-9, abs=1e-12), name


def test_what_people_should_know_of_a_reference_is_printed_whenever_it_is_used(tmp_path, network, capsys):
    for number, image in enumerate(pictures(0, 3)):
        Image.fromarray(image).save(tmp_path / f"{number}.jpg")
    (tmp_path / "3.heic").write_bytes(b"another format")
    for _ in range(2):
        reference_of(tmp_path, network, NullTracker(), cache=tmp_path / ".cache")
        said = capsys.readouterr().err
        assert "1 file that cannot be used as an image was left out (3.heic)" in said and "stored as JPEG" in said
    for images, words in (
        (pictures(0, 1), "reference x.npz holds 1 image: "),
        (pictures(0, 1).repeat(4, 0), "are the same"),
    ):
        with pytest.raises(ScoreError, match=words):
            reference_of(npz(tmp_path / "x.npz", arr_0=images), network, NullTracker(), cache=tmp_path / ".cache")


def test_statistics_alone_do_not_state_what_they_are_of(tmp_path, network, capsys):
    path = npz(tmp_path / "s.npz", mu=np.zeros(64), sigma=np.eye(64))
    reference_of(path, network, NullTracker(), cache=tmp_path / ".cache")
    assert "reference s.npz: statistics alone, which do not state how many images" in capsys.readouterr().err


def test_the_first_of_more_images_than_asked_for_are_scored_and_that_is_said(tmp_path, network):
    against = reference_of(npz(tmp_path / "r.npz", arr_0=pictures(1)), network, NullTracker(), cache=tmp_path)
    said = []
    samples = npz(tmp_path / "a.npz", arr_0=pictures(0))
    score_images(samples, against, network, settings(20), NullTracker(), seed=0, say=said.append)
    assert said == [f"{samples}: of 24 images the first 20 are scored"]


def test_features_of_a_reference_are_computed_once(tmp_path, network):
    path = npz(tmp_path / "a.npz", arr_0=pictures(0))
    first = reference_of(path, network, NullTracker(), cache=tmp_path / "cache")

    def never(*_):
        raise AssertionError("computed again")

    silent = FeatureNetwork(network.name, network.digest, network.file, never, "cpu")
    again = reference_of(path, silent, NullTracker(), cache=tmp_path / "cache")
    np.testing.assert_array_equal(first.features, again.features)


def test_identical_sets_have_distance_zero_and_precision_and_recall_one(tmp_path, network):
    path = npz(tmp_path / "a.npz", arr_0=pictures(0, 80))
    against = reference_of(path, network, NullTracker(), cache=tmp_path)
    said = []
    found = score_images(path, against, network, settings(80), NullTracker(), seed=0, say=said.append).values
    assert said == [f"{path}: these are the images of the reference itself"]
    assert found["eval/fd_demo"] == pytest.approx(0, abs=1e-9)
    assert found["eval/precision"] == found["eval/recall"] == 1


def test_a_planted_distance_lies_within_its_interval():
    rng, dimensions, count = np.random.default_rng(0), 6, 4000
    shift, scale = np.linspace(0, 0.8, dimensions), np.linspace(1, 1.6, dimensions)
    truth = float((shift**2).sum() + ((scale - 1) ** 2).sum())
    reference = rng.normal(size=(200_000, dimensions))
    against = Reference("x", "d", len(reference), FeatureMoments.of(reference), None, None)
    held = 0
    for _ in range(10):
        features = Features((shift + scale * rng.normal(size=(count, dimensions))).astype(np.float32), None, None)
        _, intervals = compare(Measured.of(features), against, settings(count, bootstrap=100), seed=1)
        low, high = intervals["eval/fd_demo"]
        held += low <= truth <= high
    assert held >= 8  # 95 % intervals, ten of them
    exact = frechet_distance(np.zeros(dimensions), np.eye(dimensions), shift, np.diag(scale**2))
    assert exact == pytest.approx(truth, rel=1e-12)


def test_a_manifest_is_a_reference(tmp_path, network):
    builtin = SMOKE.data.builtin.model_copy(update={"train_crops": 18, "validation_crops": 9})
    write_manifest(tmp_path / "manifest.parquet", builtin_manifest(builtin, seed=0))
    against = reference_of(tmp_path / "manifest.parquet", network, NullTracker(), cache=tmp_path, image_size=32)
    assert against.images == 18


def test_too_few_images_for_a_covariance_are_refused_unless_asked_for(network):
    def reference(count):
        given = network(pictures(0, count))
        moments = FeatureMoments.of(given.pool), FeatureMoments.of(given.spatial)
        return Reference("r", "0", count, *moments, given.pool)

    few, enough, many = (network(pictures(1, count)) for count in (64, 65, 449))
    for features, against, side in ((few, 65, "samples are 64"), (enough, 64, "reference are 64")):
        with pytest.raises(ScoreError, match=f"{side} images, and the covariance of 64 features has full rank only"):
            compare(Measured.of(features), reference(against), settings(64, allow_singular=False, bootstrap=0), seed=0)
        allowed, _ = compare(Measured.of(features), reference(against), settings(64, bootstrap=0), seed=0)
        assert {"eval/fd_demo", "eval/sfd_demo"} <= allowed.keys()
    found, _ = compare(Measured.of(enough), reference(449), settings(65, allow_singular=False, bootstrap=0), seed=0)
    assert "eval/fd_demo" in found and "eval/sfd_demo" not in found  # 448 spatial features
    found, _ = compare(Measured.of(many), reference(449), settings(449, allow_singular=False, bootstrap=0), seed=0)
    assert "eval/sfd_demo" in found


def test_scores_of_different_protocols_are_not_compared(tmp_path, network):
    files = []
    for count in (20, 24):
        path = npz(tmp_path / f"{count}.npz", arr_0=pictures(1, count))
        against = reference_of(npz(tmp_path / "r.npz", arr_0=pictures(0)), network, NullTracker(), cache=tmp_path)
        found = score_images(path, against, network, settings(count), NullTracker(), seed=0)
        write_record(tmp_path / f"{count}.json", found.to_json())
        files.append(read_scores(tmp_path / f"{count}.json"))
    refuse_mixed([files[0], files[0]], ["a", "b"])
    with pytest.raises(ScoreError, match=r"different protocols .*they differ in images 20 / 24"):
        refuse_mixed(files, ["a", "b"])
    with pytest.raises(ScoreError, match="different protocols"):
        score_files.spread(files)


def test_a_protocol_names_its_reference_by_content(tmp_path, network):
    ids = []
    for name in ("here.npz", "there.npz"):
        against = reference_of(npz(tmp_path / name, arr_0=pictures(0)), network, NullTracker(), cache=tmp_path)
        ids.append(protocol_of(network, against, settings(20), ImageSet(pictures(1, 20))).id)
    assert ids[0] == ids[1]


def test_the_spread_over_seeds_is_mean_and_deviation():
    protocol = Protocol("demo", "0", "r", "1", 24, 24, 32, 32, ("lossless",), 3, 1)
    sets = [Scores({"eval/fid": value}, {}, protocol, {}) for value in (2.0, 3.0, 7.0)]
    found = score_files.spread(sets)["eval/fid"]
    assert found.mean == pytest.approx(4)
    assert found.deviation == pytest.approx(np.std([2, 3, 7], ddof=1))


def test_bad_input_gets_one_sentence(tmp_path, network):
    against = reference_of(npz(tmp_path / "r.npz", arr_0=pictures(0)), network, NullTracker(), cache=tmp_path)

    def refused(path, words, images=24):
        with pytest.raises(ScoreError, match=words) as caught:
            score_images(path, against, network, settings(images), NullTracker(), seed=0)
        assert "\n" not in str(caught.value)

    whole = npz(tmp_path / "a.npz", arr_0=pictures(1))
    refused(whole, "holds 24 images, the protocol asks for 25", images=25)
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:-3000])
    refused(tmp_path / "cut.npz", "cut.npz is damaged or cut short")
    refused(npz(tmp_path / "o.npz", arr_0=np.array([{}], dtype=object)), "pickled objects")
    refused(npz(tmp_path / "same.npz", arr_0=np.repeat(pictures(1, 1), 24, axis=0)), "all 24 images are the same")
    (tmp_path / "mixed").mkdir()
    for size in (8, 16):
        Image.fromarray(pictures(0, 1, size)[0]).save(tmp_path / "mixed" / f"{size}.png")
    refused(tmp_path / "mixed", r"several sizes \(16.png is 16 x 16, 8.png is 8 x 8\)")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG no more")
    refused(tmp_path / "broken", "a.png cannot be used")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no image files")


def test_features_that_are_not_numbers_are_refused(network):
    features = Features(np.full((30, 64), np.nan, np.float32), None, None)
    moments = FeatureMoments.of(np.random.default_rng(0).normal(size=(50, 64)))
    with pytest.raises(ScoreError, match="30 of 30 features are not finite"):
        compare(Measured.of(features), Reference("x", "d", 50, moments, None, None), settings(30), seed=0)


def test_statistics_of_another_network_are_refused(tmp_path, network):
    path = npz(tmp_path / "s.npz", mu=np.zeros(10), sigma=np.eye(10))
    against = reference_of(path, network, NullTracker(), cache=tmp_path)
    with pytest.raises(ScoreError, match=r"the reference s\.npz has 10 features per image, these images 64"):
        compare(measure_images(network, pictures(0)), against, settings(24), seed=0)
    with pytest.raises(ScoreError, match="do not fit"):
        path = npz(tmp_path / "t.npz", mu=np.zeros(10), sigma=np.eye(9))
        reference_of(path, network, NullTracker(), cache=tmp_path)
