"""List the images of a data set, the built-in photographs or the user's own, as one manifest."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
import pyarrow.compute as pc

from dpar_core.data import sources
from dpar_core.data.contents import content_digest, contents_of
from dpar_core.data.folders import list_folder
from dpar_core.data.image_parquet import list_parquet
from dpar_core.data.image_tars import list_ilsvrc_train, list_ilsvrc_validation, list_webdataset
from dpar_core.data.images import BadImage, decode_image
from dpar_core.data.listing import Listing, join_listings
from dpar_core.data.manifest import SPLITS, Manifest, Row, write_manifest
from dpar_core.data.splits import counted, first_few
from dpar_core.data.synsets import IMAGENET_SYNSETS, check_imagenet_classes
from dpar_core.files import digest_of, write_json
from stages import params as P
from stages.sources import PHOTOGRAPHS, photograph_file
from stages.synset_lists import validation_synsets
from stages.terminal import note, print_fitted
from stages.tracker import Tracker


@dataclass(frozen=True)
class Params:
    seed: int
    data: P.Data


@dataclass(frozen=True)
class Inputs:
    images: Path  # what stage sources saw: not read, but when it changes the images are listed again


@dataclass(frozen=True)
class Outputs:
    manifest: Path
    metrics: Path


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write the manifest of the training and validation images, and print what was found."""
    manifest = make_manifest(params.data, seed=params.seed)
    manifest = with_contents(manifest, work.parent / "contents.parquet", tracker)
    refuse_unreadable(manifest, params.data)
    both = images_in_both_splits(manifest)
    write_manifest(outputs.manifest, manifest)
    for line in describe(manifest, params.data, both):
        print_fitted(line)
    if manifest.notes["left_out"]:
        note(f"all that was left out is in the notes of {outputs.manifest}")
    if params.data.classes == "imagenet" and manifest.notes["class_order"] != "synsets":
        note(f"warning: data.train {params.data.train}: checked was the {manifest.notes['class_order']}")
    counts: dict[str, float] = {"data/classes": len(manifest.classes)}
    for split in SPLITS:
        per_class = manifest.counts(split)
        counts[f"data/{split}_images"] = int(per_class.sum())
        counts[f"data/{split}_smallest_class"] = int(per_class.min())
        counts[f"data/{split}_median_class"] = float(np.median(per_class))
        counts[f"data/{split}_largest_class"] = int(per_class.max())
    counts["data/files_left_out"] = len(manifest.notes["left_out"])
    counts["data/images_in_both_splits"] = len(both)
    write_json(outputs.metrics, counts)
    tracker.log_metrics(counts)
    tracker.log_params({"manifest.digest": manifest.digest, "manifest.class_list": manifest.notes["class_list"]})


def with_contents(manifest: Manifest, cache: Path, tracker: Tracker) -> Manifest:
    """Return the manifest with the digest of every image file. cache: digests of files that have not changed since."""
    opener = ManifestOpener(manifest)
    if all(source.partition(":")[0] in opener.loaders for source in manifest.rows.table["source"].unique().to_pylist()):
        digests = {f"builtin:{name}": content_digest(photograph_file(name).read_bytes()) for name in manifest.classes}
        return manifest.with_contents([digests[source] for source in manifest.rows.table["source"].to_pylist()])
    with tracker.progress(len(manifest.rows), "data: digests of the images", unit="images") as progress:
        return manifest.with_contents(contents_of(manifest, opener, cache, progress.advance))


def describe(manifest: Manifest, data: P.Data, both: list[tuple[str, str]]) -> list[str]:
    """Return what a person should see of a data set, a line each: splits, classes, choices, what was left out and why.

    both: sources of the same image in validation and training.
    """
    classes = manifest.classes
    lines = [f"data: {data.source}, {counted(len(classes), 'class', 'classes')}: {_ends(classes)}"]
    if len(classes) == 1:
        lines.append(f"warning: all images are of one class ({_name(classes, 0)}), so a class says nothing of an image")
    for split in SPLITS:
        counts = manifest.counts(split)
        least, most = int(counts.argmin()), int(counts.argmax())
        lines.append(
            f"{split}: {counted(counts.sum(), 'image')}; per class: smallest {counts[least]:,} ({_name(classes, least)}), "
            f"median {np.median(counts):,.10g}, largest {counts[most]:,} ({_name(classes, most)})"
        )
        if none := [name for name, count in zip(classes, counts) if not count]:
            verb = "has" if len(none) == 1 else "have"
            lines.append(f"{split}: {counted(len(none), 'class', 'classes')} {verb} no images ({first_few(none)})")
        if unread := unreadable(manifest, split):
            lines.append(f"warning: {split}: {counted(len(unread), 'image')} cannot be read ({first_few(unread)})")
        if again := repeats(manifest, split):
            verb, shown = "repeats" if len(again) == 1 else "repeat", first_few(f"{one} = {other}" for one, other in again)
            lines.append(f"warning: {split}: {counted(len(again), 'image')} {verb} others of it, byte by byte: {shown}")
    lines += manifest.notes["choices"]
    folded = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if folded[name.casefold()] > 1]:
        lines.append(f"warning: {len(alike)} classes differ from another only in upper and lower case ({first_few(alike)})")
    left_out: dict[str, list[str]] = {}
    for name, reason in manifest.notes["left_out"].items():
        left_out.setdefault(reason, []).append(name)
    for reason, names in sorted(left_out.items()):
        lines.append(f"left out: {len(names):,} ({reason}): {first_few(names)}")
    if both:
        shown, verb = first_few(f"{one} = {other}" for one, other in both), "is" if len(both) == 1 else "are"
        lines.append(
            f"warning: {counted(len(both), 'validation image')} {verb} in the training set as well, byte by byte: {shown}"
        )
    if several := images_of_several_classes(manifest):
        shown = first_few(f"{one} = {other}" for one, other in several)
        lines.append(f"warning: {counted(len(several), 'training image')} of several classes, byte by byte: {shown}")
    return lines


def unreadable(manifest: Manifest, split: str) -> list[str]:
    """Return the sources of a split's images whose bytes could not be read, where they were asked for."""
    table = manifest.rows.table.filter(pc.equal(manifest.rows.table["split"], split))
    sources: list[str] = table.filter(pc.is_null(table["content"]))["source"].to_pylist()
    return sources


def refuse_unreadable(manifest: Manifest, data: P.Data) -> None:
    """Raise ValueError with the first reason where no image of a split can be read."""
    for split in SPLITS:
        unread = unreadable(manifest, split)
        if not unread or len(unread) < manifest.counts(split).sum():
            continue
        try:
            ManifestOpener(manifest).content(unread[0])
            reason = "it can be read now"
        except BadImage as error:
            reason = str(error)
        raise ValueError(
            f"data.{split} {getattr(data, split)}: none of its {counted(len(unread), 'image')} can be read ({unread[0]}: "
            f"{reason}): mend the files, or name others"
        )


def repeats(manifest: Manifest, split: str) -> list[tuple[str, str]]:
    """Return the sources of a split's images of which an earlier one has the same class and bytes, each with the first one.

    Crops out of one file are not compared; `images_of_several_classes` finds those of another class.
    """
    table = manifest.rows.table
    chosen = pc.and_(pc.is_null(table["box"]), pc.and_(pc.is_valid(table["content"]), pc.equal(table["split"], split)))
    table = table.filter(chosen).select(["content", "source", "label"])
    counts = table.group_by("content").aggregate([("source", "count")])
    several = counts.filter(pc.greater(counts["source_count"], 1))["content"].combine_chunks()
    first: dict[tuple[str, int], str] = {}
    rows = table.filter(pc.is_in(table["content"], value_set=several)).to_pylist()
    pairs = [(row["source"], first.setdefault((row["content"], row["label"]), row["source"])) for row in rows]
    return [(source, other) for source, other in pairs if source != other]


def images_of_several_classes(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the sources of training images that stand under another class as well, byte by byte, each with the first one.

    Class folders that are links to others, and copies, are such images. Crops out of one file are not compared.
    """
    table = manifest.rows.table
    chosen = pc.and_(pc.is_null(table["box"]), pc.and_(pc.is_valid(table["content"]), pc.equal(table["split"], "train")))
    table = table.filter(chosen).select(["content", "source", "label"])
    classes = table.group_by("content").aggregate([("label", "count_distinct")])
    several = classes.filter(pc.greater(classes["label_count_distinct"], 1))["content"].combine_chunks()
    first: dict[str, tuple[str, int]] = {}
    found = []
    for row in table.filter(pc.is_in(table["content"], value_set=several)).to_pylist():
        source, label = first.setdefault(row["content"], (row["source"], row["label"]))
        if label != row["label"]:
            found.append((row["source"], source))
    return found


def _ends(classes: Sequence[str]) -> str:
    numbered = [_name(classes, number) for number in range(len(classes))]
    return ", ".join(numbered if len(numbered) <= 6 else [*numbered[:4], "...", numbered[-1]])


def _name(classes: Sequence[str], number: int) -> str:
    return f"class {number}" if classes[number] == str(number) else f"{number} {classes[number]}"


def images_in_both_splits(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the sources (validation, training) of images that are the same byte by byte, by the digests in the manifest.

    Crops out of one file (the built-in photographs) are not compared. tokenize_images compares pixels.
    """
    table = manifest.rows.table
    whole = table.filter(pc.and_(pc.is_valid(table["content"]), pc.is_null(table["box"])))
    validation, train = (whole.filter(pc.equal(whole["split"], split)) for split in ("validation", "train"))
    train = train.filter(pc.is_in(train["content"], value_set=validation["content"].combine_chunks()))
    first: dict[str, str] = {}
    for content, source in zip(train["content"].to_pylist(), train["source"].to_pylist()):
        first.setdefault(content, source)
    pairs = zip(validation["content"].to_pylist(), validation["source"].to_pylist())
    return [(source, first[content]) for content, source in pairs if content in first]


def make_manifest(data: P.Data, *, seed: int) -> Manifest:
    """List the images that params.yaml names, whatever the source. Raises what the source says is wrong."""
    if data.source == "builtin":
        manifest = builtin_manifest(data.builtin, seed=seed)
    else:
        roots = {split: Path(getattr(data, split)) for split in SPLITS}
        listings = {split: _list(data, roots[split], split) for split in SPLITS}
        manifest = join_listings(listings, roots, keep_empty=data.empty_classes == "keep")
    notes = {"left_out": {}, "choices": [], **manifest.notes}
    notes |= {"class_list": digest_of(list(manifest.classes)), "class_order": "as found"}
    if data.classes == "imagenet":
        notes["class_order"] = _check_imagenet(manifest, data)
    return Manifest(manifest.rows, manifest.classes, manifest.roots, manifest.digest, notes)


def _list(data: P.Data, root: Path, split: str) -> Listing:
    assert data.source != "builtin", "it has no paths"
    if data.source == "webdataset":
        return list_webdataset(root, split, label_key=data.label_key, image_key=data.image_key)
    if data.source == "parquet":
        return list_parquet(root, split, label_key=data.label_key, image_key=data.image_key)
    if data.source == "imagefolder" or (data.source == "ilsvrc" and root.is_dir()):
        return list_folder(root, split, classes_of=validation_synsets if split == "validation" else None)
    if data.source == "ilsvrc":
        return list_ilsvrc_train(root) if split == "train" else list_ilsvrc_validation(root, validation_synsets)
    assert_never(data.source)


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
        f"number of classes only, as their names ({first}, ...) are not synsets: put classes.txt (one synset per line, in "
        "the order of the labels) beside the data to have the order checked"
    )


def builtin_manifest(settings: P.BuiltinData, *, seed: int) -> Manifest:
    """Draw square crops of the built-in photographs; the photograph is the class.

    Validation crops come from a strip on the right of each photograph, training crops from the rest, so that no pixel
    is in both; the sides of both come from the same range. Raises ValueError when the strip is too narrow.
    """
    rng = np.random.default_rng([seed, 1])
    classes = tuple(PHOTOGRAPHS)
    if settings.train_crops < len(classes):
        raise ValueError(
            f"data.builtin.train_crops {settings.train_crops} leaves some of {len(classes)} classes without images"
        )
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
        raise ValueError(f"{name!r} is not a built-in photograph: expected one of {', '.join(PHOTOGRAPHS)}")
    return decode_image(photograph_file(name).read_bytes())


class ManifestOpener(sources.ImageOpener):
    """Opens the image of a manifest row, wherever it is: decoded, and cut to its box (see `sources.ImageOpener`).

    base: the folder that relative roots start from (default: where the process runs).
    """

    def __init__(self, manifest: Manifest, *, base: Path | None = None) -> None:
        roots = {name: str((base or Path()) / root) for name, root in manifest.roots.items()}
        super().__init__(roots, {"builtin": photograph})
