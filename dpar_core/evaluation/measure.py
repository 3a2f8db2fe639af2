"""Features of image sets with their moments, computed piece by piece so that nobody's number of workers shows in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from dpar_core.evaluation.features import FeatureNetwork, Features
from dpar_core.evaluation.metrics import FeatureMoments
from dpar_core.evaluation.protocol import ScoreError

PIECE = 512  # images; a multiple of the network's batch, so that batches are the same wherever pieces end


@dataclass(frozen=True)
class Measured:
    """Features of n images and the moments of the pooled and the spatial ones."""

    features: Features
    pool: FeatureMoments
    spatial: FeatureMoments | None

    @staticmethod
    def of(features: Features) -> Measured:
        """Add the moments to features. Raises ScoreError for fewer than two images, or values that are not finite."""
        spatial = None if features.spatial is None else FeatureMoments.of(features.spatial)
        return Measured(features, FeatureMoments.of(features.pool), spatial)


def measure(network: FeatureNetwork, images: np.ndarray, *, done: Callable[[int], None] | None = None) -> Measured:
    """Return features and moments of images (n, h, w, 3) uint8, n > 1.

    done: called with how many more images are finished. Raises ScoreError for fewer than two images or features that are
    not finite.
    """
    return merged([Measured.of(network(images[piece], done=done)) for piece in pieces(len(images))])


def pieces(images: int) -> Iterator[slice]:
    """Yield slices of PIECE images; a single last image, which has no covariance, joins the piece before.

    Raises ScoreError for fewer than two images.
    """
    if images < 2:
        raise ScoreError(f"moments need at least two images, got {images}")
    first = 0
    while first < images:
        last = images if images - first <= PIECE + 1 else first + PIECE
        yield slice(first, last)
        first = last


def merged(parts: Sequence[Measured]) -> Measured:
    """Join what was measured of pieces, in the order of their images."""

    def joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        return None if any(array is None for array in arrays) else np.concatenate([a for a in arrays if a is not None])

    pool = np.concatenate([part.features.pool for part in parts])
    probabilities = joined([part.features.probabilities for part in parts])
    features = Features(pool, probabilities, joined([part.features.spatial for part in parts]))
    moments = [part.spatial for part in parts]
    spatial = None if any(one is None for one in moments) else reduce(FeatureMoments.merge, [m for m in moments if m])
    return Measured(features, reduce(FeatureMoments.merge, [part.pool for part in parts]), spatial)
