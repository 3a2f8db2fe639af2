"""List the images of a data set: the built-in photographs or the user's own, as one manifest."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from dpar_core.files import digest_of, write_json
from dpar_core.images import BadImage, decode_image
from dpar_core.manifest import Manifest, Row, write_manifest
from stages import params as P
from stages.tracker import Tracker

# Photographs that ship inside scikit-image (CC0 or public domain) and scikit-learn (CC BY 2.0).
PHOTOGRAPHS = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "china": ("sklearn.datasets.images", "china.jpg"),
    "coffee": ("skimage.data", "coffee.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "hubble_deep_field": ("skimage.data", "hubble_deep_field.jpg"),
    "ihc": ("skimage.data", "ihc.png"),
    "retina": ("skimage.data", "retina.jpg"),
    "rocket": ("skimage.data", "rocket.jpg"),
}
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


@dataclass(frozen=True)
class Params:
    seed: int
    data: P.Data


@dataclass(frozen=True)
class Inputs:
    pass


@dataclass(frozen=True)
class Outputs:
    manifest: Path
    metrics: Path


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write the manifest of the training and validation images, and how many there are of each."""
    if params.data.source == "builtin":
        manifest = builtin_manifest(params.data.builtin, seed=params.seed)
    elif params.data.source == "imagefolder":
        manifest = folder_manifest(Path(params.data.train), Path(params.data.validation))
    else:
        raise ValueError(
            f"data.source {params.data.source} is not read yet: unpack it to a folder tree root/class/image.jpg and "
            "use data.source imagefolder"
        )
    write_manifest(outputs.manifest, manifest)
    counts = {f"data/{split}_images": len(manifest.split(split)) for split in ("train", "validation")}
    write_json(outputs.metrics, {**counts, "data/classes": len(manifest.classes)})
    tracker.log_metrics({**counts, "data/classes": len(manifest.classes)})
    tracker.log_params({"manifest.digest": manifest.digest})


def builtin_manifest(settings: P.BuiltinData, *, seed: int) -> Manifest:
    """Draw square crops of the built-in photographs; the photograph is the class.

    Validation crops come from a strip on the right of each photograph, training crops from the rest, so that no pixel
    is in both; the sides of both are drawn from the same range. Raises ValueError when the strip is too narrow.
    """
    rng = np.random.default_rng([seed, 1])
    classes = tuple(PHOTOGRAPHS)
    rows = []
    for split, count in (("train", settings.train_crops), ("validation", settings.validation_crops)):
        for index in range(count):
            label = index % len(classes)
            height, width = photograph(classes[label]).shape[:2]
            strip = round(settings.validation_share * width)
            left, right = (0, width - strip) if split == "train" else (width - strip, width)
            largest = min(settings.crop_max, strip, width - strip, height)
            if largest < settings.crop_min:
                raise ValueError(
                    f"data.builtin: the {split} part of {classes[label]} holds no crop of {settings.crop_min} pixels "
                    f"(at most {largest}): lower crop_min, or move validation_share towards 0.5"
                )
            side = int(rng.integers(settings.crop_min, largest + 1))
            x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, height - side + 1))
            key = f"{split}-{index:07d}"
            rows.append(Row(key, split, f"builtin:{classes[label]}", (x, y, x + side, y + side), label, classes[label]))
    return Manifest(tuple(rows), classes, {})


@functools.cache
def photograph(name: str) -> np.ndarray:
    """Return a built-in photograph: (height, width, 3) uint8."""
    package, file = PHOTOGRAPHS[name]
    return decode_image(resources.files(package).joinpath(file).read_bytes())


def folder_manifest(train: Path, validation: Path) -> Manifest:
    """List a tree root/class/image; classes in sorted order of the training folders.

    Raises ValueError or FileNotFoundError when a root is missing or empty, or validation has classes training lacks.
    """
    found = {"train": _list_tree(train, "train"), "validation": _list_tree(validation, "validation")}
    classes = tuple(sorted(found["train"]))
    unknown = sorted(set(found["validation"]) - set(classes))
    if unknown:
        raise ValueError(
            f"data.validation {validation} has classes that data.train {train} lacks: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''} ({len(unknown)} in all): both trees must have the same class folders"
        )
    rows = [
        Row(f"{split}-{digest_of(f'{name}/{file}')}", split, f"{split}:{name}/{file}", None, classes.index(name), name)
        for split in ("train", "validation")
        for name in sorted(found[split])
        for file in found[split][name]
    ]
    return Manifest(tuple(rows), classes, {"train": str(train), "validation": str(validation)})


def _list_tree(root: Path, split: str) -> dict[str, list[str]]:
    if not root.is_dir():
        raise FileNotFoundError(f"data.{split} {root} is no folder: expected a tree {root}/class/image.jpg")
    tree = {}
    for folder in sorted(os.scandir(root), key=lambda entry: entry.name):
        if folder.is_dir() and not folder.name.startswith("."):
            names = sorted(e.name for e in os.scandir(folder) if e.is_file() and Path(e.name).suffix.lower() in ENDINGS)
            if names:
                tree[folder.name] = names
    if not tree:
        raise ValueError(f"data.{split} {root} holds no images: expected a tree {root}/class/image.jpg")
    return tree


class ImageOpener:
    """Opens the image of a manifest row: decoded, and cut to its box."""

    def __init__(self, manifest: Manifest) -> None:
        self.roots = {name: Path(root) for name, root in manifest.roots.items()}

    def __call__(self, row: Row) -> np.ndarray:
        """Return (height, width, 3) uint8. Raises BadImage with the reason."""
        scheme, _, rest = row.source.partition(":")
        if scheme == "builtin":
            image = photograph(rest)
        else:
            try:
                image = decode_image((self.roots[scheme] / rest).read_bytes())
            except OSError as error:
                raise BadImage(f"cannot be read: {error.strerror or error}") from None
        if row.box is None:
            return image
        x0, y0, x1, y1 = row.box
        return image[y0:y1, x0:x1]
