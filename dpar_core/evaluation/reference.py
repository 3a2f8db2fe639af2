"""What samples are compared with: statistics and features of a set of images, or statistics that somebody published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dpar_core.evaluation.arrays import Npz, open_npz
from dpar_core.evaluation.features import FeatureNetwork
from dpar_core.evaluation.image_sets import ImageSet, digest_of_images, read_image_set, refuse_same, repeats
from dpar_core.evaluation.measure import Measured
from dpar_core.evaluation.metrics import FeatureMoments
from dpar_core.evaluation.protocol import ScoreError
from dpar_core.files import atomic_path

Measure: TypeAlias = Callable[[np.ndarray], Measured]


@dataclass(frozen=True)
class Reference:
    """A reference that a network has seen.

    name: for people.
    digest: of its content, for protocols.
    images: how many; 0 where published statistics do not say.
    pool, spatial: moments; spatial features in the order row, column, channel.
    features: pooled features for precision and recall, where images are at hand.
    image_size: (height, width) in pixels; None where statistics do not say.
    notes: what people should know of its images, see `ImageSet.notes`.
    """

    name: str
    digest: str
    images: int
    pool: FeatureMoments
    spatial: FeatureMoments | None
    features: np.ndarray | None
    image_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def reference_of_file(path: Path, network: FeatureNetwork, measure: Measure, *, cache: Path) -> Reference:
    """Return a reference from an npz or a folder of image files.

    path: an npz of images (`arr_0`), an npz of statistics as ADM publishes it (`mu`, `sigma`, optionally `mu_s`, `sigma_s`,
        and `arr_0` for precision and recall), or a folder.
    measure: computes features and moments of images.
    cache: folder where they stay, named by digests.
    Raises ScoreError, FileNotFoundError.
    """
    digest = digest_of_images(path)

    def images() -> ImageSet:
        found = read_image_set(path)
        if digest_of_images(path) != digest:  # its features would be kept under the name of other images
            raise ScoreError(f"reference {path} changed while it was read: score again when it is complete")
        return found

    if path.is_dir():
        return reference_of_images(path.name, digest, images, network, measure, cache=cache)
    with open_npz(path) as content:
        published = _published(content)
        has_images = "arr_0" in content
    if published is not None and not has_images:
        unknown = "statistics alone, which do not state how many images they are of, nor their size"
        return Reference(path.name, digest, 0, *published, None, None, (unknown,))
    found = reference_of_images(path.name, digest, images, network, measure, cache=cache)
    return found if published is None else replace(found, pool=published[0], spatial=published[1])


def reference_of_images(
    name: str,
    digest: str,
    images: Callable[[], ImageSet],
    network: FeatureNetwork,
    measure: Measure,
    *,
    cache: Path,
) -> Reference:
    """Return a reference of images; its features and statistics are computed once per reference and network.

    A cached file that cannot be read is made again. Raises ScoreError for images of which no distance can be computed.
    """
    # rcc: spatial features in the order row, column, channel; files without it hold them channel first.
    file = cache / f"statistics-rcc2-{digest}-{network.digest}.npz"
    if file.exists() and (kept := _cached(file)) is not None:
        return replace(kept, name=name, digest=digest)
    pictures = images()
    refuse_same(pictures.images, f"reference {name}")
    notes = list(pictures.notes)
    if again := repeats(pictures.images):
        notes.append(f"{again:,} of {len(pictures.images):,} images repeat earlier ones, pixel by pixel")
    found = measure(pictures.images)
    size = pictures.images.shape[1:3]
    arrays: dict[str, Any] = {
        "pool": found.features.pool,
        "mu": found.pool.mean,
        "sigma": found.pool.covariance,
        "size": np.array(size),
        "notes": np.array(notes, dtype=np.str_),
    }
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **arrays)
    features = found.features.pool
    shape = int(size[0]), int(size[1])
    return Reference(name, digest, len(features), found.pool, found.spatial, features, shape, tuple(notes))


def _cached(file: Path) -> Reference | None:
    try:
        with open_npz(file) as content:
            features, size, notes = content.array("pool"), content.array("size"), content.array("notes", kinds="U")
            count = len(features)
            pool = _moments(content, "mu", "sigma", count)
            spatial = _moments(content, "mu_s", "sigma_s", count) if "mu_s" in content else None
    except (ScoreError, KeyError):
        return None
    return Reference("", "", count, pool, spatial, features, (int(size[0]), int(size[1])), tuple(map(str, notes)))


def _published(content: Npz) -> tuple[FeatureMoments, FeatureMoments | None] | None:
    """Return published statistics (pooled, spatial), or None where an npz holds none."""
    there = [name for name in ("mu", "sigma", "mu_s", "sigma_s") if name in content]
    if not there:
        return None
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in there) != (covariance in there):
            one, other = (mean, covariance) if mean in there else (covariance, mean)
            raise ScoreError(f"{content.path} has {one} without {other}: expected both, as ADM publishes statistics")
    if "mu" not in there:
        raise ScoreError(f"{content.path} has mu_s without mu: expected pooled statistics as well, as ADM publishes them")
    return _moments(content, "mu", "sigma", 0), _moments(content, "mu_s", "sigma_s", 0) if "mu_s" in there else None


def _moments(content: Npz, mean: str, covariance: str, count: int) -> FeatureMoments:
    """Read statistics and check that they can be: shapes, finite values, symmetry, no negative variance."""
    mu, sigma = content.array(mean), content.array(covariance)
    where = f"{content.path}: {mean} {mu.shape} and {covariance} {sigma.shape}"
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ScoreError(f"{where} do not fit: expected (d,) and (d, d)")
    if not {mu.dtype.name, sigma.dtype.name} <= {"float32", "float64"}:
        raise ScoreError(f"{where} are {mu.dtype} and {sigma.dtype}, too coarse for distances: expected float32 or float64")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        bad = int((~np.isfinite(mu)).sum() + (~np.isfinite(sigma)).sum())
        raise ScoreError(f"{where} hold {bad} values that are not finite: fetch or compute the statistics again")
    largest = float(np.abs(sigma).max(initial=0.0))
    if (
        not largest
        or np.abs(sigma - sigma.T).max(initial=0.0) > 1e-3 * largest
        or np.diagonal(sigma).min(initial=0.0) < -1e-6 * largest
    ):
        raise ScoreError(f"{where}: {covariance} is not a covariance (zero, not symmetric, or with negative variances)")
    return FeatureMoments(count, mu, sigma)
