"""Features of images, and their moments, in this process or spread over Ray workers.

Images are cut into pieces of a fixed size, whoever computes them. Means and covariances are those of the pieces, merged in
the order of the images. So the number of workers changes nothing but the time, as far as the network's own rounding does
not depend on a worker's threads (the demo's classifier: bit by bit the same).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np
import torch

from dpar_core.evaluation.features import FeatureNetwork, Features, open_network
from dpar_core.evaluation.metrics import FeatureMoments, ScoreError
from stages.workers import cluster

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


def measure(
    network: FeatureNetwork, images: np.ndarray, *, workers: int = 0, done: Callable[[int], None] | None = None
) -> Measured:
    """Return features and moments of images (n, h, w, 3) uint8, n > 1.

    workers: Ray tasks at once, each with its share of the CPUs or a GPU of its own; 0: in this process. done: told how
    many more images are finished. Raises ScoreError for fewer than two images or features that are not finite, ValueError
    when the cluster has no room for the workers.
    """
    if len(images) < 2:
        raise ScoreError(f"moments need at least two images, got {len(images)}")
    pieces = list(_pieces(len(images)))
    if workers == 0 or len(pieces) == 1:
        return _merged([Measured.of(network(images[piece], done=done)) for piece in pieces])
    return _merged(_by_workers(network, [images[piece] for piece in pieces], workers, done))


def _pieces(images: int) -> Iterator[slice]:
    """Yield slices of PIECE images; a single last image, of which there is no covariance, joins the piece before."""
    first = 0
    while first < images:
        last = images if images - first <= PIECE + 1 else first + PIECE
        yield slice(first, last)
        first = last


def _merged(parts: list[Measured]) -> Measured:
    def joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        return None if arrays[0] is None else np.concatenate(arrays)

    features = Features(*(joined(list(column)) for column in zip(*(part.features for part in parts))))
    spatial = None if parts[0].spatial is None else reduce(FeatureMoments.merge, [part.spatial for part in parts])
    return Measured(features, reduce(FeatureMoments.merge, [part.pool for part in parts]), spatial)


def _by_workers(
    network: FeatureNetwork, pieces: list[np.ndarray], workers: int, done: Callable[[int], None] | None
) -> list[Measured]:
    """Measure pieces on Ray workers; one that dies has its piece measured again by another."""
    with cluster.connected() as nodes:
        import ray

        gpus = 1 if network.device.startswith("cuda") else 0
        cpus = max(int(sum(node.cpus for node in nodes)) // workers, 1)
        cluster.require(nodes, workers=workers, cpus=cpus, gpus=gpus, section="score")
        # What a worker needs to open the network itself: scripts and closures do not travel.
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_measure_piece)
        identity = (network.name, str(network.file.resolve()), network.digest, network.device)
        found: dict[int, Measured] = {}
        waiting, running = list(range(len(pieces))), {}
        while waiting or running:
            while waiting and len(running) < workers:
                place = waiting.pop(0)
                running[task.remote(identity, pieces[place], cpus)] = place
            finished, _ = ray.wait(list(running), num_returns=1)
            place = running.pop(finished[0])
            found[place] = ray.get(finished[0])
            if done is not None:
                done(len(pieces[place]))
    return [found[place] for place in range(len(pieces))]


def _measure_piece(identity: tuple[str, str, str, str], images: np.ndarray, cpus: int) -> Measured:
    torch.set_num_threads(cpus)
    return Measured.of(_opened(*identity)(images))


@lru_cache(maxsize=1)
def _opened(name: str, file: str, digest: str, device: str) -> FeatureNetwork:
    network = open_network(name, Path(file), device)
    if network.digest != digest:
        raise ValueError(f"{file} is another network on this machine ({network.digest}, expected {digest}): share one file")
    return network
