"""Score samples against a reference: Frechet distances, IS, precision and recall, each with what it was made by."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dpar_core.features import FeatureNetwork, Features, feature_network
from dpar_core.files import atomic_path, digest_of, sha256_file, write_json
from dpar_core.images import BadImage, center_crop
from dpar_core.manifest import read_manifest
from dpar_core.metrics import (
    FeatureMoments,
    ScoreError,
    bootstrap,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from stages import params as P
from stages.data import ImageOpener
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


@dataclass(frozen=True)
class TwinInputs:
    manifest: Path
    features: Path
    samples: Path
    equal_time: Path


@dataclass(frozen=True)
class TwinOutputs:
    scores: Path
    equal_time: Path


@dataclass(frozen=True)
class Reference:
    """What samples are compared with. moments: pool and spatial statistics; pool: features for precision and recall."""

    name: str
    digest: str
    images: int
    pool: FeatureMoments
    spatial: FeatureMoments | None
    features: np.ndarray | None


def run_dpar(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Score the samples of DPAR."""
    _score_all(params, inputs, [(inputs.samples, outputs.scores)], tracker, device=device, work=work)


def run_llamagen(
    params: Params, inputs: TwinInputs, outputs: TwinOutputs, tracker: Tracker, *, device: str, work: Path
) -> None:
    """Score the samples of the twin, at equal steps and at equal training time."""
    pairs = [(inputs.samples, outputs.scores), (inputs.equal_time, outputs.equal_time)]
    _score_all(params, inputs, pairs, tracker, device=device, work=work)


def _score_all(params: Params, inputs, pairs: list[tuple[Path, Path]], tracker: Tracker, *, device: str, work: Path) -> None:
    settings = params.score
    file = inputs.features if settings.features == "demo" else Path(settings.features_file)
    network = feature_network(settings.features, file, device)
    reference = make_reference(params, inputs.manifest, network, tracker, work=work)
    for samples, target in pairs:
        images = read_samples(samples / "samples.npz")
        if len(images) < settings.images:
            raise ScoreError(
                f"{samples} holds {len(images)} images, the protocol asks for {settings.images}: raise sample.images or "
                "lower score.images"
            )
        with tracker.progress(settings.images, f"score {samples.name}", unit="images") as progress:
            features = network(images[: settings.images], done=progress.advance)
        made_by = json.loads((samples / "samples.json").read_text())
        protocol = {
            "features": network.name, "features_digest": network.digest, "reference": reference.name,
            "reference_digest": reference.digest, "reference_images": reference.images, "images": settings.images,
            "image_size": int(images.shape[1]), "neighbours": settings.neighbours, "splits": settings.splits,
        }  # fmt: skip
        scores, intervals = compare(features, reference, settings, seed=params.seed)
        write_json(target, {
            **scores, "intervals": {name: list(ends) for name, ends in intervals.items()},
            "protocol": protocol, "protocol_id": digest_of(protocol)[:8], "samples": made_by,
        })  # fmt: skip
        suffix = f"/{samples.name}" if len(pairs) > 1 else ""
        tracker.log_metrics({f"{name}{suffix}": value for name, value in scores.items()})


def compare(features: Features, reference: Reference, settings: P.Score, *, seed: int) -> tuple[dict, dict]:
    """Return scores by name, and bootstrap intervals of those that a resample of the images can move."""
    distance = DISTANCE_NAMES[settings.features]

    def frechet(chosen: np.ndarray) -> dict[str, float]:
        moments = FeatureMoments.of(features.pool[chosen])
        values = {f"eval/{distance}": _distance(moments, reference.pool)}
        if features.probabilities is not None:
            values[f"eval/is{_suffix(settings)}"] = inception_score(features.probabilities[chosen], splits=settings.splits)
        return values

    scores = frechet(np.arange(len(features.pool)))
    if features.spatial is not None and reference.spatial is not None:
        scores[f"eval/s{distance}"] = _distance(FeatureMoments.of(features.spatial), reference.spatial)
    if reference.features is not None:
        both = precision_recall(reference.features, features.pool, k=settings.neighbours)
        scores |= {"eval/precision": both.precision, "eval/recall": both.recall}
        scores[f"eval/kid{_suffix(settings)}"] = kernel_distance(reference.features, features.pool, seed=seed)
    intervals = bootstrap(frechet, len(features.pool), resamples=settings.bootstrap, seed=seed) if settings.bootstrap else {}
    return scores, intervals


def _suffix(settings: P.Score) -> str:
    return "" if settings.features == "inception" else f"_{settings.features}"


def _distance(a: FeatureMoments, b: FeatureMoments) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def read_samples(path: Path) -> np.ndarray:
    """Read arr_0 of an npz: (n, size, size, 3) uint8. Raises ScoreError in one sentence for anything else."""
    if not path.exists():
        raise FileNotFoundError(f"no samples at {path}: run the sample stage")
    try:
        with np.load(path, allow_pickle=False) as content:
            images = content["arr_0"]
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise ScoreError(f"{path} is no whole npz ({' '.join(str(error).split())}): make it again") from None
    except ValueError:
        raise ScoreError(f"{path} holds pickled objects, which are never read: store arr_0 as plain uint8") from None
    except KeyError:
        raise ScoreError(f"{path} has no arr_0: expected images (n, height, width, 3) uint8 under that name") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ScoreError(f"{path}: arr_0 is {images.dtype} {images.shape}, expected (n, height, width, 3) uint8")
    return images


def make_reference(params: Params, manifest: Path, network: FeatureNetwork, tracker: Tracker, *, work: Path) -> Reference:
    """Return the reference of params.yaml: a split of the manifest, an npz of images or statistics, or a folder."""
    name = params.score.reference
    if name in ("train", "validation"):
        rows = read_manifest(manifest)
        images = _split_images(rows, name, params.data.image_size)
        digest = digest_of([rows.digest, name, params.data.image_size])
    else:
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"score.reference {path} does not exist: expected train, validation, an npz or a folder")
        if path.is_file():
            digest = sha256_file(path)[:16]
            with np.load(path, allow_pickle=False) as content:
                if {"mu", "sigma"} <= set(content.files):
                    return _published_statistics(path.name, digest, content, network)
            images = read_samples(path)
        else:
            images = _folder_images(path)
            digest = digest_of([name, images.shape, sha256_array(images)])
    cache = work / f"reference-{digest}-{network.digest}.npz"
    if cache.exists():
        with np.load(cache, allow_pickle=False) as content:
            pool, spatial = content["pool"], content["spatial"] if "spatial" in content.files else None
    else:
        with tracker.progress(len(images), "reference features", unit="images") as progress:
            found = network(images, done=progress.advance)
        pool, spatial = found.pool, found.spatial
        arrays = {"pool": pool, **({"spatial": spatial} if spatial is not None else {})}
        with atomic_path(cache) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays)
    moments = None if spatial is None else FeatureMoments.of(spatial)
    return Reference(name, digest, len(pool), FeatureMoments.of(pool), moments, pool)


def sha256_array(array: np.ndarray) -> str:
    """Return the digest of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _published_statistics(name: str, digest: str, content, network: FeatureNetwork) -> Reference:
    def moments(mean: str, covariance: str) -> FeatureMoments | None:
        return FeatureMoments(0, content[mean], content[covariance]) if mean in content.files else None

    features = None
    if "arr_0" in content.files:
        features = network(content["arr_0"]).pool
    count = 0 if features is None else len(features)
    return Reference(name, digest, count, moments("mu", "sigma"), moments("mu_s", "sigma_s"), features)


def _split_images(manifest, split: str, size: int) -> np.ndarray:
    opener, images = ImageOpener(manifest), []
    for row in manifest.split(split):
        try:
            images.append(center_crop(opener(row), size))
        except BadImage:
            continue
    return np.stack(images)


def _folder_images(folder: Path) -> np.ndarray:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".png")
    if not files:
        raise ScoreError(f"{folder} holds no PNG files: expected one picture a file")
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    sizes = sorted({image.shape for image in images})
    if len(sizes) > 1:
        raise ScoreError(f"{folder} holds pictures of several sizes: {sizes[0]} and {sizes[1]}, expected one")
    return np.stack(images)
