"""References and protocols: what is refused, and what has to agree before two numbers are compared."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dpar_core.evaluation.features import FeatureNetwork
from dpar_core.evaluation.image_sets import ImageSet
from dpar_core.evaluation.measure import measure
from dpar_core.evaluation.metrics import Interval, ScoreError
from dpar_core.evaluation.reference import reference_of_file, reference_of_images
from dpar_core.evaluation.scores import Protocol, Scores, ScoreSettings, check_images, protocol_of, read_scores, refuse_mixed
from dpar_core.files import Damaged, digest_of, write_record


def pictures(height, width, count=6):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture
def network(tmp_path):
    """Mean colours as features."""
    return FeatureNetwork("demo", "f" * 16, tmp_path, lambda x: (x.mean(dim=(2, 3)), None, x.flatten(1)[:, :4]), "cpu")


def reference(path, network, cache):
    return reference_of_file(path, network, lambda images: measure(network, images), cache=cache)


SETTINGS = ScoreSettings("demo", 6, 1, 1, 0, allow_singular=True)


def test_height_and_width_belong_to_the_protocol_and_must_be_the_references(tmp_path, network):
    square, wide = pictures(8, 8), pictures(8, 6)
    np.savez(tmp_path / "r.npz", arr_0=square)
    against = reference(tmp_path / "r.npz", network, tmp_path / "cache")
    check_images(square, against, "x")
    with pytest.raises(ScoreError, match=r"images of 6 x 8 pixels, the reference r\.npz of 8 x 8"):
        check_images(wide, against, "x")
    with pytest.raises(ScoreError, match="images of 8 x 6 pixels"):
        check_images(pictures(6, 8), against, "x")
    ids = {protocol_of(network, against, SETTINGS, ImageSet(images)).id for images in (square, wide, pictures(6, 8))}
    assert len(ids) == 3
    stored = {protocol_of(network, against, SETTINGS, ImageSet(square, (one,))).id for one in ("lossless", "JPEG")}
    assert len(stored) == 2


@pytest.mark.parametrize(
    ("images", "splits", "same"), [(4_999, 1, True), (10_000, 2, True), (7_000, 3, True), (7_000, 2, False)]
)
def test_a_protocol_has_another_id_only_where_parts_of_the_inception_score_changed(images, splits, same):
    protocol = Protocol("demo", "f", "r", "d", 9, images, 8, 8, ("lossless",), 1, splits)
    without = {name: value for name, value in protocol.to_json().items() if name != "reference"}
    assert (protocol.id == digest_of(without)[:8]) == same


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mu": np.array([0.0, np.nan, 0])}, "hold 1 values that are not finite"),
        ({"sigma": np.diag([1.0, np.inf, 1])}, "hold 1 values that are not finite"),
        ({"sigma": np.diag([1.0, -1, 1])}, "is not a covariance"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "is not a covariance"),
        ({"sigma": np.zeros((3, 3))}, "is not a covariance .zero"),
        ({"sigma": np.eye(3, dtype=np.float16)}, "are float64 and float16, too coarse"),
        ({"sigma": np.eye(2)}, "do not fit"),
        ({"mu": np.zeros(3, complex)}, "expected numbers"),
        ({"mu_s": np.full(4, np.nan), "sigma_s": np.eye(4)}, "mu_s .* hold 4 values that are not finite"),
        ({"sigma": None}, "has mu without sigma"),
        ({"mu": None, "sigma": None, "mu_s": np.zeros(4), "sigma_s": np.eye(4)}, "has mu_s without mu"),
    ],
)
def test_statistics_that_cannot_be_are_refused(tmp_path, network, changes, words):
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3), **changes}
    np.savez(tmp_path / "s.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ScoreError, match=words):
        reference(tmp_path / "s.npz", network, tmp_path)


def test_a_damaged_cache_of_reference_features_is_made_again(tmp_path, network):
    def made():
        return reference_of_images(
            "r",
            "d" * 16,
            lambda: ImageSet(pictures(8, 8), left_out=("x.heic",)),
            network,
            lambda x: measure(network, x),
            cache=tmp_path,
        )

    first = made()
    assert first.notes == made().notes == ("1 file that cannot be used as an image was left out (x.heic)",)
    (file,) = tmp_path.glob("statistics-*.npz")
    whole = file.read_bytes()
    for damage in (b"", whole[:-50], whole[:100] + b"\xff" + whole[101:], b"<html>"):
        file.write_bytes(damage)
        np.testing.assert_array_equal(made().features, first.features)
        assert file.read_bytes() == whole


def scored(tmp_path, network):
    np.savez(tmp_path / "r.npz", arr_0=pictures(8, 8))
    against = reference(tmp_path / "r.npz", network, tmp_path / "cache")
    protocol = protocol_of(network, against, SETTINGS, ImageSet(pictures(8, 8)))
    return Scores({"eval/fd_demo": 1.5}, {"eval/fd_demo": Interval(1.0, 2.0)}, protocol, {"source": "x"})


def test_a_score_file_gives_back_its_scores(tmp_path, network):
    scores = scored(tmp_path, network)
    write_record(tmp_path / "a.json", scores.to_json())
    assert read_scores(tmp_path / "a.json") == scores
    other = replace(scores, protocol=replace(scores.protocol, image_width=7))
    with pytest.raises(ScoreError, match="they differ in image_width 8 / 7"):
        refuse_mixed([scores, other], ["a", "b"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found["protocol"].update(images=7), "changed by hand or damaged"),
        (lambda found: found["protocol"].update(images="six"), "damaged protocol"),
        (lambda found: found["protocol"].pop("image_width"), "another version of this project .*image_width"),
        (lambda found: found.update(protocol=[1]), "another version"),
        (lambda found: found.update({"eval/fd_demo": "1.5"}), "not finite"),
        (lambda found: found.update(intervals=[1, 2]), "not finite"),
        (lambda found: found.update(intervals={"eval/fd_demo": [1]}), "not finite"),
        (lambda found: found.pop("protocol_id"), "is not a score file"),
    ],
)
def test_a_changed_score_file_is_refused(tmp_path, network, change, words):
    found = scored(tmp_path, network).to_json()
    change(found)
    write_record(tmp_path / "a.json", found)
    with pytest.raises(ScoreError, match=words):
        read_scores(tmp_path / "a.json")


def test_a_score_without_its_digest_or_with_another_is_refused(tmp_path, network):
    found = scored(tmp_path, network).to_json()
    write_record(tmp_path / "a.json", found)
    whole = json.loads((tmp_path / "a.json").read_text())
    for edited in (found, {**found, "eval/fd_demo": float("nan")}, {**whole, "eval/fd_demo": 1.4}):
        (tmp_path / "a.json").write_text(json.dumps(edited))
        with pytest.raises(Damaged, match=r"is damaged, or|was edited"):
            read_scores(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"PK\x03\x04", b"[]"])
def test_a_file_that_holds_no_scores_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ScoreError, match="is not a score file"):
        read_scores(tmp_path / "a.json")
