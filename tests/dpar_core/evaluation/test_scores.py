"""References and protocols: what is refused, and what has to agree before two numbers are compared."""

import numpy as np
import pytest

from dpar_core.evaluation import reference as reference_module
from dpar_core.evaluation.features import FeatureNetwork
from dpar_core.evaluation.image_sets import ImageSet
from dpar_core.evaluation.measure import measure
from dpar_core.evaluation.protocol import ScoreError
from dpar_core.evaluation.reference import reference_of_file, reference_of_images
from dpar_core.evaluation.scores import ScoreSettings, check_images, protocol_of


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


def test_a_reference_that_changed_while_it_was_read_is_refused_and_not_kept(tmp_path, network, monkeypatch):
    np.savez(tmp_path / "r.npz", arr_0=pictures(8, 8))
    read = reference_module.read_image_set

    def copied_over(path):
        found = read(path)
        np.savez(path, arr_0=pictures(8, 8, count=7))
        return found

    monkeypatch.setattr(reference_module, "read_image_set", copied_over)
    with pytest.raises(ScoreError, match=r"r\.npz changed while it was read"):
        reference(tmp_path / "r.npz", network, tmp_path / "cache")
    monkeypatch.undo()
    assert reference(tmp_path / "r.npz", network, tmp_path / "cache").images == 7
