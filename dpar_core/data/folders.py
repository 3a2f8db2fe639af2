"""Folders of image files: a tree root/class/image as one split of a data set, or just all images below a folder."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from dpar_core.data.classes import normal_name
from dpar_core.data.fingerprint import is_folder
from dpar_core.data.images import ENDINGS, looks_like_image
from dpar_core.data.listing import CLASS_LISTS, LITTER, ClassesOf, Listing, is_litter, require
from dpar_core.data.splits import TEST, counted, first_few, splits_said
from dpar_core.files import digest_of


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the image files below a folder, of any format, sorted by path, and the names of what was left out.

    Images are recognised as in `list_folder`. Raises FileNotFoundError when the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    walk = _Walk(folder)
    names = sorted(walk.images(""))
    return [folder / name for name in names], sorted(walk.left_out)


def list_folder(root: Path, split: str, *, classes_of: ClassesOf | None = None) -> Listing:
    """List a tree root/class/image; the class folders in sorted order are the classes.

    As torchvision's ImageFolder does: images in folders below belong to the class, links are followed, and the folders of
    a class come in sorted order. A file counts as an image by its ending, or without a known ending by its first bytes;
    whether it can be read shows later. Every class folder keeps its place, also one without images, with the reason in
    `Listing.empty`. Where the root holds nothing but folders named as splits, in which the class folders lie, the one of
    this split is taken.

    classes_of: finds the classes of images that lie in no class folders but in the root itself, or in its one folder
        `images`, as the validation sets of ImageNet and Tiny ImageNet do.

    Left out, and listed: other files, hidden ones, folders that cannot be read, links back to a folder above, and names
    that are not UTF-8 (escaped). Raises FileNotFoundError or ValueError when the tree does not exist, or when two classes
    have one name.
    """
    require(root, split, folder=True, expected=f"a tree {root}/class/image.jpg")
    walk, listing = _Walk(root), Listing()
    base, folders, files = _classes_of(walk, split, listing)
    if classes_of is not None and _list_flat(walk, split, listing, base, folders, classes_of):
        return listing
    names = _class_names(folders, root, split)
    listing.base = root / base
    deeper: list[str] = []  # folders of one class
    above = tuple({walk.identity(""), walk.identity(base)})
    for name, folder in sorted((name, folder) for folder, name in names.items()):
        walk.reason = ""
        found = walk.images(f"{base}{folder}", above=above)
        for path, identity in found.items():
            listing.add(f"{split}-{digest_of(path)}", f"{split}:{path}", len(listing.classes))
            if identity is not None:
                listing.identities.append(identity)
        if not found:
            listing.empty[name] = walk.reason or "no image files in it"
        if len(within := {path.rpartition("/")[0] for path in found}) > 1:
            deeper.append(first_few(sorted(within), 2))
        listing.classes.append(name)
    if deeper:
        classes = counted(len(deeper), "class", "classes")
        listing.notes.append(f"images of {classes} lie in several folders each, which count as one class ({deeper[0]})")
    if all(re.fullmatch("[0-9]{1,9}", name) for name in listing.classes):
        by_number = sorted(listing.classes, key=int)
        if moved := [label for label, name in enumerate(listing.classes) if name != by_number[label]]:
            listing.notes.append(
                "class folders named by numbers come in the order of text, as ImageFolder has them: class "
                f"{moved[0]} is {listing.classes[moved[0]]!r}"
            )
    walk.left_out |= {f"{base}{file.name}": "beside the class folders" for file in files}
    listing.left_out = dict(sorted(walk.left_out.items()))
    if not listing.keys:
        lie = "1 file lies" if len(files) == 1 else f"{len(files)} files lie"
        beside = f"; {lie} in it, but in no class folder: put each image into a folder named by its class" if files else ""
        if beside and classes_of is not None:
            beside += f", or beside them {CLASS_LISTS}"
        raise ValueError(f"data.{split} {root} holds no images: expected a tree {root}/class/image.jpg{beside}")
    return listing


def _list_flat(walk: _Walk, split: str, listing: Listing, base: str, folders: list[str], classes_of: ClassesOf) -> bool:
    """List images that lie in no class folders, where a list of their classes is found; return whether it was."""
    inside = folders == ["images"]
    flat = f"{base}images" if inside else base.rstrip("/")
    looking, within = _Walk(walk.root), f"{flat}/" if flat else ""
    if any(looking.images(f"{within}{name}") for name in walk.entries(flat)[0]):
        return False
    found = walk.images(flat)
    listed = classes_of(walk.root / flat, [path.rpartition("/")[2] for path in found]) if found else None
    if listed is None:
        return False
    for (path, identity), label in zip(found.items(), listing.take_classes(listed, walk.root / flat)):
        listing.add(f"{split}-{digest_of(path)}", f"{split}:{path}", label)
        if identity is not None:
            listing.identities.append(identity)
    listing.base = walk.root / flat
    if inside:
        walk.left_out |= {f"{base}{file.name}": "beside the images" for file in walk.entries(base.rstrip("/"))[1]}
    listing.left_out = {name: why for name, why in sorted(walk.left_out.items()) if Path(name).name != listed.file.name}
    return True


def _classes_of(walk: _Walk, split: str, listing: Listing) -> tuple[str, list[str], list[os.DirEntry[str]]]:
    """Return where the class folders lie below the root ("", "train/", "train/train/"), their names, files beside them."""
    base = ""
    while True:
        folders, files = walk.entries(base.rstrip("/"), top=True)
        if not (folders and all(map(splits_said, folders)) and _hold_classes(walk, base, folders)):
            break
        fitting = [folder for folder in folders if splits_said(folder) == {split}]
        if not fitting and split == "validation":
            fitting = [folder for folder in folders if splits_said(folder) == {TEST}]
        if len(fitting) != 1:
            raise ValueError(
                f"data.{split} {walk.root / base} holds the folders {first_few(folders)} and no classes: expected class "
                f"folders, or one folder named {split} in which they lie; set data.{split} to the folder that holds them"
            )
        walk.left_out |= {base + folder: "of another split by its name" for folder in folders if folder != fitting[0]}
        walk.left_out |= {base + file.name: "beside the class folders" for file in files}
        base += f"{fitting[0]}/"
    if base:
        listing.notes.append(f"the class folders are those in {walk.root / base}")
    said = [splits_said(name) for name in folders]
    if {"train"} in said and len(said) > 1 and all(said):
        raise ValueError(
            f"data.{split} {walk.root / base} holds folders named as splits ({first_few(folders)}) and no class folders in "
            "them: put each image into a folder named by its class, as train/cat/1.jpg"
        )
    inside = base + folders[0] if len(folders) == 1 else ""
    while inside and len(below := walk.folders_with_images(inside)) == 1:
        inside += f"/{below[0]}"
    if inside and below:
        inner = walk.root / inside
        raise ValueError(
            f"data.{split} {walk.root / base} holds one folder, {folders[0]}, with images in folders below it: if those "
            f"are the classes, set data.{split} to {inner}; if they are one class, put its images into {inner} itself"
        )
    return base, folders, files


def _hold_classes(walk: _Walk, base: str, folders: list[str]) -> bool:
    """Return whether folders named as splits hold class folders: those of training, where there are some, else all.

    Validation and test images often lie in no class folders, as ImageNet's do.
    """
    deciding = [name for name in folders if splits_said(name) == {"train"}] or folders
    return all(walk.has_folders_only(base + name) for name in deciding)


def _class_names(folders: list[str], root: Path, split: str) -> dict[str, str]:
    """Return the class name of each folder. Raises ValueError where two have one name, or a name is not valid."""
    names = {folder: normal_name(folder) for folder in folders}
    for folder in folders:
        shown = os.fsencode(folder).decode("utf-8", "backslashreplace")
        if shown != folder:
            raise ValueError(f"data.{split} {root}: the name of class folder {shown!r} is not UTF-8: rename it")
    double = [name for name, count in Counter(names.values()).items() if count > 1]
    if double:
        same = [folder for folder in folders if names[folder] == double[0]]
        raise ValueError(
            f"data.{split} {root} has {len(same)} folders whose names are all {double[0]!r} in one Unicode form and without "
            f"outer spaces ({', '.join(ascii(folder) for folder in same)}): rename or join them"
        )
    return names


@dataclass
class _Walk:
    """Walks below a root and notes what is left out. reason: why the last walk yielded nothing, where that is known."""

    root: Path
    left_out: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    def identity(self, name: str) -> tuple[int, int]:
        """Return device and inode of what a name below the root leads to. Raises OSError."""
        status = os.stat(self.root / name)
        return status.st_dev, status.st_ino

    def entries(self, folder: str, *, top: bool = False) -> tuple[list[str], list[os.DirEntry[str]]]:
        """Return the folders and files in root/folder, each sorted, without litter.

        top: class folders are wanted, so a link that leads nowhere counts as a folder unless its ending says image, and
        folders whose names are not UTF-8 are returned; elsewhere they are left out. Raises OSError.
        """
        folders, files, within = [], [], f"{folder}/" if folder else ""
        with os.scandir(self.root / folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            shown = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            as_folder = is_folder(entry) or (top and _leads_nowhere(entry) and not _has_image_ending(entry.name))
            if is_litter(entry.name):
                self.left_out[f"{within}{shown}"] = LITTER
            elif shown != entry.name and not (top and as_folder):
                self.left_out[f"{within}{shown}"] = "its name is not UTF-8"
            elif as_folder:
                folders.append(entry.name)
            else:
                files.append(entry)
        return folders, files

    def images(self, folder: str, *, above: tuple[tuple[int, int], ...] = ()) -> dict[str, tuple[int, int] | None]:
        """Return the images from root/folder down: paths below the root, with device and inode (None: leads nowhere).

        Folders come in the sorted order of their whole paths, as ImageFolder has them. above: the folders on the way there.
        """
        found = self._below(folder, above)
        return {f"{name}/{file}" if name else file: some[file] for name, some in sorted(found.items()) for file in some}

    def _below(self, folder: str, above: tuple[tuple[int, int], ...]) -> dict[str, dict[str, tuple[int, int] | None]]:
        try:
            me = self.identity(folder)
            if me in above:
                self._leave_out(folder, "a link back to a folder above")  # it would lead round for ever
                return {}
            folders, files = self.entries(folder)
        except OSError as error:
            self._leave_out(folder, f"cannot be read: {error.strerror or error}")
            return {}
        within, some = f"{folder}/" if folder else "", {}
        for file in files:
            if _is_image_file(file.path):
                some[file.name] = _identity(file, me[0])
            else:
                self.left_out[f"{within}{file.name}"] = "no image by its name and its first bytes"
        found = {folder: some}
        for name in folders:
            found |= self._below(f"{within}{name}", (*above, me))
        return found

    def has_folders_only(self, folder: str) -> bool:
        """Return whether root/folder holds folders and no image files directly in it."""
        try:
            folders, files = _Walk(self.root).entries(folder)
        except OSError:
            return False
        return bool(folders) and not any(_is_image_file(file.path) for file in files)

    def folders_with_images(self, folder: str) -> list[str]:
        """Return the folders directly in root/folder that hold images; none where images lie beside them."""
        if not self.has_folders_only(folder):
            return []
        looking = _Walk(self.root)
        return [name for name in looking.entries(folder)[0] if looking.images(f"{folder}/{name}")]

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = self.reason = reason


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _has_image_ending(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ENDINGS


def _identity(entry: os.DirEntry[str], device: int) -> tuple[int, int] | None:
    """Return device and inode of a file in a folder on `device`; only links cost a look at the file."""
    if not entry.is_symlink():
        return device, entry.inode()
    try:
        status = os.stat(entry.path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_image_file(path: str) -> bool:
    if _has_image_ending(path):
        return True
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as stream:
            return looks_like_image(stream.read(16))
    except OSError:
        return False
