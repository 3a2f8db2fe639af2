"""Distances between image sets as the ADM evaluator defines them, on features that a network has computed.

Written here, as no library has all five without torchvision; tests hold each against recorded values of the evaluator.
Shapes: n images, d feature dimensions, c classes. Means and covariances are float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpar_core.evaluation.protocol import SPLIT_SIZE, Interval, ScoreError

CHUNK_BYTES = 256 << 20  # distance matrices are made in pieces of at most this size


@dataclass(frozen=True)
class FeatureMoments:
    """Mean (d,) and covariance (d, d) float64, divisor n - 1, of n features; `merge` joins those of several workers."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> FeatureMoments:
        """Compute the moments of features (n, d). Raises ScoreError for fewer than two, or values that are not finite."""
        features = np.array(features, dtype=np.float64)  # a copy, centred in place below
        if features.ndim != 2 or len(features) < 2:
            raise ScoreError(f"moments need at least two features of one dimension each, got an array {features.shape}")
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features)).any(axis=1).sum())
            raise ScoreError(f"{bad} of {len(features)} features are not finite: check the images and the feature network")
        mean = features.mean(axis=0)
        features -= mean
        return FeatureMoments(len(features), mean, features.T @ features / (len(features) - 1))

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Return the moments of both sets together (Chan, Golub and LeVeque's update)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        scatter = self.covariance * (self.count - 1) + other.covariance * (other.count - 1)
        scatter += np.outer(difference, difference) * (self.count * other.count / count)
        return FeatureMoments(count, self.mean + difference * (other.count / count), scatter / (count - 1))


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), by symmetric eigenvalues: it cannot turn complex.

    tr (S1 S2)^1/2 is the sum of the singular values of S1^1/2 S2^1/2; covariances may be singular.
    mu: (d,), sigma: (d, d) symmetric. Raises ScoreError for shapes that do not fit, values that are not finite, or a
    matrix that is not a covariance.
    """
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    sigma1, sigma2 = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        shapes = f"means {mu1.shape} and {mu2.shape}, covariances {sigma1.shape} and {sigma2.shape}"
        raise ScoreError(f"statistics do not fit each other: {shapes}")
    cross = np.linalg.svd(_root(sigma1) @ _root(sigma2), compute_uv=False).sum()
    difference = mu1 - mu2
    with np.errstate(over="ignore"):
        distance = float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
    if not math.isfinite(distance):
        reach = ", ".join(f"{np.abs(one).max():.3g}" for one in (mu1, sigma1, mu2, sigma2))
        raise ScoreError(
            f"no finite distance: the largest values of means and covariances are {reach}, no features of images"
        )
    return max(distance, 0.0)


def _root(sigma: np.ndarray) -> np.ndarray:
    if not np.isfinite(sigma).all():
        raise ScoreError("a covariance is not finite: check the images and the feature network")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    if values[0] < -1e-6 * max(values[-1], 1e-12):
        raise ScoreError(f"a matrix is not a covariance: its eigenvalues reach from {values[0]:.3g} to {values[-1]:.3g}")
    root: np.ndarray = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def inception_score(probabilities: np.ndarray, *, splits: int | None = None, split_size: int = SPLIT_SIZE) -> float:
    """Return exp of the mean KL of the rows against their mean, averaged over splits.

    probabilities: (n, c), rows sum to 1.
    splits: that many parts of equal size; None, or as many as there are parts of `split_size` rows: those, the last one
        shorter, as the ADM evaluator has them.
    """
    p = np.asarray(probabilities, np.float64)
    if not np.isfinite(p).all() or len(p) < 1:
        raise ScoreError("class probabilities are missing or not finite: check the images and the feature network")
    size = split_size if splits in (None, -(-len(p) // split_size)) else -(-len(p) // splits)
    scores = []
    for first in range(0, len(p), size):
        part = p[first : first + size]
        ratio = np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(part.mean(axis=0), 1e-300))
        scores.append(np.exp((part * ratio).sum(axis=1).mean()))
    return float(np.mean(scores))


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield squared distances (rows of a, m) float32, not below zero, a piece of rows at a time: a (n, d), b (m, d)."""
    squares_a, squares_b = ((x * x).sum(1) for x in (a, b))
    step = max(CHUNK_BYTES // (4 * max(len(b), 1)), 1)
    for first in range(0, len(a), step):
        rows = slice(first, min(first + step, len(a)))
        product = a[rows] @ b.T
        yield rows, product.mul_(-2).add_(squares_b).add_(squares_a[rows, None]).clamp_min_(0)


def nearest_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Return each feature's squared distance to its k-th nearest other feature: (n, d) float32 -> (n,) float32."""
    if len(features) <= k:
        raise ScoreError(
            f"precision and recall by {k} neighbours need more than {k} images of each side, got {len(features)}: take "
            "more, or lower score.neighbours (--neighbours)"
        )
    x = torch.from_numpy(np.ascontiguousarray(features, np.float32))
    # The feature itself is among its neighbours at distance 0, hence the largest of k + 1.
    return np.concatenate(
        [near.topk(k + 1, dim=1, largest=False, sorted=False).values.amax(1).numpy() for _, near in _squared_distances(x, x)]
    )


class PrecisionRecall(NamedTuple):
    """Shares in 0..1."""

    precision: float
    recall: float


def precision_recall(reference: np.ndarray, generated: np.ndarray, *, k: int = 3) -> PrecisionRecall:
    """Return how much of each set lies inside the other's manifold (Kynkaanniemi et al. 2019, as ADM computes it).

    reference: (n, d), generated: (m, d). A point is inside when it is within any feature's ball, whose radius is the
    distance to that feature's k-th nearest neighbour of its own set. Memory is bounded whatever n and m are.
    """
    reference, generated = (np.ascontiguousarray(x, np.float32) for x in (reference, generated))
    if not np.isfinite(reference).all() or not np.isfinite(generated).all():
        raise ScoreError("features are not finite: check the images and the feature network")
    radii = torch.from_numpy(nearest_radii(reference, k))
    own_radii = torch.from_numpy(nearest_radii(generated, k))
    inside, found = torch.zeros(len(generated), dtype=torch.bool), torch.zeros(len(reference), dtype=torch.bool)
    for rows, across in _squared_distances(torch.from_numpy(generated), torch.from_numpy(reference)):
        inside[rows] = (across <= radii).any(dim=1)
        found |= (across <= own_radii[rows, None]).any(dim=0)
    return PrecisionRecall(float(inside.double().mean()), float(found.double().mean()))


def kernel_distance(
    reference: np.ndarray, generated: np.ndarray, *, subsets: int = 50, size: int = 1000, seed: int = 0
) -> float:
    """Return KID: the unbiased squared MMD with kernel (x y / d + 1)^3, averaged over random subsets of `size`."""
    size = min(size, len(reference), len(generated))
    if size < 2:
        raise ScoreError(f"KID needs at least two images of each side, got {len(reference)} and {len(generated)}")
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(subsets):
        x = reference[rng.choice(len(reference), size, replace=False)].astype(np.float64)
        y = generated[rng.choice(len(generated), size, replace=False)].astype(np.float64)
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        total += within - 2 * xy.mean()
    return float(total / subsets)


def bootstrap(
    statistic: Callable[[np.ndarray], dict[str, float]],
    count: int,
    *,
    resamples: int,
    seed: int = 0,
    least: Mapping[str, float] | None = None,
) -> dict[str, Interval]:
    """Return 95 % intervals of statistics of `count` images under resampling with replacement.

    statistic: maps indices (count,) to named numbers. The interval is centred on the value of the full set (basic
    bootstrap of the spread), as resampled sets are farther from any reference than the set itself.
    least: smallest values that statistics can have, by name. An interval ends there: beyond it is no value to hold.
    """
    bounds = least or {}
    rng = np.random.default_rng(seed)
    centre = statistic(np.arange(count))
    resampled = [statistic(rng.integers(0, count, count)) for _ in range(resamples)]
    intervals = {}
    for name, value in centre.items():
        values = np.array([values[name] for values in resampled])
        spread = np.percentile(values - values.mean(), [2.5, 97.5])
        low, high = (max(float(value + end), bounds.get(name, -math.inf)) for end in spread)
        intervals[name] = Interval(low, high)
    return intervals
