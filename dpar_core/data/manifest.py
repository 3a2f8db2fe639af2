"""The manifest: one row per image, whatever source it comes from; Parquet.

Columns: key (string, unique), split ("train" or "validation"), source (string, where the image is: see
`dpar_core/data/sources.py`), box (x0, y0, x1, y1 in pixels, cut out before the views; null: the whole image), label (int32),
class_name (string), content (string: 16 hex digits of the SHA-256 of the file's bytes; null: they could not be read). Rows
stay in Arrow columns until they are asked for: 1.28 million take about 200 MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpar_core.files import Damaged, atomic_path, canonical_json, digest_of

SPLITS = ("train", "validation")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("box", pa.list_(pa.int32())),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("content", pa.string()),
    ]
)
_CHUNK = 100_000


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a manifest. content: digest of the image file's bytes, None where it could not be read."""

    key: str
    split: str
    source: str
    box: tuple[int, int, int, int] | None
    label: int
    class_name: str
    content: str | None = None


class Rows(Sequence[Row]):
    """Some rows of a manifest, made when asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            return Rows(self.table.slice(first, max(last - first, 0))) if step == 1 else self.take(range(len(self))[index])
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return next(iter(Rows(self.table.slice(index % len(self), 1))))

    def __iter__(self) -> Iterator[Row]:
        for first in range(0, len(self), _CHUNK):
            for row in self.table.slice(first, _CHUNK).to_pylist():
                box = row.pop("box")
                yield Row(box=tuple(box) if box is not None else None, **row)

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """Return these rows, in this order."""
        return Rows(self.table.take(pa.array(np.asarray(indices, dtype=np.int64))))


@dataclass(frozen=True)
class Manifest:
    """All images of a data set, its class names in label order, and where sources are found (root name -> path).

    notes: facts about the list that are not part of its identity, as how many files were left out. Raises ValueError for
    keys that occur twice.
    """

    rows: Rows
    classes: tuple[str, ...]
    roots: dict[str, str]
    digest: str
    notes: dict[str, Any]

    @classmethod
    def of(
        cls,
        rows: Iterable[Row],
        classes: Sequence[str],
        roots: dict[str, str] | None = None,
        *,
        notes: dict[str, Any] | None = None,
    ) -> Manifest:
        """Make a manifest. Its digest names rows and classes; the roots are left out, so that a data set may move."""
        columns: list[Sequence[Any]] = list(
            zip(*((r.key, r.split, r.source, r.box, r.label, r.class_name, r.content) for r in rows))
        )
        columns = columns or [[] for _ in SCHEMA]
        arrays = [pa.array(list(column), type=field.type) for column, field in zip(columns, SCHEMA)]
        table = Rows(pa.table(arrays, schema=SCHEMA))
        _refuse_doubles(table)
        return cls(table, tuple(classes), dict(roots or {}), _digest(table, classes), dict(notes or {}))

    def with_contents(self, contents: Sequence[str | None]) -> Manifest:
        """Return the manifest with the digest of each row's image file; they are part of its own digest."""
        at = self.rows.table.schema.get_field_index("content")
        table = Rows(self.rows.table.set_column(at, SCHEMA.field("content"), pa.array(contents, pa.string())))
        return replace(self, rows=table, digest=_digest(table, self.classes))

    def split(self, name: str) -> Rows:
        """Return the rows of a split. Raises ValueError when it has none."""
        chosen = Rows(self.rows.table.filter(pc.equal(self.rows.table["split"], name)))
        if not len(chosen):
            raise ValueError(f"the manifest has no {name} images: check data.{name} in params.yaml")
        return chosen

    def find(self, key: str) -> Row | None:
        """Return the row of a key, or None."""
        index = pc.index(self.rows.table["key"], key).as_py()
        return self.rows[index] if index >= 0 else None

    def counts(self, split: str) -> np.ndarray:
        """Return the images of each class in a split: (classes,) int64."""
        table = self.rows.table.filter(pc.equal(self.rows.table["split"], split))
        return np.bincount(table["label"].to_numpy(), minlength=len(self.classes))


def _digest(rows: Rows, classes: Sequence[str]) -> str:
    """Return what names rows and classes: column by column, in bytes that do not depend on how Arrow cut them."""
    if rows.table["content"].null_count == len(rows):  # as version 0.1.0 named them
        return _digest_of_rows(rows, classes)
    whole = hashlib.sha256(canonical_json(list(classes)).encode())
    for name in rows.table.schema.names:
        column = rows.table[name].combine_chunks()
        array = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_list(array.type):
            lengths, values = pc.fill_null(pc.list_value_length(array), -1), pc.list_flatten(array).to_numpy()
            content = values.astype("<i4").tobytes()
        elif pa.types.is_string(array.type):
            lengths = pc.fill_null(pc.binary_length(array), -1)
            content = "".join(array.drop_null().to_pylist()).encode()
        else:
            lengths, content = array, b""
        whole.update(canonical_json([name, len(array), len(content)]).encode())
        whole.update(lengths.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        whole.update(content)
    return whole.hexdigest()[:16]


def _digest_of_rows(rows: Rows, classes: Sequence[str]) -> str:
    whole = hashlib.sha256(canonical_json(list(classes)).encode())
    for row in rows:
        whole.update(canonical_json([row.key, row.split, row.source, row.box, row.label]).encode())
    return whole.hexdigest()[:16]


def _refuse_doubles(rows: Rows) -> None:
    counts = pc.value_counts(rows.table["key"])
    doubles = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    if doubles:
        shown = ", ".join(sorted(doubles)[:3])
        raise ValueError(f"{len(doubles)} keys stand for more than one image (first: {shown}): keys must be unique")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all; the same rows give the same bytes."""
    header = {
        "classes": json.dumps(manifest.classes),
        "roots": json.dumps(manifest.roots, sort_keys=True),
        "digest": manifest.digest,
        "notes": json.dumps(manifest.notes, sort_keys=True),
    }
    header["seal"] = digest_of(header)
    with atomic_path(path) as temporary:
        pq.write_table(manifest.rows.table.replace_schema_metadata(header), temporary, compression="zstd")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and hold rows and notes against the digests in it. Raises FileNotFoundError, or ValueError with the
    way out."""
    if not path.exists():
        raise FileNotFoundError(f"no manifest at {path}: run `dpar-cli run data`")
    try:
        table = pq.read_table(path)
        header = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # Arrow raises OSError on damaged headers
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged ({reason[:200]}): run `dvc repro -sf data`") from None
    older = table.schema.names == SCHEMA.names[:-1]  # of version 0.1.0, which knew no contents and no seals
    if older:
        table = table.append_column(SCHEMA.field("content"), pa.nulls(len(table), pa.string()))
    if table.schema.names != SCHEMA.names or not header.keys() >= {"classes", "roots", "digest", "notes"}:
        raise ValueError(f"{path} is not a manifest: expected columns {SCHEMA.names}, found {table.schema.names}")
    damaged = Damaged(f"{path} is damaged or was edited (its rows are not those its digest names): run `dvc repro -sf data`")
    seal = header.pop("seal", None)
    try:
        loaded = {name: json.loads(header[name]) for name in ("classes", "roots", "notes")}
        rows = Rows(table.replace_schema_metadata(None))
        sound = (
            (seal == digest_of(header) or (older and seal is None))
            and table.schema.types == SCHEMA.types
            and _digest(rows, loaded["classes"]) == header["digest"]
            and table["class_name"].equals(pc.take(pa.chunked_array([loaded["classes"]], pa.string()), table["label"]))
        )
    except (ValueError, TypeError, RecursionError, pa.ArrowException):  # TypeError: columns of another type
        raise damaged from None
    if not sound:
        raise damaged
    return Manifest(rows, tuple(loaded["classes"]), loaded["roots"], header["digest"], loaded["notes"])
