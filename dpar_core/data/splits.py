"""Which split a file belongs to, by its name; and that two splits never share one.

A name says a split by one of its words, with anything before and after: imagenet1k-train-0003.tar, ilsvrc_val_0001.tar,
validation-00000-of-00014.parquet, data/test/0.parquet, Dev01.tar.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

TEST = "test"
_WORDS = {
    "train": ("train", "training", "trainset", "trn"),
    "validation": (
        "val",
        "valid",
        "validation",
        "valset",
        "validset",
        "validationset",
        "dev",
        "devset",
        "development",
        "eval",
        "evalset",
        "evaluation",
        "holdout",
        "heldout",
    ),
    TEST: ("test", "testing", "testset", "tst"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}


class Choice(NamedTuple):
    """The files of a split, those left out with the reason, and what a person should know of the choice."""

    files: list[str]
    left_out: dict[str, str]
    notes: list[str]


def splits_said(name: str) -> set[str]:
    """Return the splits that the words of a name say; digits, signs and a capital letter begin a new word."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return {_SPLIT_OF[word.casefold()] for word in words if word.casefold() in _SPLIT_OF}


def split_of(path: str) -> str | None:
    """Return the split that a relative path says: by its file name, else by the nearest folder that says one.

    None where nothing does, where one name says two, or where the file's name and a folder say different ones.
    """
    *folders, file = PurePosixPath(path).parts
    levels = [splits_said(name) for name in [PurePosixPath(file).stem, *reversed(folders)]]
    speaking = [level for level in levels if level]
    if not speaking or len(speaking[0]) > 1 or (levels[0] and any(level != levels[0] for level in speaking)):
        return None
    return next(iter(speaking[0]))


def choose_files(names: Sequence[str], split: str, *, where: str) -> Choice:
    """Choose those of a folder's files that are of a split. names: paths relative to the folder.

    Where some say this split, those that say another are left out. For validation files that say test serve where none
    says validation. Files that say nothing are taken; `refuse_shared` finds out when both splits have taken them. Files
    that all say one other split are taken too: a folder of its own is the stronger word. Raises ValueError when they say
    several other splits.
    """
    of_name = {name: split_of(name) for name in names}
    there, notes = set(of_name.values()), []
    wanted = split
    if there and not there & {split, None}:
        others = [TEST] if split == "validation" and TEST in there else sorted(str(other) for other in there)
        if len(others) > 1:
            raise ValueError(
                f"{where} holds files that say {' and '.join(others)} by name and none that says {split} "
                f"(first: {first_few(names)}): name the files of this split {split}-*, or give them a folder of their own"
            )
        wanted = others[0]
        notes.append(f"files whose names say {wanted} are taken, as none says {split}")
    chosen = [name for name in names if of_name[name] in (wanted, None)]
    taken = set(chosen)
    return Choice(chosen, {name: f"of split {of_name[name]} by its name" for name in names if name not in taken}, notes)


def refuse_shared(files: Mapping[str, Sequence[Path]], roots: Mapping[str, Path]) -> None:
    """Raise ValueError when train and validation have a file in common: by links, or by another spelling."""
    if not {"train", "validation"} <= files.keys():
        return
    both = f"data.train {roots['train']} and data.validation {roots['validation']}"
    way_out = "give each split its own folder, or files whose names say it (train-*, validation-*)"
    train, validation = ({_identity(file): file for file in files[split]} for split in ("train", "validation"))
    shared = [file.name for identity, file in validation.items() if identity in train]
    if shared:
        raise ValueError(f"{both} share {len(shared)} of their files ({first_few(sorted(shared))}): {way_out}")


def refuse_nested(roots: Mapping[str, Path]) -> None:
    """Raise ValueError when the folder of one split is that of the other, or lies inside it, links followed."""
    if not {"train", "validation"} <= roots.keys():
        return
    real = {split: Path(os.path.realpath(root)) for split, root in roots.items()}
    train, validation = real["train"], real["validation"]
    way_out = "give each split a folder of its own, with the class folders directly in it"
    if train == validation or os.path.samefile(train, validation):
        raise ValueError(f"data.train {roots['train']} and data.validation {roots['validation']} are one folder: {way_out}")
    for inner, outer in (("validation", "train"), ("train", "validation")):
        if real[outer] in real[inner].parents:
            raise ValueError(f"data.{inner} {roots[inner]} lies inside data.{outer} {roots[outer]}: {way_out}")


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino


def first_few(names: Iterable[str], count: int = 3, *, joined: str = ", ") -> str:
    """Return the first names as text, with an ellipsis where there are more."""
    found = list(names)
    return joined.join([*found[:count], *(["..."] if len(found) > count else [])])


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun, as 1 image or 2,000 images."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
