"""Where images come from: an ImageFolder tree, ILSVRC tars, webdataset shards, Parquet. All give manifest rows.

A row's source says where its bytes are: ROOT:PATH is a file below a root of the manifest; ROOT@OFFSET+SIZE:PATH is a
range of bytes in it (a member of a tar, read in place); ROOT@GROUP.ROW:PATH is a row of a row group of a Parquet file.
ROOT names an entry of `Manifest.roots`; a scheme of its own, as builtin:NAME, is opened by a loader the caller gives.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpar_core.data.images import ENDINGS, LARGEST_FILE, BadImage, decode_image, looks_like_image, read_file
from dpar_core.data.manifest import Manifest, Row
from dpar_core.data.tars import Member, members
from dpar_core.files import digest_of

_LONGEST_KEY = 100 - len(".tokens.npy")  # of the names in a USTAR tar, which our shards are
_LITTER = frozenset(
    ("@eadir", "#recycle", "$recycle.bin", "__macosx", "desktop.ini", "lost+found", "system volume information", "thumbs.db")
)
_KEPT_GROUPS = 8  # row groups of Parquet files that stay in memory
_PLACE = re.compile(r"(?P<root>[a-z]+)(?:@(?P<a>\d+)(?P<kind>[+.])(?P<b>\d+))?:(?P<rest>.*)", re.DOTALL)


@dataclass
class Listing:
    """The images of one split as a source lists them: where each is and its place in `classes`.

    left_out: files that are no images by name and content, and folders that cannot be read.
    """

    classes: list[str]
    keys: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, key: str, source: str, label: int) -> None:
        """Add an image."""
        self.keys.append(key)
        self.sources.append(source)
        self.labels.append(label)


def join_listings(listings: Mapping[str, Listing], roots: Mapping[str, Path]) -> Manifest:
    """Make one manifest of the listings of all splits; the training split decides the classes and their order.

    Raises ValueError when another split has classes that training lacks, or keys stand for more than one image.
    """
    classes = listings["train"].classes
    place = {name: number for number, name in enumerate(classes)}
    rows: list[Row] = []
    for split, listing in listings.items():
        unknown = sorted({listing.classes[label] for label in set(listing.labels)} - set(place))
        if unknown:
            raise ValueError(
                f"data.{split} {roots[split]} has classes that data.train {roots['train']} lacks: {', '.join(unknown[:5])}"
                f"{' ...' if len(unknown) > 5 else ''} ({len(unknown)} in all): both must have the same classes"
            )
        labels = [place.get(name, -1) for name in listing.classes]
        for key, source, label in zip(listing.keys, listing.sources, listing.labels):
            rows.append(Row(key, split, source, None, labels[label], listing.classes[label]))
    left_out = [f"{split}:{name}" for split, listing in listings.items() for name in listing.left_out]
    notes: dict[str, object] = {"files_left_out": len(left_out), "left_out": left_out}
    return Manifest.of(rows, classes, {split: str(root) for split, root in roots.items()}, notes=notes)


def list_folder(root: Path, split: str) -> Listing:
    """List a tree root/class/image; the class folders in sorted order are the classes.

    As torchvision's ImageFolder does: images in folders below belong to the class, links are followed, and the folders of
    a class come in sorted order. A file counts as an image by its ending, or without a known ending by its first bytes;
    whether it can be read shows later. Left out, and listed: other files, hidden ones, folders that cannot be read, links
    back to a folder above, and names that are not UTF-8 (escaped). Raises FileNotFoundError or ValueError when there is
    no such tree.
    """
    _require(root, split, folder=True, expected=f"a tree {root}/class/image.jpg")
    listing = Listing([])
    folders, files = _entries(root, "", listing.left_out)
    listing.left_out += files
    for name in folders:
        found = _images_below(root, name, listing.left_out, above=(_identity(root),))
        for folder in sorted(found):
            for file in found[folder]:
                image = f"{folder}/{file}"
                listing.add(f"{split}-{digest_of(image)}", f"{split}:{image}", len(listing.classes))
        if any(found.values()):
            listing.classes.append(name)
    listing.left_out.sort()
    if not listing.keys:
        raise ValueError(f"data.{split} {root} holds no images: expected a tree {root}/class/image.jpg")
    return listing


def _images_below(root: Path, name: str, left_out: list[str], *, above: tuple[tuple[int, int], ...]) -> dict[str, list[str]]:
    """Return the images of each folder from root/name down, by folder. above: the folders on the way there."""
    try:
        me = _identity(root / name)
        if me in above:
            left_out.append(name)  # a link back: it would lead round for ever
            return {}
        folders, files = _entries(root, name, left_out)
    except OSError:
        left_out.append(name)
        return {}
    found: dict[str, list[str]] = {name: []}
    within = f"{name}/" if name else ""
    for file in files:
        if _is_image_file(root / name / file):
            found[name].append(file)
        else:
            left_out.append(f"{within}{file}")
    for folder in folders:
        found |= _images_below(root, f"{within}{folder}", left_out, above=(*above, me))
    return found


def _entries(root: Path, folder: str, left_out: list[str]) -> tuple[list[str], list[str]]:
    """Return the folders and files in root/folder, each sorted; hidden ones, what systems leave behind, and names that are
    not UTF-8 are left out."""
    folders, files = [], []
    with os.scandir(root / folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            shown = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            if is_litter(entry.name) or shown != entry.name:
                left_out.append(f"{folder}/{shown}" if folder else shown)
            else:
                (folders if entry.is_dir() else files).append(entry.name)
    return folders, files


def is_litter(name: str) -> bool:
    """Tell whether a file or folder is hidden, or one that a system leaves in folders (macOS, Windows, NAS devices)."""
    return name.startswith(".") or name.casefold() in _LITTER


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_image_file(path: Path) -> bool:
    if path.suffix.lower() in ENDINGS:
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as stream:
            return looks_like_image(stream.read(16))
    except OSError:
        return False


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the image files below a folder, of any format, sorted by path, and the names of what was left out.

    What counts as an image is told as for `list_folder`. Raises FileNotFoundError when there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    left_out: list[str] = []
    found = _images_below(folder, "", left_out, above=())
    names = sorted(f"{below}/{file}" if below else file for below, files in found.items() for file in files)
    return [folder / name for name in names], sorted(left_out)


def list_ilsvrc_train(path: Path) -> Listing:
    """List ILSVRC2012_img_train.tar: a tar of one tar a synset, whose images are read in place.

    Raises FileNotFoundError, or BadTar and ValueError when it is another tar.
    """
    _require(path, "train", folder=False, expected="ILSVRC2012_img_train.tar")
    inner = sorted(members(path), key=lambda member: member.name)
    odd = [member.name for member in inner if not re.fullmatch(r"n\d{8}\.tar", member.name)]
    if odd or not inner:
        found = f"found {odd[0]!r}" if odd else "found nothing"
        raise ValueError(f"data.train {path} is not ILSVRC2012_img_train.tar: expected n########.tar a class, {found}")
    listing = Listing([member.name.removesuffix(".tar") for member in inner])
    for label, tar in enumerate(inner):
        for member in sorted(members(path, within=tar), key=lambda member: member.name):
            _add_member(listing, member, "train", path, label, key=_key("train", Path(member.name).stem))
    return listing


def list_ilsvrc_validation(path: Path, synset_of: Mapping[str, str]) -> Listing:
    """List ILSVRC2012_img_val.tar. synset_of: class of each image by its name without ending (ILSVRC2012_val_00000001).

    Raises FileNotFoundError, BadTar, or ValueError when an image has no class.
    """
    _require(path, "validation", folder=False, expected="ILSVRC2012_img_val.tar")
    listing = Listing(sorted(set(synset_of.values())))
    place = {name: number for number, name in enumerate(listing.classes)}
    for member in sorted(members(path), key=lambda member: member.name):
        stem = Path(member.name).stem
        if stem not in synset_of:
            raise ValueError(f"data.validation {path}: {member.name} has no class in the list of {len(synset_of)} beside it")
        _add_member(listing, member, "validation", path, place[synset_of[stem]], key=_key("validation", stem))
    if not listing.keys:
        raise ValueError(f"data.validation {path} holds no images: expected ILSVRC2012_img_val.tar")
    return listing


def _add_member(listing: Listing, member: Member, split: str, path: Path, label: int, *, key: str) -> None:
    listing.add(key, f"{split}@{member.offset}+{member.size}:{path.name}", label)


def list_webdataset(root: Path, split: str) -> Listing:
    """List webdataset shards of images: KEY.jpg (or another ending) with KEY.cls, or KEY.json with a `label`.

    root: a folder of .tar files, sorted. classes.txt beside them names the classes, one a line; without it they are
    called by their numbers. Raises FileNotFoundError, BadTar, or ValueError for a key without its pair, a key that
    occurs twice, or a label that is no class.
    """
    _require(root, split, folder=True, expected="a folder of webdataset shards (*.tar)")
    shards = sorted(root.glob("*.tar"))
    if not shards:
        raise ValueError(f"data.{split} {root} holds no shards: expected *.tar")
    listing, seen = Listing([]), set()
    for shard in shards:
        for key, image, label in _pairs(shard):
            name = _key(split, key)
            if name in seen:
                raise ValueError(f"shard {shard}: key {key!r} occurs twice: keys must be unique over all shards")
            seen.add(name)
            _add_member(listing, image, split, shard, label, key=name)
    listing.classes = _class_names(root / "classes.txt", max(listing.labels, default=-1) + 1)
    if not listing.keys:
        raise ValueError(f"data.{split} {root} holds no images: expected KEY.jpg with KEY.cls in its shards")
    return listing


def _pairs(shard: Path) -> Iterator[tuple[str, Member, int]]:
    """Yield (key, image, label) of a shard; the files of a key stand next to each other."""
    parts: dict[str, Member] = {}
    current, seen = None, set()
    with open(shard, "rb") as stream:

        def finish() -> tuple[str, Member, int]:
            images = [m for ending, m in parts.items() if f".{ending.rpartition('.')[2]}" in ENDINGS]
            if len(images) != 1:
                raise ValueError(f"shard {shard}: {current!r} has {len(images)} images, expected one (as {current}.jpg)")
            return current, images[0], _label(stream, parts, f"shard {shard}: {current!r}")

        for member in members(shard):
            folder, _, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
            if not stem or not ending:
                raise ValueError(f"shard {shard}: {member.name!r} is not named KEY.ending")
            if key != current:
                if current is not None:
                    yield finish()
                if key in seen:
                    raise ValueError(f"shard {shard}: key {key!r} occurs twice: keys must be unique")
                seen.add(key)
                current, parts = key, {}
            if ending in parts:
                raise ValueError(f"shard {shard}: {member.name!r} occurs twice: keys must be unique")
            parts[ending] = member
        if current is not None:
            yield finish()


def _label(stream, parts: Mapping[str, Member], where: str) -> int:
    member = parts.get("cls", parts.get("json"))
    if member is None:
        raise ValueError(f"{where} has no label beside its image: expected a .cls, or a .json with `label`")
    if member.size > 1 << 20:
        raise ValueError(f"{where} has a label of {member.size} bytes: expected a class number")
    content = os.pread(stream.fileno(), member.size, member.offset)
    try:
        value = int(content) if "cls" in parts else json.loads(content)["label"]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 20:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{where} has the label {content[:40]!r}: expected a class number from 0") from None
    return value


def list_parquet(root: Path, split: str) -> Listing:
    """List Parquet files as the Hugging Face hub lays ImageNet out: columns image (struct with bytes) and label.

    root: a folder of .parquet files, sorted, or one file; where some are named SPLIT-*.parquet, only those are of the
    split. Class names come from classes.txt beside it, or the features in the file's metadata, or are numbers. Raises
    FileNotFoundError or ValueError when columns are missing.
    """
    _require(root, split, folder=None, expected="a Parquet file, or a folder of them")
    files = [root]
    if root.is_dir():
        files = sorted(root.glob(f"{split}-*.parquet")) or sorted(root.glob("*.parquet"))
    listing, names = Listing([]), None
    for path in files:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"data.{split}: {path} is no Parquet file ({str(error).splitlines()[0]})") from None
        schema = file.schema_arrow
        label = schema.field("label") if "label" in schema.names else None
        image = schema.field("image") if "image" in schema.names else None
        if label is None or image is None or not pa.types.is_integer(label.type) or not _has_bytes(image.type):
            raise ValueError(f"data.{split}: {path} has columns {schema.names}, expected image.bytes and an integer label")
        names = names or _feature_names(schema.metadata or {})
        for group in range(file.num_row_groups):
            labels = file.read_row_group(group, columns=["label"])["label"].to_pylist()
            for row, value in enumerate(labels):
                if value is None or value < 0:
                    raise ValueError(f"data.{split}: {path} has no label for row {row} of group {group} (found {value})")
                key = _key(split, path.stem, place=f"-{group:04d}-{row:06d}")
                listing.add(key, f"{split}@{group}.{row}:{path.name}", value)
    if not listing.keys:
        raise ValueError(f"data.{split} {root} holds no images: expected Parquet files with rows")
    count = max(listing.labels) + 1
    beside = (root if root.is_dir() else root.parent) / "classes.txt"
    named = names and len(names) >= count and not beside.exists()
    listing.classes = names if named else _class_names(beside, count)
    return listing


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and pa.types.is_binary(kind.field("bytes").type)


def _feature_names(metadata: Mapping[bytes, bytes]) -> list[str] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _class_names(path: Path, count: int) -> list[str]:
    if not path.exists():
        return [str(number) for number in range(count)]
    names = path.read_text().split("\n")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < count or len(set(names)) < len(names):
        raise ValueError(f"{path} names {len(set(names))} classes, but the labels go up to {count - 1}: mend or remove it")
    return names


def _key(split: str, name: str, *, place: str = "") -> str:
    """Make a key SPLIT-NAMEPLACE; a digest stands for a name that is too long for a tar or has other characters.

    webdataset splits names at the first point, and folders would hide in names.
    """
    plain = re.fullmatch(r"[A-Za-z0-9_-]+", name) and len(f"{split}-{name}{place}") <= _LONGEST_KEY
    return f"{split}-{name if plain else digest_of(name)}{place}"


def _require(path: Path, split: str, *, folder: bool | None, expected: str) -> None:
    if not path.exists() or (folder is not None and path.is_dir() != folder):
        found = "is missing" if not path.exists() else "is a folder" if path.is_dir() else "is no folder"
        raise FileNotFoundError(f"data.{split} {path} {found}: expected {expected}")


def block_of(source: str) -> str | None:
    """Return what images that are read together have in common (a row group of a Parquet file), or None."""
    match = _PLACE.fullmatch(source)
    if match is None or match["kind"] != ".":
        return None
    return f"{match['root']}@{match['a']}:{match['rest']}"


class ImageOpener:
    """Opens the image of a manifest row: decoded, and cut to its box. Safe to call from many threads.

    loaders: opens sources of schemes that are no root, by what stands behind the colon -> (height, width, 3) uint8.
    """

    def __init__(self, roots: Mapping[str, str], loaders: Mapping[str, Callable[[str], np.ndarray]]) -> None:
        self.roots, self.loaders = {name: Path(root) for name, root in roots.items()}, dict(loaders)
        self._groups: OrderedDict[tuple[Path, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, row: Row) -> np.ndarray:
        """Return (height, width, 3) uint8. Raises BadImage with the reason, ValueError for a source it does not know."""
        scheme, _, rest = row.source.partition(":")
        image = self.loaders[scheme](rest) if scheme in self.loaders else decode_image(self.content(row.source))
        if row.box is None:
            return image
        x0, y0, x1, y1 = row.box
        height, width = image.shape[:2]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise BadImage(f"its box {row.box} lies outside {width} x {height} pixels")
        return image[y0:y1, x0:x1]

    def content(self, source: str) -> bytes:
        """Return the bytes of an image file. Raises BadImage, ValueError."""
        match = _PLACE.fullmatch(source)
        if match is None or match["root"] not in self.roots:
            raise ValueError(f"no image source {source!r}: expected one of {', '.join([*self.roots, *self.loaders])}")
        root = self.roots[match["root"]]
        try:
            if match["kind"] == ".":
                return self._parquet_row(_below(root, match["rest"]), int(match["a"]), int(match["b"]))
            if match["kind"] == "+":
                return _read_range(_below(root, match["rest"]), int(match["a"]), int(match["b"]))
            return read_file(root / match["rest"])
        except (OSError, pa.ArrowInvalid) as error:
            raise BadImage(f"cannot be read: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}") from None

    def _parquet_row(self, path: Path, group: int, row: int) -> bytes:
        with self._lock:
            if (path, group) not in self._groups:
                table = pq.ParquetFile(path).read_row_group(group, columns=["image.bytes"])
                self._groups[path, group] = table["image"]
                if len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((path, group))
            content = self._groups[path, group][row].as_py()["bytes"]
        if content is None:
            raise BadImage("the row has no image bytes")
        return content


def _below(root: Path, name: str) -> Path:
    """Return a file of a root that is a folder, or the root itself where it is the file."""
    return root if root.name == name and not root.is_dir() else root / name


def _read_range(path: Path, offset: int, size: int) -> bytes:
    if size > LARGEST_FILE:
        raise BadImage(f"too large: {size:,} bytes")
    with open(path, "rb", buffering=0) as stream:
        content = os.pread(stream.fileno(), size, offset)
    if len(content) != size:
        raise BadImage(f"the tar ends inside it: {len(content):,} of {size:,} bytes")
    return content
