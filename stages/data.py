"""List the images of a data set, the built-in photographs or the user's own, as one manifest."""

from __future__ import annotations

import csv
import functools
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from dpar_core.data import sources
from dpar_core.data.images import decode_image
from dpar_core.data.manifest import SPLITS, Manifest, Row, write_manifest
from dpar_core.data.synsets import IMAGENET_SYNSETS, check_imagenet_classes
from dpar_core.data.tars import members
from dpar_core.files import digest_of, write_json
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
SYNSET_LISTS = ("ILSVRC2012_validation_synsets.txt", "imagenet_2012_validation_synset_labels.txt")
SOLUTION, GROUND_TRUTH = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt"


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
    manifest = make_manifest(params.data, seed=params.seed)
    write_manifest(outputs.manifest, manifest)
    if params.data.classes == "imagenet" and manifest.notes["class_order"] != "synsets":
        print(f"warning: data.train {params.data.train}: checked was the {manifest.notes['class_order']}", file=sys.stderr)
    if manifest.notes.get("left_out"):
        left_out = manifest.notes["left_out"]
        print(
            f"{len(left_out)} files are no images and were left out (first: {', '.join(left_out[:3])}); "
            f"all are in the notes of {outputs.manifest}",
            file=sys.stderr,
        )
    counts: dict[str, float] = {"data/classes": len(manifest.classes)}
    for split in SPLITS:
        per_class = manifest.counts(split)
        counts[f"data/{split}_images"] = int(per_class.sum())
        counts[f"data/{split}_smallest_class"] = int(per_class.min())
        counts[f"data/{split}_largest_class"] = int(per_class.max())
    counts["data/files_left_out"] = manifest.notes.get("files_left_out", 0)
    write_json(outputs.metrics, counts)
    tracker.log_metrics(counts)
    tracker.log_params({"manifest.digest": manifest.digest, "manifest.class_list": manifest.notes["class_list"]})


def make_manifest(data: P.Data, *, seed: int) -> Manifest:
    """List the images that params.yaml names, whatever the source. Raises what the source says is wrong."""
    if data.source == "builtin":
        manifest = builtin_manifest(data.builtin, seed=seed)
    else:
        roots = {split: Path(getattr(data, split)) for split in SPLITS}
        manifest = sources.join_listings({split: _list(data.source, roots[split], split) for split in SPLITS}, roots)
    notes = {**manifest.notes, "class_list": digest_of(list(manifest.classes)), "class_order": "as found"}
    if data.classes == "imagenet":
        notes["class_order"] = _check_imagenet(manifest, data)
    return Manifest(manifest.rows, manifest.classes, manifest.roots, manifest.digest, notes)


def _list(source: str, root: Path, split: str) -> sources.Listing:
    if source == "webdataset":
        return sources.list_webdataset(root, split)
    if source == "parquet":
        return sources.list_parquet(root, split)
    if source == "imagefolder" or root.is_dir():
        return sources.list_folder(root, split)
    if split == "train":
        return sources.list_ilsvrc_train(root)
    return sources.list_ilsvrc_validation(root, validation_synsets(root))


def _check_imagenet(manifest: Manifest, data: P.Data) -> str:
    """Return how far the class order could be checked. Raises ValueError with the first differences."""
    names_are_synsets = data.source in ("imagefolder", "ilsvrc") or set(manifest.classes) & set(IMAGENET_SYNSETS)
    if names_are_synsets:
        check_imagenet_classes(manifest.classes, where=f"data.train {data.train}")
        return "synsets"
    if len(manifest.classes) != len(IMAGENET_SYNSETS):
        raise ValueError(
            f"data.train {data.train} has {len(manifest.classes)} classes, expected the 1,000 of ImageNet: mend the data, "
            "or set data.classes to any"
        )
    first = ", ".join(manifest.classes[:3])
    return (
        f"number of classes only, as their names ({first}, ...) are no synsets: put classes.txt (a synset a line, in the "
        "order of the labels) beside the data to have the order checked"
    )


def validation_synsets(tar: Path) -> dict[str, str]:
    """Find the class of every validation image in the files beside the validation tar: image name -> synset.

    Reads the first there is of: LOC_val_solution.csv (Kaggle); a list of 50,000 synsets in the order of the images; the
    development kit's ground truth numbers with its meta.mat. Raises FileNotFoundError or ValueError with the way out.
    """
    folder = tar.parent
    if (folder / SOLUTION).exists():
        return _solution(folder / SOLUTION)
    for name in SYNSET_LISTS:
        if (folder / name).exists():
            return _pair(tar, (folder / name).read_text().split(), name)
    for place in (folder, folder / "ILSVRC2012_devkit_t12" / "data", folder / "data"):
        if (place / GROUND_TRUTH).exists() and (place / "meta.mat").exists():
            synsets = _development_kit(place / "meta.mat")
            numbers = (place / GROUND_TRUTH).read_text().split()
            unknown = [number for number in numbers if number not in synsets]
            if unknown:
                raise ValueError(f"{place / GROUND_TRUTH} holds {unknown[0]!r}, which meta.mat beside it does not know")
            return _pair(tar, [synsets[number] for number in numbers], GROUND_TRUTH)
    raise FileNotFoundError(
        f"no classes of the validation images beside {tar}: put {SOLUTION}, or {SYNSET_LISTS[0]} (one synset a line), or "
        f"the unpacked ILSVRC2012_devkit_t12 there"
    )


def _solution(path: Path) -> dict[str, str]:
    """Read Kaggle's list: an image's name, and its boxes, each with the synset first."""
    with open(path, newline="", errors="replace") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"ImageId", "PredictionString"} <= rows[0].keys():
        found = ", ".join(map(str, rows[0]))[:100] if rows else "nothing"
        raise ValueError(f"{path} has columns {found}, expected ImageId and PredictionString: put Kaggle's own file there")
    synsets = {row["ImageId"]: (row["PredictionString"] or "").split()[:1] for row in rows}
    without = [name for name, synset in synsets.items() if not synset]
    if without:
        raise ValueError(f"{path} names no class for {without[0]} ({len(without)} in all): put Kaggle's own file there")
    return {name: synset[0] for name, synset in synsets.items()}


def _pair(tar: Path, synsets: list[str], where: str) -> dict[str, str]:
    names = sorted(Path(member.name).stem for member in members(tar))
    if len(names) != len(synsets):
        raise ValueError(f"{where} has {len(synsets)} classes for {len(names)} images in {tar}: they must be as many")
    return dict(zip(names, synsets))


def _development_kit(path: Path) -> dict[str, str]:
    """Return the synset of each ILSVRC2012 number, which is not its place in the standard order."""
    from scipy.io import loadmat

    entries = loadmat(path, squeeze_me=True)["synsets"]
    return {str(int(entry["ILSVRC2012_ID"])): str(entry["WNID"]) for entry in np.atleast_1d(entries)}


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
    return Manifest.of(rows, classes)


@functools.cache
def photograph(name: str) -> np.ndarray:
    """Return a built-in photograph: (height, width, 3) uint8. Raises ValueError for another name."""
    if name not in PHOTOGRAPHS:
        raise ValueError(f"there is no built-in photograph {name!r}: expected one of {', '.join(PHOTOGRAPHS)}")
    package, file = PHOTOGRAPHS[name]
    return decode_image(resources.files(package).joinpath(file).read_bytes())


class ImageOpener(sources.ImageOpener):
    """Opens the image of a manifest row, wherever it is: decoded, and cut to its box (see `sources.ImageOpener`).

    base: the folder that relative roots start from (default: where the process runs).
    """

    def __init__(self, manifest: Manifest, *, base: Path | None = None) -> None:
        roots = {name: str((base or Path()) / root) for name, root in manifest.roots.items()}
        super().__init__(roots, {"builtin": photograph})
