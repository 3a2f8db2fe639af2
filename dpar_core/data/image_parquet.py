"""Parquet files of images as a source of a data set: which columns hold image and label, and reading a row's image."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpar_core.data.classes import CLASSES, MOST_CLASSES, checked_label, normal_name, resolve_labels
from dpar_core.data.images import LARGEST_FILE, BadImage
from dpar_core.data.listing import Listing, find_files, key_of, require
from dpar_core.data.splits import first_few, splits_said

IMAGE_COLUMN = "image"  # where a source names none
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "img_bytes", "bytes")
_LABEL_COLUMNS = (
    "label",
    "labels",
    "cls",
    "class",
    "class_id",
    "class_idx",
    "class_label",
    "class_name",
    "target",
    "category",
    "fine_label",
    "coarse_label",
    "synset",
    "wnid",
)
_SPLIT_COLUMNS = frozenset(("split", "splits", "subset", "partition", "set", "data_split", "split_name", "phase"))
_MOST_SPLITS = 5  # a number with more values says something else
_FIRST_CHOICES = ("image", "label")  # taken where others of the lists are there as well
_KEPT_GROUPS = 8  # row groups that stay in memory, as long as they take no more than
_KEPT_BYTES = 2 << 30
_MOST_ROWS = 1 << 31  # of a file
_LARGEST_GROUP = 8 << 30  # bytes of a row group, whose images are in memory together


def list_parquet(root: Path, split: str, *, label_key: str | None = None, image_key: str | None = None) -> Listing:
    """List Parquet files: a column of images (bytes, or a struct with bytes as the Hugging Face hub has it) and of labels.

    root: a folder, below which the files of this split are taken (see `splits.choose_files`), or one file. Columns are
    found by name and type; image_key and label_key name them where several would do. Labels are numbers or text. Class
    names come from classes.txt beside the files, or from the features in the files' metadata; files that list them in
    another order are matched by name. A row without an image is listed, and found to be bad when it is read.

    Raises FileNotFoundError, or ValueError for columns that are missing or unclear, rows without a label, labels out of
    range, and class names that do not agree.
    """
    require(root, split, folder=None, expected="a Parquet file, or a folder of them")
    listing, values, names = Listing(), [], None
    listing.files = find_files(root, split, ".parquet", listing)
    beside = (root if root.is_dir() else root.parent) / CLASSES
    columns: set[tuple[str, str]] = set()
    splits: dict[str, dict[object, str]] = {}
    written = False
    for number, name in enumerate(listing.files):
        path = root / name if root.is_dir() else root
        where = f"data.{split}: {path}"
        file = open_parquet(path, where=where)
        image = _image_column(file.schema_arrow, image_key, where)
        label = _label_column(file.schema_arrow, label_key, where)
        columns.add((image, label))
        written |= _holds_text(file.schema_arrow.field(label).type)
        for column, value in _split_values(file, where):
            splits.setdefault(column, {}).setdefault(value, name)
        mine = _feature_names(file.schema_arrow.metadata or {}, label)
        if number == 0:
            names = mine
        order = _order(mine, names, where, listing.files[0], beside)
        column = "" if image == IMAGE_COLUMN else f"[{image}]"
        stem = name[: -len(".parquet")] if name.lower().endswith(".parquet") else name
        for group in range(file.num_row_groups):
            # The columns' own sizes are not asked for: pyarrow's reader of them ends the process on some damaged files.
            if not 0 <= (size := file.metadata.row_group(group).total_byte_size) <= _LARGEST_GROUP:
                raise ValueError(
                    f"{where}: row group {group} takes {size:,} bytes, and its images are in memory together: write the "
                    "file with smaller row groups (row_group_size=1000)"
                )
            for row, value in enumerate(_column(file, group, label, where)):
                if value is None:
                    raise ValueError(f"{where} has no label for row {row} of group {group}: expected a class in {label!r}")
                value = checked_label(value, f"{where}, row {row} of group {group}")
                if order is not None and isinstance(value, int):
                    if value >= len(order):
                        raise ValueError(
                            f"{where} has the label {value} for row {row} of group {group}, but names {len(order)} classes"
                        )
                    value = order[value]
                key = key_of(split, stem, suffix=f"-{group:04d}-{row:06d}")
                listing.add(key, f"{split}@{group}.{row}{column}:{name}", -1)
                values.append(value)
    if not listing.keys:
        raise ValueError(f"data.{split} {root} holds no images: expected Parquet files with rows")
    found = resolve_labels(values, names, beside, where=f"data.{split} {root}", written=written)
    listing.classes, listing.labels = found.names, found.labels
    listing.numbered, listing.doubles, listing.given = found.numbered, found.doubles, names
    if columns != {("image", "label")}:
        shown = "; ".join(f"{image!r} and {label!r}" for image, label in sorted(columns))
        listing.notes.append(f"images and labels are read from the columns {shown}")
    listing.notes += [*found.notes, *_split_notes(splits, split, f"data.{split} {root}")]
    return listing


def open_parquet(path: Path, *, where: str) -> pq.ParquetFile:
    """Open a Parquet file. Raises ValueError, beginning with `where`, for one that is damaged, pointers and other files."""
    try:
        with open(path, "rb") as stream:
            if stream.read(23) == b"version https://git-lfs":
                raise ValueError(f"{where} is a Git LFS pointer: fetch the real file with `git lfs pull`")
        file = pq.ParquetFile(path)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not a Parquet file, or damaged ({_first_line(error)})") from None
    if any(count < 0 for count in rows) or sum(rows) > _MOST_ROWS or sum(rows) != file.metadata.num_rows:
        raise ValueError(f"{where} is damaged: it states {file.metadata.num_rows:,} rows, its groups {sum(rows):,}")
    return file


def _column(file: pq.ParquetFile, group: int, column: str, where: str) -> list[object]:
    """Return a row group's values in a column. Raises ValueError where they cannot be read."""
    stated = file.metadata.row_group(group)
    try:
        found: list[object] = file.read_row_group(group, columns=[column])[column].to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is damaged: group {group} cannot be read ({_first_line(error)})") from None
    if len(found) != stated.num_rows:
        raise ValueError(
            f"{where} is damaged: group {group} has {len(found):,} values of {column!r} for {stated.num_rows:,} rows"
        )
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _is_binary(kind: pa.DataType) -> bool:
    return any(holds(kind) for holds in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _holds_image(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(holds(kind) for holds in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _holds_label(kind: pa.DataType) -> bool:
    return _holds_text(kind) or pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _split_values(file: pq.ParquetFile, where: str) -> Iterator[tuple[str, object]]:
    """Yield (column, value) once for each value in columns that may say which split a row is of, as split or is_train."""
    for field in file.schema_arrow:
        number = pa.types.is_integer(field.type) or pa.types.is_boolean(field.type)
        named = field.name.casefold() in _SPLIT_COLUMNS
        if (named and _holds_text(field.type)) or (number and (named or splits_said(field.name))):
            groups = range(file.num_row_groups)
            yield from {(field.name, value) for group in groups for value in _column(file, group, field.name, where)}


def _split_notes(found: Mapping[str, Mapping[object, str]], split: str, where: str) -> list[str]:
    """Return what a person should know of columns that say a split. found: by column and value, a file that has it.

    Raises ValueError where text says of some rows that they are of another split than others.
    """
    notes = []
    for column, values in found.items():
        said = {name: file for value, file in values.items() if isinstance(value, str) for name in splits_said(value)}
        if len(said) > 1:
            raise ValueError(
                f"{where} holds rows of several splits by the column {column!r} ({first_few(sorted(said))}, in "
                f"{first_few(sorted(set(said.values())))}): write the rows of each split to files of their own"
            )
        number = not any(isinstance(value, str) for value in values)
        if said and set(said) != {split}:
            notes.append(f"the column {column!r} says {next(iter(said))}, and its rows are taken")
        elif 1 < len(values) <= _MOST_SPLITS and (said or number):
            shown = first_few(sorted(map(str, values)), _MOST_SPLITS)
            notes.append(f"the column {column!r} holds {shown}, and all rows are taken")
    return notes


def _image_column(schema: pa.Schema, wanted: str | None, where: str) -> str:
    fitting = [field.name for field in schema if _holds_image(field.type)]
    if wanted is None and len(fitting) > 1:
        fitting = [name for name in fitting if name.casefold() in _IMAGE_COLUMNS] or fitting
    way_out = "name one with data.image_key" if fitting else "write one"
    what = "images (bytes, or a struct with bytes)"
    return _chosen(schema, wanted, fitting, where, what=what, param="data.image_key", way_out=way_out)


def _label_column(schema: pa.Schema, wanted: str | None, where: str) -> str:
    possible = [field.name for field in schema if _holds_label(field.type)]
    fitting = possible if wanted else [name for name in possible if name.casefold() in _LABEL_COLUMNS]
    way_out = "name one with data.label_key" if possible else "write one"
    what = "labels (integers or text)"
    return _chosen(schema, wanted, fitting, where, what=what, param="data.label_key", way_out=way_out)


def _chosen(
    schema: pa.Schema, wanted: str | None, fitting: list[str], where: str, *, what: str, param: str, way_out: str
) -> str:
    """Return the column that is wanted, or the only one that fits, or of several the one with the usual name."""
    shown = ", ".join(f"{field.name} ({field.type})"[:80] for field in schema)
    if double := [name for name in fitting if fitting.count(name) > 1 and wanted in (None, name)]:
        raise ValueError(f"{where} has {fitting.count(double[0])} columns named {double[0]!r}: write it anew with one")
    if wanted is not None:
        if wanted not in fitting:
            raise ValueError(f"{where} has no column {wanted!r} of {what} ({param}); it has {shown}")
        return wanted
    if len(fitting) > 1:
        fitting = [name for name in fitting if name in _FIRST_CHOICES] or fitting
    if len(fitting) != 1 or "]:" in fitting[0]:
        several = f"several columns that may hold {what}: {', '.join(fitting)}" if fitting else f"no column of {what}"
        raise ValueError(f"{where} has {several}; {way_out} (it has {shown})")
    return fitting[0]


def _feature_names(metadata: Mapping[bytes, bytes], label: str) -> list[str] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > MOST_CLASSES:
        return None
    return names


def _order(mine: list[str] | None, first: list[str] | None, where: str, first_file: str, beside: Path) -> list[int] | None:
    """Return for each label of a file the label it has in the first file, or None where numbers are all that is known."""
    if mine is None and first is None:
        return None
    if mine is None or first is None:
        without = "names no classes, but" if mine is None else "names its classes, but not"
        if beside.exists():
            return None if mine is None else list(range(len(mine)))
        raise ValueError(f"{where} {without} {first_file}: put {CLASSES} (a name per line, in label order) beside them")
    if mine == first:
        return list(range(len(mine)))
    names, others = [normal_name(name) for name in mine], [normal_name(name) for name in first]
    if len(set(names)) < len(names) or len(set(others)) < len(others) or set(names) - set(others) or beside.exists():
        raise ValueError(
            f"{where} lists other classes than {first_file} (first difference: {_difference(names, others)}), so its labels "
            "mean something else: write the files with the same class names"
        )
    label_of = {name: number for number, name in enumerate(others)}
    return [label_of[name] for name in names]


def _difference(names: Sequence[str], others: Sequence[str]) -> str:
    for number, (name, other) in enumerate(zip(names, others)):
        if name != other:
            return f"class {number} is {name!r}, there {other!r}"
    return f"{len(names)} classes, there {len(others)}"


class ParquetImages:
    """Reads the images of single rows; whole row groups stay in memory for their neighbours. Safe for many threads."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Path, int, str], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, path: Path, group: int, row: int, column: str) -> bytes:
        """Return the bytes of an image. Raises BadImage where the row holds none, OSError, pa.ArrowException."""
        with self._lock:
            value = self._group(path, group, column)[row].as_py()
        content: bytes | None = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            beside = value.get("path") if isinstance(value, dict) else None
            raise BadImage("the row has no image bytes" + (f", only the path {str(beside)[:100]!r}" if beside else ""))
        if len(content) > LARGEST_FILE:
            raise BadImage(f"too large: {len(content):,} bytes")
        return content

    def _group(self, path: Path, group: int, column: str) -> pa.ChunkedArray:
        if (path, group, column) not in self._groups:
            file = pq.ParquetFile(path)
            kind = file.schema_arrow.field(column).type
            only = f"{column}.bytes" if pa.types.is_struct(kind) and kind.get_field_index("path") < 0 else column
            self._groups[path, group, column] = file.read_row_group(group, columns=[only])[column]
            while len(self._groups) > 1 and (
                len(self._groups) > _KEPT_GROUPS or sum(one.nbytes for one in self._groups.values()) > _KEPT_BYTES
            ):
                self._groups.popitem(last=False)
        self._groups.move_to_end((path, group, column))
        return self._groups[path, group, column]
