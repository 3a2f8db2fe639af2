"""Features spread over workers: what one process gives, bit by bit."""

import numpy as np
import pytest

from dpar_core.evaluation.measure import PIECE
from dpar_core.evaluation.metrics import FeatureMoments
from dpar_core.evaluation.protocol import ScoreError
from stages.shared.scoring import measure_images


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def same(a, b):
    for one, other in zip(a.features, b.features):
        np.testing.assert_array_equal(one, other)
    for one, other in ((a.pool, b.pool), (a.spatial, b.spatial)):
        assert one.count == other.count
        np.testing.assert_array_equal(one.mean, other.mean)
        np.testing.assert_array_equal(one.covariance, other.covariance)


@pytest.mark.parametrize("count", [2, PIECE + 1, 2 * PIECE + 1])
def test_merged_moments_are_those_of_all_images(network, count):
    found = measure_images(network, pictures(count))
    whole = network(pictures(count))
    np.testing.assert_array_equal(found.features.pool, whole.pool)
    for moments, features in ((found.pool, whole.pool), (found.spatial, whole.spatial)):
        once = FeatureMoments.of(features)
        assert moments.count == count
        np.testing.assert_allclose(moments.mean, once.mean, rtol=1e-10)
        np.testing.assert_allclose(moments.covariance, once.covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_have_no_moments(network, count):
    with pytest.raises(ScoreError, match=f"at least two images, got {count}"):
        measure_images(network, pictures(count))


def test_more_workers_than_the_cluster_has_are_refused(network):
    with pytest.raises(ValueError, match=r"`score.workers` asks for 1000 workers"):
        measure_images(network, pictures(PIECE + 70), workers=1000)
