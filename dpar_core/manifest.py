"""The manifest: one row an image, whatever source it comes from; Parquet.

Columns: key (string, unique), split ("train" or "validation"), source (string, where the image is: see
`stages/data.py`), box (x0, y0, x1, y1 in pixels, cut out before the views; null: the whole image), label (int32),
class_name (string).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpar_core.files import atomic_path, digest_of

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("box", pa.list_(pa.int32())),
        ("label", pa.int32()),
        ("class_name", pa.string()),
    ]
)


@dataclass(frozen=True)
class Row:
    """One image of a manifest."""

    key: str
    split: str
    source: str
    box: tuple[int, int, int, int] | None
    label: int
    class_name: str


@dataclass(frozen=True)
class Manifest:
    """All images of a data set, its class names in label order, and where relative sources are found ("" for none)."""

    rows: tuple[Row, ...]
    classes: tuple[str, ...]
    roots: dict[str, str]

    @property
    def digest(self) -> str:
        """Name of the content: 16 hex digits. The root is left out, so that a data set may move."""
        rows = [[row.key, row.split, row.source, list(row.box) if row.box else None, row.label] for row in self.rows]
        return digest_of([rows, list(self.classes)])

    def split(self, name: str) -> list[Row]:
        """Return the rows of a split. Raises ValueError when it has none."""
        chosen = [row for row in self.rows if row.split == name]
        if not chosen:
            raise ValueError(f"the manifest has no {name} images: check data.{name} in params.yaml")
        return chosen


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all; the same rows give the same bytes."""
    columns = list(zip(*((r.key, r.split, r.source, r.box, r.label, r.class_name) for r in manifest.rows)))
    arrays = [pa.array(list(column), type=field.type) for column, field in zip(columns, SCHEMA)]
    header = {"classes": json.dumps(manifest.classes), "roots": json.dumps(manifest.roots), "digest": manifest.digest}
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(arrays, schema=SCHEMA.with_metadata(header)), temporary, compression="zstd")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises FileNotFoundError or ValueError with the way out."""
    if not path.exists():
        raise FileNotFoundError(f"no manifest at {path}: run `dvc repro data`")
    table = pq.read_table(path)
    if table.schema.names != SCHEMA.names:
        raise ValueError(f"{path} is no manifest: expected columns {SCHEMA.names}, found {table.schema.names}")
    header = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    rows = tuple(_row(**row) for row in table.to_pylist())
    return Manifest(rows, tuple(json.loads(header["classes"])), json.loads(header["roots"]))


def _row(*, box: Sequence[int] | None, **values) -> Row:
    return Row(box=tuple(box) if box is not None else None, **values)
