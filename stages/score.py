"""Score samples against a reference: Frechet distances, IS, precision and recall, each with what it was made by."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpar_core.data.images import BadImage, center_crop
from dpar_core.data.manifest import Manifest, read_manifest
from dpar_core.evaluation.features import FeatureNetwork, feature_network
from dpar_core.evaluation.metrics import (
    FeatureMoments,
    ScoreError,
    bootstrap,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dpar_core.files import atomic_path, digest_of, read_json, sha256_file, write_json, write_record
from stages import params as P
from stages.artifacts import SAMPLE_IMAGES, SAMPLE_PROTOCOL, artifact_digest
from stages.data import ImageOpener
from stages.shared.scoring import Measured, measure
from stages.tracker import Tracker

# What scores are called: names of the field only where the field's own network was used.
DISTANCE_NAMES = {"demo": "fd_demo", "inception": "fid", "dinov2": "fd_dinov2"}


@dataclass(frozen=True)
class Params:
    seed: int
    data: P.Data
    score: P.Score


@dataclass(frozen=True)
class Inputs:
    manifest: Path
    features: Path
    samples: Path


@dataclass(frozen=True)
class Outputs:
    scores: Path
    metrics: Path


@dataclass(frozen=True)
class TwinInputs:
    manifest: Path
    features: Path
    samples: Path
    equal_time: Path


@dataclass(frozen=True)
class TwinOutputs:
    scores: Path
    metrics: Path
    equal_time: Path
    equal_time_metrics: Path


@dataclass(frozen=True)
class Reference:
    """What samples are compared with. moments: pool and spatial statistics; pool: features for precision and recall."""

    name: str
    digest: str
    images: int
    pool: FeatureMoments
    spatial: FeatureMoments | None
    features: np.ndarray | None
    image_size: int | None = None  # pixels; None: statistics do not say


def run_dpar(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Score the samples of DPAR."""
    _score_all(params, inputs, [(inputs.samples, outputs.scores, outputs.metrics)], tracker, device=device, work=work)


def run_llamagen(
    params: Params, inputs: TwinInputs, outputs: TwinOutputs, tracker: Tracker, *, device: str, work: Path
) -> None:
    """Score the samples of the twin, at equal steps and at equal training time."""
    work_list = [
        (inputs.samples, outputs.scores, outputs.metrics),
        (inputs.equal_time, outputs.equal_time, outputs.equal_time_metrics),
    ]
    _score_all(params, inputs, work_list, tracker, device=device, work=work)


def _score_all(
    params: Params, inputs, work_list: list[tuple[Path, Path, Path]], tracker: Tracker, *, device: str, work: Path
) -> None:
    """work_list: samples, their score file with all that made it, and the same scores bare, as a table of DVC shows them."""
    settings = params.score
    file = inputs.features if settings.features == "demo" else Path(settings.features_file)
    network = feature_network(settings.features, file, device)
    reference = make_reference(params, inputs.manifest, network, tracker, work=work)
    tracker.log_input("features", file, network.digest[:16])
    tracker.log_input("reference", inputs.manifest, reference.digest)
    for samples, target, metrics in work_list:
        images = read_samples(samples / SAMPLE_IMAGES)
        tracker.log_input(f"samples {samples.name}", samples, artifact_digest(samples / SAMPLE_IMAGES))
        if len(images) < settings.images:
            raise ScoreError(
                f"{samples} holds {len(images)} images, the protocol asks for {settings.images}: raise sample.images or "
                "lower score.images"
            )
        images = images[: settings.images]
        check_images(images, reference, samples)
        with tracker.progress(settings.images, f"score {samples.name}", unit="images") as progress:
            measured = measure(network, images, workers=settings.workers, done=progress.advance)
        made_by = read_json(samples / SAMPLE_PROTOCOL, way_out="run `dvc repro -f sample_dpar sample_llamagen`")
        protocol = protocol_of(network, reference, settings, images=settings.images, image_size=images.shape[1])
        scores, intervals = compare(measured, reference, settings, seed=params.seed)
        count = {"feature_count": int(measured.features.pool.shape[1])}
        write_record(target, score_file(scores, intervals, protocol, made_by) | count)
        write_json(metrics, scores)
        suffix = f"/{samples.name}" if len(work_list) > 1 else ""
        tracker.log_metrics({f"{name}{suffix}": value for name, value in scores.items()})


def check_images(images: np.ndarray, reference: Reference, where: Path) -> None:
    """Refuse images that are all the same, or of another size than the reference's. Raises ScoreError."""
    if reference.image_size not in (None, images.shape[1]):
        raise ScoreError(
            f"{where} holds images of {images.shape[1]} pixels, the reference {reference.name} of {reference.image_size}: "
            "resize one side, or take another reference"
        )
    if (images == images[:1]).all():
        raise ScoreError(f"{where}: all {len(images)} images are the same, no distance can be computed from them")


def protocol_of(
    network: FeatureNetwork, reference: Reference, settings: P.Score, *, images: int, image_size: int
) -> dict[str, Any]:
    """Return what scores must have in common to be compared."""
    return {
        "features": network.name, "features_digest": network.digest, "reference": reference.name,
        "reference_digest": reference.digest, "reference_images": reference.images, "images": images,
        "image_size": int(image_size), "neighbours": settings.neighbours, "splits": settings.splits,
    }  # fmt: skip


def protocol_id(protocol: dict[str, Any]) -> str:
    """Return the short id of a protocol: eight hex digits. The reference counts by its content, not by its name."""
    return digest_of({name: value for name, value in protocol.items() if name != "reference"})[:8]


def score_file(scores: dict, intervals: dict, protocol: dict[str, Any], made_by: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a score file: scores, intervals, the protocol with its short id, and how samples were made."""
    return {
        **scores, "intervals": {name: list(ends) for name, ends in intervals.items()},
        "protocol": protocol, "protocol_id": protocol_id(protocol), "samples": made_by,
    }  # fmt: skip


def compare(measured: Measured, reference: Reference, settings: P.Score, *, seed: int) -> tuple[dict, dict]:
    """Return scores by name, and bootstrap intervals of those that a resample of the images can move.

    Where fewer images than features make a covariance singular and `allow_singular` is false, the pooled distance is an
    error, and the spatial one is not among the scores. Raises ScoreError, also when features and reference are of
    different networks.
    """
    features = measured.features
    if features.pool.shape[1] != len(reference.pool.mean):
        raise ScoreError(
            f"the reference has {len(reference.pool.mean)} features an image, these images {features.pool.shape[1]}: "
            "both must come from one network"
        )
    distance = DISTANCE_NAMES[settings.features]
    check_rank(len(features.pool), reference, settings)

    def frechet(chosen: np.ndarray | slice, pool: FeatureMoments | None = None) -> dict[str, float]:
        moments = pool or FeatureMoments.of(features.pool[chosen])
        values = {f"eval/{distance}": _distance(moments, reference.pool)}
        if features.probabilities is not None:
            values[f"eval/is{_suffix(settings)}"] = inception_score(features.probabilities[chosen], splits=settings.splits)
        return values

    scores = frechet(slice(None), measured.pool)
    if (
        features.spatial is not None
        and reference.spatial is not None
        and (
            settings.allow_singular
            or not any(_singular(n, features.spatial.shape[1]) for n in (len(features.spatial), reference.spatial.count))
        )
    ):
        scores[f"eval/s{distance}"] = _distance(measured.spatial, reference.spatial)
    if reference.features is not None:
        both = precision_recall(reference.features, features.pool, k=settings.neighbours)
        scores |= {"eval/precision": both.precision, "eval/recall": both.recall}
        scores[f"eval/kid{_suffix(settings)}"] = kernel_distance(reference.features, features.pool, seed=seed)
    intervals = bootstrap(frechet, len(features.pool), resamples=settings.bootstrap, seed=seed) if settings.bootstrap else {}
    return scores, intervals


def check_rank(images: int, reference: Reference, settings: P.Score) -> None:
    """Refuse so few images of either side that a covariance has not full rank. Raises ScoreError."""
    dimensions = len(reference.pool.mean)
    for side, count in {"samples": images, "reference": reference.pool.count}.items():
        if _singular(count, dimensions) and not settings.allow_singular:
            raise ScoreError(
                f"the {side} are {count} images, and the covariance of {dimensions} features has full rank only "
                f"with more images than that: take more, or set score.allow_singular (--allow-singular) for a number that "
                "may be compared with others of as few images only"
            )


def _suffix(settings: P.Score) -> str:
    return "" if settings.features == "inception" else f"_{settings.features}"


def _singular(images: int, features: int) -> bool:
    """Whether this many images leave a covariance without full rank; 0 images: statistics that do not say how many."""
    return 0 < images <= features


def _distance(a: FeatureMoments, b: FeatureMoments) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@contextmanager
def _open_npz(path: Path) -> Iterator[Any]:
    """Open an npz without ever running code from it. Raises ScoreError in one sentence."""
    try:
        with np.load(path, allow_pickle=False) as content:
            if not hasattr(content, "files"):
                raise ScoreError(f"{path} is a bare array, expected an npz with arr_0")
            yield content
    except (OSError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ScoreError(f"{path} is no whole npz ({' '.join(str(error).split())}): make it again") from None
    except ScoreError:
        raise
    except ValueError:
        if not zipfile.is_zipfile(path):
            raise ScoreError(f"{path} is no npz: expected one with arr_0, images (n, height, width, 3) uint8") from None
        raise ScoreError(f"{path} holds pickled objects, which are never read: store arr_0 as plain uint8") from None


def read_samples(path: Path) -> np.ndarray:
    """Read arr_0 of an npz: (n, size, size, 3) uint8. Raises ScoreError in one sentence for anything else."""
    if not path.exists():
        raise FileNotFoundError(f"no samples at {path}: expected an npz or a folder of PNGs, as stage sample writes")
    with _open_npz(path) as content:
        if "arr_0" not in content.files:
            raise ScoreError(f"{path} has no arr_0: expected images (n, height, width, 3) uint8 under that name")
        images = content["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ScoreError(f"{path}: arr_0 is {images.dtype} {images.shape}, expected (n, height, width, 3) uint8")
    return images


def make_reference(params: Params, manifest: Path, network: FeatureNetwork, tracker: Tracker, *, work: Path) -> Reference:
    """Return the reference of params.yaml: a split of the manifest, an npz of images or statistics, or a folder."""
    name = params.score.reference
    if name not in ("train", "validation"):
        return reference_of(Path(name), network, tracker, cache=work, workers=params.score.workers)
    rows = read_manifest(manifest)
    size, workers = params.data.image_size, params.score.workers
    return _reference_of_split(rows, name, size, network, tracker, cache=work, workers=workers)


def _reference_of_split(
    rows: Manifest, split: str, size: int, network: FeatureNetwork, tracker: Tracker, *, cache: Path, workers: int
) -> Reference:
    digest = digest_of([rows.digest, split, size])
    pictures = partial(_split_images, rows, split, size)
    return _from_images(split, digest, pictures, network, tracker, cache=cache, workers=workers)


def reference_of(
    path: Path,
    network: FeatureNetwork,
    tracker: Tracker,
    *,
    cache: Path,
    image_size: int | None = None,
    workers: int = 0,
) -> Reference:
    """Return a reference from a file or folder.

    path: an npz of images (`arr_0`), an npz of statistics as ADM publishes it (`mu`, `sigma`, optionally `mu_s`,
    `sigma_s` and `arr_0` for precision and recall), a folder of PNG files, or a manifest.parquet, whose training images
    are taken at `image_size`. cache: folder where features stay, named by digests. Raises ScoreError, FileNotFoundError.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"reference {path} does not exist: expected train, validation, an npz, a manifest or a folder"
        )
    if path.is_dir():
        digest = digest_of([[file.name, sha256_file(file)] for file in png_files(path)])
        return _from_images(path.name, digest, partial(read_images, path), network, tracker, cache=cache, workers=workers)
    if path.suffix == ".parquet":
        if image_size is None:
            raise ScoreError(f"{path} is a manifest, whose images need a size: give the samples first")
        return _reference_of_split(read_manifest(path), "train", image_size, network, tracker, cache=cache, workers=workers)
    digest = sha256_file(path)[:16]
    with _open_npz(path) as content:
        if {"mu", "sigma"} <= set(content.files):
            return _published_statistics(path, digest, content, network, tracker, cache=cache, workers=workers)
    return _from_images(path.name, digest, partial(read_images, path), network, tracker, cache=cache, workers=workers)


def _from_images(
    name: str,
    digest: str,
    images: Callable[[], np.ndarray],
    network: FeatureNetwork,
    tracker: Tracker,
    *,
    cache: Path,
    workers: int,
) -> Reference:
    """Return a reference of images; its features and statistics are computed once for each reference and network."""
    # rcc: spatial features in the order row, column, channel; files without it hold them channel first.
    file = cache / f"statistics-rcc-{digest}-{network.digest}.npz"
    if not file.exists():
        pictures = images()
        with tracker.progress(len(pictures), "reference features", unit="images") as progress:
            found = measure(network, pictures, workers=workers, done=progress.advance)
        pool, spatial = found.pool, found.spatial
        arrays = {"pool": found.features.pool, "mu": pool.mean, "sigma": pool.covariance, "size": pictures.shape[1]}
        if spatial is not None:
            arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays)
    with _open_npz(file) as content:
        features = content["pool"]
        spatial = FeatureMoments(len(features), content["mu_s"], content["sigma_s"]) if "mu_s" in content.files else None
        pool, size = FeatureMoments(len(features), content["mu"], content["sigma"]), int(content["size"])
    return Reference(name, digest, len(features), pool, spatial, features, size)


def _published_statistics(
    path: Path, digest: str, content: Any, network: FeatureNetwork, tracker: Tracker, *, cache: Path, workers: int
) -> Reference:
    def moments(mean: str, covariance: str) -> FeatureMoments | None:
        if mean not in content.files:
            return None
        if covariance not in content.files:
            raise ScoreError(f"{path} has {mean} without {covariance}: expected both, as ADM publishes statistics")
        mu, sigma = content[mean], content[covariance]
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ScoreError(
                f"{path}: {mean} {mu.shape} and {covariance} {sigma.shape} do not fit: expected (d,) and (d, d)"
            )
        return FeatureMoments(0, mu, sigma)

    pool, spatial = moments("mu", "sigma"), moments("mu_s", "sigma_s")
    if "arr_0" not in content.files:
        return Reference(path.name, digest, 0, pool, spatial, None, None)
    found = _from_images(path.name, digest, partial(read_images, path), network, tracker, cache=cache, workers=workers)
    return replace(found, pool=pool, spatial=spatial)


def _split_images(manifest, split: str, size: int) -> np.ndarray:
    opener, images = ImageOpener(manifest), []
    for row in manifest.split(split):
        try:
            images.append(center_crop(opener(row), size))
        except BadImage:
            continue
    return np.stack(images)


def png_files(folder: Path) -> list[Path]:
    """Return the PNG files below a folder, sorted. Raises ScoreError when there are none."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".png")
    if not files:
        raise ScoreError(f"{folder} holds no PNG files: expected one picture a file")
    return files


def read_images(path: Path) -> np.ndarray:
    """Read images (n, size, size, 3) uint8 from an npz, or from a folder of PNG files. Raises ScoreError."""
    if not path.is_dir():
        return read_samples(path)
    images = []
    for file in png_files(path):
        try:
            with Image.open(file) as picture:
                images.append(np.asarray(picture.convert("RGB")))
        except (OSError, SyntaxError, ValueError) as error:
            raise ScoreError(f"{file} is no whole PNG ({error}): make it again") from None
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        shown = " and ".join(f"{width} x {height}" for height, width in sizes[:2])
        raise ScoreError(f"{path} holds pictures of {len(sizes)} sizes ({shown}), expected one")
    return np.stack(images)
