"""Distances: planted truths, identical sets, merging, and what cannot be scored."""

import numpy as np
import pytest

from dpar_core.evaluation.metrics import (
    FeatureMoments,
    bootstrap,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_radii,
    precision_recall,
)
from dpar_core.evaluation.protocol import ScoreError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def distance(a, b):
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def test_two_known_gaussians_give_the_analytic_distance(rng):
    deviations = np.array([1.0, 2.0, 0.5, 3.0])
    a = FeatureMoments.of(rng.normal(0, 1, (200_000, 4)))
    b = FeatureMoments.of(rng.normal(0.7, 1, (200_000, 4)) * deviations)
    expected = ((0.7 * deviations) ** 2).sum() + ((deviations - 1) ** 2).sum()
    assert distance(a, b) == pytest.approx(expected, rel=0.01)


def test_the_distance_agrees_with_the_matrix_root(rng):
    from scipy.linalg import sqrtm

    a, b = (FeatureMoments.of(rng.normal(0, 1, (300, 12)) @ rng.normal(0, 1, (12, 12))) for _ in range(2))
    cross = np.trace(sqrtm(a.covariance @ b.covariance).real)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * cross
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_identical_sets_are_at_distance_nought_and_cover_each_other(rng):
    features = rng.normal(0, 1, (100, 8))
    moments = FeatureMoments.of(features)
    assert distance(moments, moments) == pytest.approx(0, abs=1e-9)
    assert precision_recall(features, features) == (1.0, 1.0)


def test_a_singular_covariance_stays_real(rng):
    few = FeatureMoments.of(rng.normal(0, 1, (5, 32)))
    constant = FeatureMoments.of(np.ones((5, 32)))
    assert np.isfinite(distance(few, constant))
    assert distance(constant, constant) == 0


def test_moments_of_parts_merge_into_those_of_the_whole(rng):
    features = rng.normal(3, 2, (101, 6))
    whole = FeatureMoments.of(features)
    parts = [FeatureMoments.of(part) for part in (features[:17], features[17:60], features[60:])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.count == 101
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-12)


def test_chunks_do_not_change_precision_and_recall(rng, monkeypatch):
    a, b = rng.normal(0, 1, (90, 5)), rng.normal(0.5, 1, (70, 5))
    whole = precision_recall(a, b)
    monkeypatch.setattr("dpar_core.evaluation.metrics.CHUNK_BYTES", 4 * 90 * 7)
    assert precision_recall(a, b) == whole


def test_radii_are_those_of_a_plain_search(rng):
    features = rng.normal(0, 1, (30, 4)).astype(np.float32)
    plain = [np.sort(((features - one) ** 2).sum(axis=1))[3] for one in features]
    np.testing.assert_allclose(nearest_radii(features, 3), plain, rtol=1e-4)


def test_inception_score_of_certain_and_even_classes_is_their_number():
    assert inception_score(np.eye(7)[np.arange(70) % 7]) == pytest.approx(7)
    assert inception_score(np.full((50, 7), 1 / 7)) == pytest.approx(1)


def test_as_many_splits_as_there_are_parts_of_5000_are_those_parts(rng):
    """The ADM evaluator cuts 5 rows in parts of 2 into 2, 2 and 1, not into thirds."""
    p = rng.dirichlet(np.ones(3), size=5)
    whole = [inception_score(p[part], splits=1) for part in (slice(2), slice(2, 4), slice(4, 5))]
    assert inception_score(p, splits=3, split_size=2) == inception_score(p, split_size=2) == pytest.approx(np.mean(whole))
    halves = [inception_score(p[part], splits=1) for part in (slice(3), slice(3, 5))]
    assert inception_score(p, splits=2, split_size=2) == pytest.approx(np.mean(halves))


def test_kid_is_nought_in_the_mean_for_one_distribution_and_grows_with_a_shift(rng):
    a, b = rng.normal(0, 1, (400, 6)), rng.normal(0, 1, (400, 6))
    assert abs(kernel_distance(a, b, size=200)) < 0.05
    assert kernel_distance(a, b + 1, size=200) > 1


def test_bootstrap_intervals_hold_the_truth(rng):
    values = rng.normal(5, 1, 400)
    interval = bootstrap(lambda chosen: {"mean": float(values[chosen].mean())}, 400, resamples=300)["mean"]
    assert interval.low < values.mean() < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 20, rel=0.25)


def test_an_interval_ends_where_no_value_can_be(rng):
    """A few images near the reference: resampled sets spread wider than the distance is large."""
    reference, images = FeatureMoments.of(rng.normal(0, 1, (400, 1))), np.array([[-1.2], [-0.4], [0.3], [1.3]])

    def distance(chosen: np.ndarray) -> dict[str, float]:
        one = FeatureMoments.of(images[chosen])
        return {"fid": frechet_distance(one.mean, one.covariance, reference.mean, reference.covariance)}

    free = bootstrap(distance, 4, resamples=100)["fid"]
    held = bootstrap(distance, 4, resamples=100, least={"fid": 0.0})["fid"]
    assert free.low < 0 == held.low and held.high == free.high > 0


@pytest.mark.parametrize(
    ("features", "words"),
    [(np.ones((1, 4)), "at least two"), (np.full((9, 4), np.nan), "9 of 9 features are not finite")],
)
def test_what_cannot_be_scored_gets_a_sentence(features, words):
    with pytest.raises(ScoreError, match=words):
        FeatureMoments.of(features)


def test_too_few_features_and_foreign_statistics_are_refused():
    with pytest.raises(ScoreError, match="by 3 neighbours need more than 3 images of each side, got 3: take more, or lower"):
        precision_recall(np.ones((3, 4)), np.ones((9, 4)))
    with pytest.raises(ScoreError, match="do not fit"):
        frechet_distance(np.ones(3), np.eye(3), np.ones(4), np.eye(4))
    with pytest.raises(ScoreError, match=r"no finite distance: the largest values of .* are 1e\+200, 1, 1, 1,"):
        frechet_distance(np.full(3, 1e200), np.eye(3), np.ones(3), np.eye(3))
    with pytest.raises(ScoreError, match="not a covariance"):
        frechet_distance(np.ones(2), np.diag([1.0, -1.0]), np.ones(2), np.eye(2))
