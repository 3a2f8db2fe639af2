"""Which class each image of a flat validation set is of: the lists that come with ImageNet and Tiny ImageNet."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dpar_core.data.listing import ListedClasses
from dpar_core.data.splits import counted, first_few

SOLUTION, ANNOTATIONS = "LOC_val_solution.csv", "val_annotations.txt"
SYNSET_LISTS = ("ILSVRC2012_validation_synsets.txt", "imagenet_2012_validation_synset_labels.txt")
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_SYNSET = re.compile(r"n\d{8}")
_WAY_OUT = "put the file there as it was published"
_LEVELS = 4  # Kaggle's list lies that far above its images, which are in ILSVRC/Data/CLS-LOC/val


def list_files(images: Path) -> list[Path]:
    """Return the files of the nearest list of classes, beside the images or above them; none where there is no list.

    images: a folder of images or a tar. Of several lists in one folder the first of these counts: Kaggle's, that of Tiny
    ImageNet, synsets in the order of the images, the numbers of the development kit with its meta.mat.
    """
    ways = [Path(os.path.abspath(images)), Path(os.path.realpath(images))]
    for place in dict.fromkeys(place for way in ways for place in (way, *way.parents[:_LEVELS])):
        kits = (place, place / "ILSVRC2012_devkit_t12" / "data", place / "data")
        single = [[place / name] for name in (SOLUTION, ANNOTATIONS, *SYNSET_LISTS)]
        for files in (*single, *([kit / GROUND_TRUTH, kit / META] for kit in kits)):
            if all(map(os.path.isfile, files)):
                return files
    return []


def validation_synsets(images: Path, names: Sequence[str]) -> ListedClasses | None:
    """Return the class of each validation image and the list that holds them, None where there is no list.

    images: the folder or tar of the images.
    names: their files, in any order.
    Raises ValueError, with the way out, for a list that is damaged, names an image twice, or is not of these images.
    """
    files = list_files(images)
    if not files:
        return None
    listed, stems = files[0], [Path(name).stem for name in names]
    if double := [name for name, count in Counter(stems).items() if count > 1]:
        raise ValueError(f"data.validation {images} holds {double[0]} twice, and {listed} names it once: remove one of them")
    if listed.name in (SOLUTION, ANNOTATIONS):
        rows = _solution(listed) if listed.name == SOLUTION else _annotations(listed)
        synset_of = dict(rows)
        if double := [name for name, count in Counter(name for name, _ in rows).items() if count > 1]:
            raise ValueError(
                f"{listed} lists {counted(len(double), 'image')} more than once ({first_few(double)}): {_WAY_OUT}"
            )
    else:
        synset_of = _in_order(images, sorted(stems), _synsets(files), listed)
    if without := [name for name, stem in zip(names, stems) if stem not in synset_of]:
        raise ValueError(
            f"data.validation {images}: {without[0]} has no class in {listed} ({len(without):,} of {len(names):,} images): "
            "remove such images, or put the list there that came with them"
        )
    if gone := sorted(set(synset_of) - set(stems)):
        raise ValueError(
            f"data.validation {images} lacks {counted(len(gone), 'image')} of {listed} ({first_few(gone)}): copy or unpack "
            "the images again, or put the list there that came with them"
        )
    return ListedClasses(listed, [synset_of[stem] for stem in stems])


def _solution(path: Path) -> list[tuple[str, str]]:
    """Read Kaggle's list: an image's name without ending, and its boxes, each with the synset first."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as stream:
            rows = list(csv.DictReader(stream))
    except csv.Error as error:  # a quote that nobody closes makes a cell of the rest
        raise ValueError(f"{path} is damaged ({error}): put Kaggle's own file there") from None
    if not rows or not {"ImageId", "PredictionString"} <= rows[0].keys():
        found = ", ".join(map(str, rows[0]))[:100] if rows else "nothing"
        raise ValueError(f"{path} has columns {found}, expected ImageId and PredictionString: put Kaggle's own file there")
    synsets = [(row["ImageId"], (row["PredictionString"] or "").split()[:1]) for row in rows]
    without = [name for name, synset in synsets if not synset]
    if without:
        raise ValueError(f"{path} names no class for {without[0]} ({len(without)} in all): put Kaggle's own file there")
    return [(name, synset[0]) for name, synset in synsets]


def _annotations(path: Path) -> list[tuple[str, str]]:
    """Read Tiny ImageNet's list: an image's file, its synset and its box, with tabs between them."""
    rows = [(line, [cell.strip() for cell in line.split("\t")]) for line in _text(path).split("\n") if line.strip()]
    if odd := [line for line, cells in rows if len(cells) < 2 or not cells[0] or not _SYNSET.fullmatch(cells[1])]:
        raise ValueError(f"{path} holds {odd[0][:60]!r}, expected a file and its synset with a tab between them: {_WAY_OUT}")
    return [(Path(cells[0]).stem, cells[1]) for _, cells in rows]


def _synsets(files: Sequence[Path]) -> list[str]:
    """Return the synsets of a list in the order of the images: their own names, or numbers with what they stand for."""
    words = _text(files[0]).split()
    if len(files) == 1:
        if odd := [word for word in words if not _SYNSET.fullmatch(word)]:
            raise ValueError(f"{files[0]} holds {odd[0][:60]!r}, expected a synset per line, as n01440764")
        return words
    by_number = _development_kit(files[1])
    if unknown := [number for number in words if number not in by_number]:
        raise ValueError(f"{files[0]} holds {unknown[0]!r}, which meta.mat beside it does not know")
    return [by_number[number] for number in words]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8: put the published list there") from None


def _in_order(images: Path, names: list[str], synsets: list[str], where: Path) -> dict[str, str]:
    """Join images with a list in their order. names: without endings, sorted."""
    if len(names) != len(synsets):
        raise ValueError(f"{where} has {len(synsets)} classes for {len(names)} images in {images}: they must be as many")
    numbers = [tuple(map(int, re.findall(r"\d+", name))) for name in names]
    if sorted(set(numbers)) != numbers:  # as 1, 10, 2: the list is in the order of numbers, and other names have none
        raise ValueError(
            f"{images} holds {names[0]} and others whose sorted names do not count up, so {where}, a list in the order of "
            f"images, does not fit them: take those of ILSVRC2012_img_val.tar as they are, or put {SOLUTION} beside them"
        )
    return dict(zip(names, synsets))


# What reads meta.mat: a native parser of an untrusted file, so in a process of its own with bounded memory and time.
_READ_KIT = """
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, OSError, ValueError):
    pass  # no such limit on this system; the time limit holds
import numpy as np
from scipy.io import loadmat
entries = np.atleast_1d(loadmat(sys.argv[1], squeeze_me=True, variable_names=["synsets"])["synsets"])
print(json.dumps({str(int(entry["ILSVRC2012_ID"])): str(entry["WNID"]) for entry in entries}))
"""
_KIT_SECONDS = 60


def _development_kit(path: Path) -> dict[str, str]:
    """Return the synset of each ILSVRC2012 number, which is not its place in the standard order. Raises ValueError."""
    way_out = "unpack ILSVRC2012_devkit_t12.tar.gz again"
    # -P: a module in the folder where we run is none of ours. One thread: each takes address space.
    words = [sys.executable, "-P", "-c", _READ_KIT, str(path)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(words, capture_output=True, timeout=_KIT_SECONDS, env=environment, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path} could not be read in {_KIT_SECONDS} s, so it is damaged: {way_out}") from None
    if done.returncode:
        errors = done.stderr.decode(errors="replace").strip().splitlines()
        reason = errors[-1] if errors and done.returncode > 0 else f"the reader died of signal {-done.returncode}"
        raise ValueError(f"{path} is not the meta.mat of the development kit, or damaged ({reason[:200]}): {way_out}")
    try:
        return dict(json.loads(done.stdout))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is not the meta.mat of the development kit, or damaged: {way_out}") from None
