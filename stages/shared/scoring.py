"""What the score stage and the tools around it share: features on Ray workers, references, scoring one set.

Images are cut into pieces of a fixed size, whoever computes them. Means and covariances are those of the pieces, merged in
the order of the images. So the number of workers changes nothing but the time, as far as the network's own rounding does
not depend on a worker's threads (the demo's classifier: bit by bit the same).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpar_core.data.images import BadImage, center_crop
from dpar_core.data.manifest import Manifest, read_manifest
from dpar_core.evaluation.features import FeatureNetwork, open_network
from dpar_core.evaluation.image_sets import ImageSet, digest_of_images, read_image_set, repeats
from dpar_core.evaluation.measure import Measured, measure, merged, pieces
from dpar_core.evaluation.protocol import DISTANCE_NAMES, ScoreError, Scores
from dpar_core.evaluation.reference import Measure, Reference, reference_of_file, reference_of_images
from dpar_core.evaluation.scores import ScoreSettings, check_images, compare, protocol_of
from dpar_core.files import digest_of, read_record
from stages import params as P
from stages.artifacts import SAMPLE_IMAGES, SAMPLE_PROTOCOL
from stages.data import ManifestOpener
from stages.terminal import note, print_fitted
from stages.tracker import Tracker
from stages.workers.tasks import run_units


def settings_of(section: P.Score) -> ScoreSettings:
    """Return what of a score section decides the numbers, beside network and reference."""
    names = ("features", "images", "neighbours", "splits", "bootstrap", "allow_singular")
    return ScoreSettings(**{name: getattr(section, name) for name in names})


def images_in(samples: Path) -> Path:
    """Return where the images of `samples` are: samples.npz in a folder that the sample stage wrote, else itself."""
    inside = samples / SAMPLE_IMAGES
    return inside if samples.is_dir() and inside.exists() else samples


def score_images(
    samples: Path,
    reference: Reference,
    network: FeatureNetwork,
    settings: ScoreSettings,
    tracker: Tracker,
    *,
    seed: int,
    workers: int = 0,
    say: Callable[[str], None] = print_fitted,
) -> Scores:
    """Score one set of images.

    samples: an npz, a folder of pictures, or a folder with samples.npz.
    say: called with what a reader of the scores has to know of the files, as formats that lose pixels, and files that were
        left out.
    Raises ScoreError when there are fewer images than asked for, when they differ in size from the reference's, or all of
    them are the same.
    """
    file = images_in(samples)
    made_by: dict[str, Any] = {"source": samples.name}
    if file != samples:
        made_by = read_record(samples / SAMPLE_PROTOCOL, way_out="sample the images again")
    found = read_image_set(file)
    for one in found.notes:
        say(f"{samples}: {one}")
    if len(found.images) < settings.images:
        raise ScoreError(
            f"{file} holds {len(found.images)} images, the protocol asks for {settings.images}: sample more "
            "(sample.images), or ask for fewer (score.images, --images), which is another protocol"
        )
    if len(found.images) > settings.images:
        say(f"{samples}: of {len(found.images):,} images the first {settings.images:,} are scored")
    chosen = replace(found, images=found.images[: settings.images])
    check_images(chosen.images, reference, file)
    if digest_of_images(file) == reference.digest:
        say(f"{samples}: these are the images of the reference itself")
    if again := repeats(chosen.images):
        say(f"{samples}: {again:,} of {len(chosen.images):,} images repeat earlier ones, pixel by pixel")
    measured = measure_with_progress(network, tracker, f"score {samples.name}", workers=workers)(chosen.images)
    values, intervals = compare(measured, reference, settings, seed=seed)
    spatial = f"eval/s{DISTANCE_NAMES[settings.features]}"
    if measured.spatial is not None and reference.spatial is not None and spatial not in values:
        say(
            f"{samples}: no spatial distance: the covariance of its {len(reference.spatial.mean):,} features has full "
            "rank only with more images than that"
        )
    protocol = protocol_of(network, reference, settings, chosen)
    return Scores(values, intervals, protocol, made_by, measured.features.pool.shape[1])


def measure_images(
    network: FeatureNetwork, images: np.ndarray, *, workers: int = 0, done: Callable[[int], None] | None = None
) -> Measured:
    """Return features and moments of images (n, h, w, 3) uint8, n > 1.

    workers: Ray actors, each with its share of the CPUs or a GPU of its own; 0: in this process.
    done: called with how many more images are finished.
    Raises ScoreError for fewer than two images or features that are not finite, ValueError when the cluster has no room for
    the workers.
    """
    cut = list(pieces(len(images)))
    if workers == 0 or len(cut) == 1:
        return measure(network, images, done=done)
    identity = (network.name, str(network.file.resolve()), network.digest, network.device)
    build = partial(_PieceMeasurer, *identity)
    units = [(number, images[piece]) for number, piece in enumerate(cut)]
    found: dict[int, Measured] = {}
    for (number, part), measured in run_units(units, build, workers=workers, device=network.device, section="score"):
        found[number] = measured
        if done is not None:
            done(len(part))
    return merged([found[number] for number in range(len(units))])


def measure_with_progress(network: FeatureNetwork, tracker: Tracker, what: str, *, workers: int) -> Measure:
    """Return a function that measures images and shows its progress under the name `what`."""

    def measured(images: np.ndarray) -> Measured:
        with tracker.progress(len(images), what, unit="images") as progress:
            return measure_images(network, images, workers=workers, done=progress.advance)

    return measured


def make_reference(
    score: P.Score, data: P.Data, manifest: Path, network: FeatureNetwork, tracker: Tracker, *, cache: Path
) -> Reference:
    """Return the reference of params.yaml: a split of the manifest, an npz of images or statistics, or a folder."""
    if score.reference in ("train", "validation"):
        rows = read_manifest(manifest)
        measured = measure_with_progress(network, tracker, "reference features", workers=score.workers)
        return _reference_of_split(rows, score.reference, data.image_size, network, measured, cache=cache)
    path, size = Path(score.reference), data.image_size
    return reference_of(path, network, tracker, cache=cache, image_size=size, workers=score.workers)


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

    path: an npz or a folder, see `reference_of_file`, or a manifest.parquet, whose training images are taken at
        `image_size`.
    cache: folder where features stay, named by digests.
    Raises ScoreError, FileNotFoundError.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"reference {path} does not exist: expected train, validation, an npz, a manifest or a folder"
        )
    measured = measure_with_progress(network, tracker, "reference features", workers=workers)
    if path.suffix != ".parquet":
        return _noted(reference_of_file(path, network, measured, cache=cache))
    if image_size is None:
        raise ScoreError(f"{path} is a manifest, whose images need a size: give the samples first")
    return _reference_of_split(read_manifest(path), "train", image_size, network, measured, cache=cache)


def _reference_of_split(
    rows: Manifest, split: str, size: int, network: FeatureNetwork, measured: Measure, *, cache: Path
) -> Reference:
    digest = digest_of([rows.digest, split, size])
    return _noted(
        reference_of_images(split, digest, lambda: _split_images(rows, split, size), network, measured, cache=cache)
    )


def _noted(reference: Reference) -> Reference:
    """Print what people should know of a reference's images."""
    for found in reference.notes:
        note(f"reference {reference.name}: {found}")
    return reference


def _split_images(manifest: Manifest, split: str, size: int) -> ImageSet:
    """Return the centre crops of a split's readable images; the sources of others are left out."""
    opener, images, bad = ManifestOpener(manifest), [], []
    for row in manifest.split(split):
        try:
            images.append(center_crop(opener(row), size))
        except BadImage:
            bad.append(row.source)
    if not images:
        raise ScoreError(f"no {split} image can be read: check data.{split}")
    return ImageSet(np.stack(images), left_out=tuple(bad))


class _PieceMeasurer:
    """Measures pieces on a Ray worker, which opens the network itself: scripts and closures do not travel."""

    def __init__(self, name: str, file: str, digest: str, device: str, threads: int) -> None:
        self.network = open_network(name, Path(file), device)
        if self.network.digest != digest:
            raise ValueError(
                f"{file} is another network on this machine ({self.network.digest}, expected {digest}): share one file"
            )

    def __call__(self, piece: tuple[int, np.ndarray]) -> Measured:
        return Measured.of(self.network(piece[1]))
