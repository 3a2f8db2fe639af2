"""What a source lists of one split, whatever it is made of, and how the listings of both become one manifest."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dpar_core.data.classes import CLASSES
from dpar_core.data.manifest import Manifest, Row
from dpar_core.data.splits import choose_files, counted, first_few, refuse_nested, refuse_shared, splits_said
from dpar_core.files import digest_of

LONGEST_KEY = 100 - len(".tokens.npy")  # of the names in a USTAR tar, which our shards are
CLASS_LISTS = (
    "LOC_val_solution.csv (Kaggle), val_annotations.txt (Tiny ImageNet), ILSVRC2012_validation_synsets.txt (a synset per "
    "line) or the unpacked ILSVRC2012_devkit_t12"
)
LITTER = "hidden, or left there by a system"
_LITTER = frozenset(
    ("@eadir", "#recycle", "$recycle.bin", "__macosx", "desktop.ini", "lost+found", "system volume information", "thumbs.db")
)


class ListedClasses(NamedTuple):
    """The class of each of some images, and the file that lists them."""

    file: Path
    classes: list[str]


# From a folder or tar and the names of its images to their classes; None where no list of them is found.
ClassesOf = Callable[[Path, Sequence[str]], ListedClasses | None]


@dataclass
class Listing:
    """The images of one split: where each is and its place in `classes`.

    classes: names in label order, each once (see `classes.unique_names`); a class may have no images here.
    left_out: what was found and not taken, by name, with the reason.
    notes: choices made while listing that a person should see, a sentence each.
    given: what the source itself calls its classes, whatever classes.txt says.
    numbered: classes are known by number alone.
    doubles: a name occurs twice, so that names do not identify classes.
    called: names that stand beside numbers in the source, by number.
    empty: why a class has no images, by its name, where that is known.
    base: the folder in which the class folders lie, where there are some.
    files: the files that images are read from, below the root, where several images share one.
    identities: device and inode of the images' files, of those that are files of their own.
    """

    classes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    given: list[str] | None = None
    numbered: bool = False
    doubles: bool = False
    called: dict[int, str] = field(default_factory=dict)
    empty: dict[str, str] = field(default_factory=dict)
    base: Path | None = None
    files: list[str] = field(default_factory=list)
    identities: list[tuple[int, int]] = field(default_factory=list)

    def add(self, key: str, source: str, label: int) -> None:
        """Add an image."""
        self.keys.append(key)
        self.sources.append(source)
        self.labels.append(label)

    def take_classes(self, listed: ListedClasses, folder: Path) -> list[int]:
        """Take the classes of a list of images as those of this split; return the label of each image in `folder`."""
        self.classes = sorted(set(listed.classes))
        self.notes.append(f"the class of each image is that in {os.path.relpath(listed.file, folder)}, seen from the images")
        label_of = {name: label for label, name in enumerate(self.classes)}
        return [label_of[name] for name in listed.classes]


def join_listings(listings: Mapping[str, Listing], roots: Mapping[str, Path], *, keep_empty: bool = False) -> Manifest:
    """Make one manifest of the listings of all splits; the training split decides the classes and their order.

    Labels go by name. keep_empty: classes without training images keep their place; without it they are refused. Raises
    ValueError when the splits' classes do not agree, both splits hold the same files, or keys stand for more than one image.
    """
    train = listings["train"]
    refuse_shared({split: [_path(roots[split], name) for name in one.files] for split, one in listings.items()}, roots)
    refuse_nested({split: one.base for split, one in listings.items() if one.base is not None})
    _refuse_empty(train, roots["train"], keep_empty)
    label_of = {name: number for number, name in enumerate(train.classes)}
    assert len(label_of) == len(train.classes), "sources give each class a name of its own"
    rows: list[Row] = []
    for split, listing in listings.items():
        where = f"data.{split} {roots[split]}"
        _refuse_other_classes(train, listing, where=where, train_where=f"data.train {roots['train']}")
        labels = [label_of.get(name, -1) for name in listing.classes]
        for key, source, label in zip(listing.keys, listing.sources, listing.labels):
            rows.append(Row(key, split, source, None, labels[label], listing.classes[label]))
    named = {split: splits_said(root.name) for split, root in roots.items()}
    if named.get("validation") == {"train"} and named["train"] and "train" not in named["train"]:
        train.notes.append(f"by their names {roots['train']} and {roots['validation']} are the other way round")
    _refuse_shared_images(listings, roots)
    taken = {roots[split] / name for split, one in listings.items() for name in one.files}
    taken |= {one.base for one in listings.values() if one.base is not None}
    found: dict[Path, tuple[str, str]] = {}  # by path: in a folder that both splits read a file is left out once
    for split, listing in listings.items():
        for name, why in listing.left_out.items():
            if roots[split] / name not in taken:  # what the other split takes is not left out
                found.setdefault(roots[split] / name, (f"{split}:{name}", why))
    left_out = dict(found.values())
    choices = [f"{split}: {note}" for split, listing in listings.items() for note in listing.notes]
    notes: dict[str, object] = {"files_left_out": len(left_out), "left_out": left_out, "choices": choices}
    return Manifest.of(rows, train.classes, {split: str(root) for split, root in roots.items()}, notes=notes)


def _path(root: Path, name: str) -> Path:
    return root / name if root.is_dir() else root


def _refuse_empty(train: Listing, root: Path, keep: bool) -> None:
    counts = Counter(train.labels)
    empty = [name for number, name in enumerate(train.classes) if not counts[number]]
    if empty and not keep:
        shown = ", ".join(f"{name}{f' ({train.empty[name]})' if name in train.empty else ''}" for name in empty[:5])
        raise ValueError(
            f"data.train {root} has no images of {len(empty)} of its {len(train.classes)} classes: {shown}"
            f"{', ...' if len(empty) > 5 else ''}: mend or remove them, or set data.empty_classes to keep"
        )
    if empty:
        verb = "keeps its" if len(empty) == 1 else "keep their"
        train.notes.append(f"{counted(len(empty), 'class', 'classes')} without images {verb} place ({first_few(empty)})")


def _refuse_other_classes(train: Listing, listing: Listing, *, where: str, train_where: str) -> None:
    if listing.numbered != train.numbered:
        numbered, named = (where, train_where) if listing.numbered else (train_where, where)
        raise ValueError(
            f"{named} names its classes and {numbered} only numbers them, so their labels cannot be compared: put the same "
            "classes.txt (a name per line, in the order of the labels) beside both"
        )
    renamed = listing.given is not None and train.given is not None and listing.classes == train.classes
    if renamed and listing.given != train.given:  # by classes.txt, though equal numbers mean different things
        raise ValueError(f"{where} and {train_where} list other class names in their files: write them with the same")
    if (listing.doubles or train.doubles) and listing.classes != train.classes:
        raise ValueError(
            f"{where} and {train_where} list their classes differently, and names that occur twice cannot be matched: put "
            "the same classes.txt (a name per line, in the order of the labels) beside both"
        )
    others = [label for label, name in listing.called.items() if train.called.get(label, name) != name]
    if listing.numbered and others:
        label = others[0]
        raise ValueError(
            f"{where} calls class {label} {listing.called[label]!r} and {train_where} {train.called[label]!r}, so numbers "
            "mean other classes: number both alike, or put classes.txt (a name per line, in label order) beside each"
        )
    known = set(train.classes)
    unknown = sorted({listing.classes[label] for label in set(listing.labels)} - known)
    if unknown:
        folded = {name.casefold(): name for name in train.classes}
        flat = f" (images that lie in no class folders need a list of their classes: {CLASS_LISTS})"
        near = [f"{name!r} is {folded[name.casefold()]!r} there" for name in unknown if name.casefold() in folded]
        raise ValueError(
            f"{where} has classes that {train_where} lacks: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''} ({len(unknown)} in all): both must have the same classes"
            f"{f' ({near[0]})' if near else flat if unknown == ['images'] else ''}"
        )
    if listing is not train and listing.classes != train.classes:
        shared = [name for name in listing.classes if name in known]
        if shared != [name for name in train.classes if name in set(shared)]:
            listing.notes.append("classes stand in another order than in training: labels go by name")


def _refuse_shared_images(listings: Mapping[str, Listing], roots: Mapping[str, Path]) -> None:
    """Refuse a split whose files are all files of training, reached by links or by another spelling of the same folder."""
    of_training = set(listings["train"].identities)
    for split, listing in listings.items():
        if split == "train" or not listing.identities:
            continue
        shared = sum(identity in of_training for identity in listing.identities)
        if shared == len(listing.identities):
            raise ValueError(
                f"data.train {roots['train']} and data.{split} {roots[split]} hold the same files (links count as what they "
                "lead to): give each split files of its own"
            )
        if shared:
            verb = "is a link to, or the same as, a file" if shared == 1 else "are links to, or the same as, files"
            listing.notes.append(f"{counted(shared, 'file')} {verb} of training")


def find_files(root: Path, split: str, ending: str, listing: Listing) -> list[str]:
    """Return the files with an ending below a root that are of a split, as paths relative to it, sorted.

    What is left out or chosen is noted in `listing`. A root that is a file is that file, whatever its name says. Raises
    ValueError when there are none.
    """
    names = _files_below(root, split, ending, listing) if root.is_dir() else [root.name]
    chosen = choose_files(sorted(names), split, where=f"data.{split} {root}")
    listing.left_out |= chosen.left_out
    listing.notes += chosen.notes
    return chosen.files


def _files_below(root: Path, split: str, ending: str, listing: Listing) -> list[str]:
    """Return the files with an ending below a folder, links followed; others go to `listing.left_out`."""
    names: list[str] = []
    others: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back, or to a folder that was walked
            folders[:] = []
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_litter(name))
        within = Path(folder).relative_to(root)
        for name in sorted(files):
            path = (within / name).as_posix()
            if is_litter(name):
                listing.left_out[path] = LITTER
            else:
                (names if name.lower().endswith(ending) else others).append(path)
    if not names:
        beside = f", found {first_few(sorted(others))}" if others else ""
        packed = any(re.search(r"\.(tgz|tar\.\w+)$", name) for name in others)
        unpack = " (shards are read in place: unpack compressed ones first)" if packed else ""
        raise ValueError(f"data.{split} {root} holds no images: expected *{ending}{beside}{unpack}")
    listing.left_out |= dict.fromkeys((name for name in others if name != CLASSES), f"not *{ending}")
    return names


def is_litter(name: str) -> bool:
    """Return whether a file or folder is hidden, or one that a system leaves in folders (macOS, Windows, NAS devices)."""
    return name.startswith(".") or name.casefold() in _LITTER


def key_of(split: str, name: str, *, suffix: str = "") -> str:
    """Make a key SPLIT-NAMEPLACE; a digest stands for a name that is too long for a tar or has other characters.

    webdataset splits names at the first point, and folders would hide in names.
    """
    plain = re.fullmatch(r"[A-Za-z0-9_-]+", name) and len(f"{split}-{name}{suffix}") <= LONGEST_KEY
    return f"{split}-{name if plain else digest_of(name)}{suffix}"


def require(path: Path, split: str, *, folder: bool | None, expected: str) -> None:
    """Raise FileNotFoundError unless there is a folder (folder=True), a file (False), or either (None) at `path`."""
    if not path.exists() or (folder is not None and path.is_dir() != folder):
        found = "is missing" if not path.exists() else "is a folder" if path.is_dir() else "is not a folder"
        raise FileNotFoundError(f"data.{split} {path} {found}: expected {expected}")
