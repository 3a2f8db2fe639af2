"""Tars of images as sources of a data set: ILSVRC's own, and webdataset shards. Images are read in place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from dpar_core.data.classes import CLASSES, checked_label, resolve_labels
from dpar_core.data.images import ENDINGS
from dpar_core.data.listing import CLASS_LISTS, LITTER, ClassesOf, Listing, find_files, is_litter, key_of, require
from dpar_core.data.splits import first_few
from dpar_core.data.tars import Member, members

_LABEL_ENDINGS = ("cls", "cls.txt", "label", "label.txt")
_WHICH_COUNTS = "say which counts with data.label_key: {}, or write one of them under another name"
_LONGEST_LABEL = 1 << 20  # bytes of a label file that we are willing to read


def list_ilsvrc_train(path: Path) -> Listing:
    """List ILSVRC2012_img_train.tar: a tar of one tar per synset, whose images are read in place.

    Raises FileNotFoundError, or BadTar and ValueError when it is another tar.
    """
    require(path, "train", folder=False, expected="ILSVRC2012_img_train.tar")
    listing = Listing()
    inner = sorted(_without_litter(members(path), listing), key=lambda member: member.name)
    odd = [member.name for member in inner if not re.fullmatch(r"n\d{8}\.tar", member.name)]
    if odd or not inner:
        found = f"found {odd[0]!r}" if odd else "found nothing"
        raise ValueError(f"data.train {path} is not ILSVRC2012_img_train.tar: expected n########.tar per class, {found}")
    if double := [one.name for one, other in pairwise(inner) if one.name == other.name]:
        raise ValueError(f"data.train {path} holds {double[0]} twice, so one class would be two: pack the tar anew")
    listing.classes = [member.name.removesuffix(".tar") for member in inner]
    for label, tar in enumerate(inner):
        found_in = _without_litter(members(path, within=tar), listing)
        for member in sorted(found_in, key=lambda member: member.name):
            _add_member(listing, member, "train", path.name, label, key=key_of("train", Path(member.name).stem))
    return listing


def list_ilsvrc_validation(path: Path, classes_of: ClassesOf) -> Listing:
    """List ILSVRC2012_img_val.tar. Raises FileNotFoundError, BadTar, or ValueError when an image has no class."""
    require(path, "validation", folder=False, expected="ILSVRC2012_img_val.tar")
    listing = Listing()
    images = sorted(_without_litter(members(path), listing), key=lambda member: member.name)
    if not images:
        raise ValueError(f"data.validation {path} holds no images: expected ILSVRC2012_img_val.tar")
    listed = classes_of(path, [member.name for member in images])
    if listed is None:
        raise FileNotFoundError(f"no classes of the validation images beside {path}: put {CLASS_LISTS} there")
    for member, label in zip(images, listing.take_classes(listed, path.parent)):
        _add_member(listing, member, "validation", path.name, label, key=key_of("validation", Path(member.name).stem))
    return listing


def _without_litter(found: Iterator[Member], listing: Listing, *, within: str = "") -> Iterator[Member]:
    for member in found:
        if any(is_litter(part) for part in member.name.split("/")):
            listing.left_out[f"{within}{member.name}"] = LITTER
        else:
            yield member


def _add_member(listing: Listing, member: Member, split: str, tar: str, label: int, *, key: str) -> None:
    listing.add(key, f"{split}@{member.offset}+{member.size}:{tar}", label)


def list_webdataset(root: Path, split: str, *, label_key: str | None = None, image_key: str | None = None) -> Listing:
    """List webdataset shards of images: KEY.jpg (or another ending) with KEY.cls, or KEY.json with a `label`.

    root: a folder, below which the tars of this split are taken (see `splits.choose_files`), or one .tar. A file's key is
    what stands before the first point of its name; its ending may have several parts (KEY.img.jpg, KEY.target.cls). Labels
    are numbers or text. classes.txt beside the shards names the classes of numbers, or gives the order of those in text.

    label_key: the key in KEY.json that holds the class, or the ending of the file that does.
    image_key: the ending of the image, where a key has several.
    Raises FileNotFoundError, BadTar, or ValueError for a key without its pair, a key that occurs twice, or labels that are
    not classes.
    """
    require(root, split, folder=None, expected="a folder of webdataset shards (*.tar)")
    listing, seen, values = Listing(), set(), []
    beside_name: dict[int | str, int | str] = {}  # what JSON calls the class of a label, where one is a number, one a name
    listing.files = find_files(root, split, ".tar", listing)
    for name in listing.files:
        shard = root / name if root.is_dir() else root
        for key, image, label, other in _pairs(shard, listing, label_key, image_key):
            known_as = key_of(split, key)
            if known_as in seen:
                raise ValueError(f"shard {shard}: key {key!r} occurs twice: keys must be unique over all shards")
            seen.add(known_as)
            if other is not None and (before := beside_name.setdefault(label, other)) != other:
                raise ValueError(
                    f"shard {shard}: {key!r} has the label {label!r} in its own file and {other!r} in its .json, where "
                    f"others of {label!r} have {before!r}: {_WHICH_COUNTS.format('cls')}"
                )
            _add_member(listing, image, split, name, -1, key=known_as)
            values.append(label)
    if not listing.keys:
        raise ValueError(f"data.{split} {root} holds no images: expected KEY.jpg with KEY.cls in its shards")
    beside = (root if root.is_dir() else root.parent) / CLASSES
    found = resolve_labels(values, None, beside, where=f"data.{split} {root}", written=True)
    listing.classes, listing.labels = found.names, found.labels
    listing.numbered, listing.doubles = found.numbered, found.doubles
    listing.notes += found.notes
    listing.called = {label: str(other) for label, other in beside_name.items() if isinstance(label, int)}
    for label, other in listing.called.items():
        if other in found.names and found.names[label] != other:
            raise ValueError(
                f"data.{split} {root}: class {label} is {other!r} in the .json of its images and {found.names[label]!r} in "
                f"{beside}: {_WHICH_COUNTS.format('cls')}"
            )
    return listing


def _pairs(
    shard: Path, listing: Listing, label_key: str | None, image_key: str | None
) -> Iterator[tuple[str, Member, int | str, int | str | None]]:
    """Yield (key, image, label, what its JSON says beside) of a shard; the files of a key stand next to each other."""
    parts: dict[str, Member] = {}
    current: str | None = None
    seen: set[str] = set()
    with open(shard, "rb") as stream:

        def finish(current: str) -> tuple[str, Member, int | str, int | str | None]:
            where = f"shard {shard}: {current!r}"
            return current, _image(parts, image_key, where), *_label(stream, parts, label_key, where)

        for member in _without_litter(members(shard), listing, within=f"{shard.name}/"):
            folder, _, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
            if not stem or not ending:
                raise ValueError(f"shard {shard}: {member.name!r} is not named KEY.ending")
            if key != current:
                if current is not None:
                    yield finish(current)
                if key in seen:
                    raise ValueError(f"shard {shard}: key {key!r} occurs twice: keys must be unique")
                seen.add(key)
                current, parts = key, {}
            if ending in parts:
                raise ValueError(f"shard {shard}: {member.name!r} occurs twice: keys must be unique")
            parts[ending] = member
        if current is not None:
            yield finish(current)


def _image(parts: Mapping[str, Member], image_key: str | None, where: str) -> Member:
    if image_key is not None:
        if image_key.lower() not in parts:
            raise ValueError(
                f"{where} has no file with the ending {image_key!r} (data.image_key), but {first_few(parts, 9)}"
            )
        return parts[image_key.lower()]
    images = {ending: member for ending, member in parts.items() if f".{ending.rpartition('.')[2]}" in ENDINGS}
    if len(images) != 1:
        more = f" ({', '.join(images)}): name its ending with data.image_key" if images else f", but {first_few(parts, 9)}"
        raise ValueError(f"{where} has {len(images)} images, expected one, as KEY.jpg{more}")
    return next(iter(images.values()))


def _label(
    stream: BinaryIO, parts: Mapping[str, Member], label_key: str | None, where: str
) -> tuple[int | str, int | str | None]:
    """Return the label of a key: from the file or the JSON key that is named, else from KEY.cls, else JSON's `label`.

    Beside it what JSON calls the class whose label has a file of its own: its name beside a number, or the other way round.
    Raises ValueError where both are numbers or names, and differ.
    """
    if label_key is None:
        endings = [ending for ending in parts if ending in _LABEL_ENDINGS or ending.endswith((".cls", ".cls.txt"))]
        if len(endings) > 1:
            raise ValueError(f"{where} has several labels ({', '.join(endings)}): name the one with data.label_key")
    else:
        endings = [ending for ending in parts if ending == label_key.lower()]
    if endings:
        content = _content(stream, parts[endings[0]], where)
        if endings[0] == "json" and content.lstrip().startswith(b"{"):
            raise ValueError(f"{where} has several values in its .json: name the key that holds the class (data.label_key)")
        try:
            label = checked_label(content.decode("utf-8-sig"), where)
        except UnicodeDecodeError:
            raise ValueError(f"{where} has the label {content[:40]!r}: expected a class number or name in UTF-8") from None
        other = _label_in_json(stream, parts) if label_key is None else None
        if type(other) is type(label):
            if other != label:
                raise ValueError(
                    f"{where} has two labels, {label!r} in its .{endings[0]} and {other!r} in its .json: "
                    f"{_WHICH_COUNTS.format(endings[0])}"
                )
            other = None
        return label, other
    member = parts.get("json")
    if member is None:
        wanted = f"{label_key!r} (data.label_key)" if label_key else "a .cls, or a .json with `label`"
        raise ValueError(
            f"{where} has no label beside its image: expected {wanted}, next to it in the tar (`tar --sort=name` "
            f"packs them so), found {first_few(parts, 9)}"
        )
    content, name = _content(stream, member, where), label_key or "label"
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} has a .json that cannot be read: {content[:40]!r}") from None
    if not isinstance(record, dict) or name not in record:
        keys = first_few(sorted(record), 20) if isinstance(record, dict) else "no keys at all"
        raise ValueError(
            f"{where} has no {name!r} in its .json, which has {keys}: name the key that holds the class with data.label_key"
        )
    return checked_label(record[name], f"{where}, {name!r} in its .json:"), None


def _label_in_json(stream: BinaryIO, parts: Mapping[str, Member]) -> int | str | None:
    """Return JSON's `label` beside a label that has a file of its own, where it is one."""
    member = parts.get("json")
    if member is None or member.size > _LONGEST_LABEL:
        return None
    try:
        record = json.loads(os.pread(stream.fileno(), member.size, member.offset))
        label = record["label"]
        return checked_label(int(label) if isinstance(label, float) and label.is_integer() else label, "")
    except (ValueError, RecursionError, TypeError, LookupError):
        return None


def _content(stream: BinaryIO, member: Member, where: str) -> bytes:
    if member.size > _LONGEST_LABEL:
        raise ValueError(f"{where} has a label of {member.size:,} bytes: expected a class number or name")
    return os.pread(stream.fileno(), member.size, member.offset)
