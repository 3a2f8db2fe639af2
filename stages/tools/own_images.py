"""A folder of somebody's own images: what is in it, and a split into training and validation made of links."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpar_core.data.folders import list_folder
from dpar_core.data.images import BadImage, decode_image, read_file
from dpar_core.data.splits import first_few
from dpar_core.files import atomic_folder, digest_of, write_json
from stages.tracker import NullTracker, Tracker

SPLIT = "split.json"  # beside the links: marks a folder that was made here
_LONGEST_LIST = 5


@dataclass(frozen=True)
class OwnImages:
    """What was found and made.

    counts: class -> (training images, validation images).
    sides: shorter sides, in pixels.
    """

    counts: dict[str, tuple[int, int]]
    bad: dict[str, str]
    copies: int
    left_out: dict[str, str]
    sides: np.ndarray

    @property
    def training(self) -> int:
        """Training images of all classes."""
        return sum(train for train, _ in self.counts.values())

    @property
    def validation(self) -> int:
        """Validation images of all classes."""
        return sum(validation for _, validation in self.counts.values())


def split_images(images: Path, target: Path, *, share: float, tracker: Tracker | None = None) -> OwnImages:
    """Make target/train/class and target/validation/class of links to the images in images/class.

    Every image is read: what cannot be decoded is left out, copies of one content go to training together. Of each class
    the given share, at least one image where there are two, is for validation, chosen by the images' content, so that the
    same images give the same split whatever they are called. Raises ValueError for a folder without class folders, classes
    without a usable image, and a `target` that was not made here.
    """
    if target.exists() and not (target / SPLIT).exists():
        raise ValueError(f"{target} exists and was not made by `dpar-cli init`: give another folder with --into")
    listing = list_folder(images, "train")
    if listing.base != images:
        raise ValueError(
            f"{images} already holds folders named as splits: set data.source to imagefolder, and data.train and "
            f"data.validation both to {images}"
        )
    of_class: dict[str, dict[str, list[str]]] = {name: defaultdict(list) for name in listing.classes}
    bad: dict[str, str] = {}
    sides: list[int] = []
    seen: dict[str, int] = defaultdict(int)
    with (tracker or NullTracker()).progress(len(listing.sources), "reading the images", unit="images") as progress:
        for source, label in zip(listing.sources, listing.labels):
            path = source.partition(":")[2]
            progress.advance()
            try:
                whole = read_file(images / path)
                sides.append(min(decode_image(whole).shape[:2]))
            except BadImage as error:
                bad[path] = str(error)
                continue
            name = hashlib.sha256(whole).hexdigest()
            of_class[listing.classes[label]][name].append(path)
            seen[name] += 1
    empty = [name for name, found in of_class.items() if not found]
    if empty:
        reason = listing.empty.get(empty[0], "none of its files can be read")
        raise ValueError(f"{images} has no usable images of {len(empty)} classes ({first_few(empty)}: {reason}): mend them")
    counts = {}
    with atomic_folder(target) as folder:
        for name, found in of_class.items():
            alone = sorted(one for one, paths in found.items() if seen[one] == 1)
            held_out = set(alone[: min(max(round(share * len(found)), 1), len(found) - 1)])
            for content, paths in found.items():
                for path in paths:
                    link = folder / ("validation" if content in held_out else "train") / path
                    link.parent.mkdir(parents=True, exist_ok=True)
                    os.symlink(os.path.realpath(images / path), link)
            counts[name] = (sum(len(paths) for paths in found.values()) - len(held_out), len(held_out))
        if not any(validation for _, validation in counts.values()):
            raise ValueError(f"{images} has one image per class, none of which can be spared for validation: add images")
        record = {"images": str(images.resolve()), "share": share, "counts": counts, "bad": bad}
        write_json(folder / SPLIT, {**record, "digest": digest_of(record)})
    copies = sum(count - 1 for count in seen.values())
    return OwnImages(counts, bad, copies, listing.left_out, np.array(sides))


def describe(found: OwnImages, images: Path) -> list[str]:
    """Return what was found in words, a line each."""
    lines = [
        f"{images}: {len(found.counts)} classes, {found.training} images for training, {found.validation} for validation"
    ]
    for name, (train, validation) in list(found.counts.items())[:_LONGEST_LIST]:
        lines.append(f"  {name}: {train} + {validation}")
    if len(found.counts) > _LONGEST_LIST:
        lines.append(f"  and {len(found.counts) - _LONGEST_LIST} more")
    least, middle = int(found.sides.min()), int(np.median(found.sides))
    lines.append(f"shorter sides: {middle} pixels (median), {least} (smallest)")
    without = [name for name, (_, validation) in found.counts.items() if not validation]
    if without:
        lines.append(f"no validation images of {len(without)} classes ({first_few(without)}): none can be spared")
    if found.copies:
        files = "1 file is a copy of another" if found.copies == 1 else f"{found.copies} files are copies of others"
        lines.append(f"{files}, byte by byte: such files are all in training")
    for name, reason in list(found.bad.items())[:_LONGEST_LIST]:
        lines.append(f"cannot be read: {name}: {reason}")
    if len(found.bad) > _LONGEST_LIST:
        lines.append(f"and {len(found.bad) - _LONGEST_LIST} more that cannot be read, listed in {SPLIT}")
    if found.left_out:
        lines.append(f"left out: {len(found.left_out)} files that are not images ({first_few(found.left_out)})")
    return lines
