"""Token shards: webdataset tars with an index that gives random access to every sample.

Layout of a shard {split}-{number:06d}.tar: KEY.tokens.npy (uint16, (views, T)), KEY.cls (the label in ASCII),
KEY.json. Beside the shards: index.arrow (Arrow IPC, memory-mapped: shard, offset of the tokens, key, split, label)
and summary.json (what the tokens are, the digest of each shard and of the whole).

Shapes: n samples asked for, T tokens a view of a G x G grid.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpar_core.files import atomic_path, canonical_json, digest_of, sha256_file, write_json

INDEX, SUMMARY = "index.arrow", "summary.json"
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("label", pa.int32()),
    ]
)


@dataclass(frozen=True)
class TokenMeta:
    """What the tokens of a data set are. tokenizer: digest of the weights; manifest: digest of the image list."""

    row_width: int
    codebook_size: int
    views: str
    num_views: int
    image_size: int
    classes: tuple[str, ...]
    tokenizer: str
    manifest: str

    @property
    def tokens(self) -> int:
        """Tokens of an image, T."""
        return self.row_width**2


@dataclass(frozen=True)
class Sample:
    """One image in a shard. tokens: (views, T) uint16."""

    key: str
    label: int
    tokens: np.ndarray
    info: dict


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a shard, whole or not at all; the same samples give the same bytes (times, owners and order are fixed)."""
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(sample.tokens, dtype="<u2"))
            for ending, content in (
                ("tokens.npy", buffer.getvalue()),
                ("cls", str(sample.label).encode()),
                ("json", canonical_json(sample.info).encode()),
            ):
                member = tarfile.TarInfo(f"{sample.key}.{ending}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))


def _scan_shard(path: Path, number: int, split: str, meta: TokenMeta) -> list[tuple]:
    """Find every sample of a shard: (key, split, number, offset of the raw tokens, label)."""
    rows, header = [], len(_npy_header(meta))
    with tarfile.open(path, "r:") as tar:
        members = iter(tar)
        for member in members:
            key, _, ending = member.name.partition(".")
            if not member.isfile() or ending != "tokens.npy":
                raise ValueError(f"{path.name}: expected KEY.tokens.npy, found {member.name!r}: make the shards again")
            label = next(members, None)
            if label is None or label.name != f"{key}.cls":
                raise ValueError(f"{path.name}: {key} has no .cls behind its tokens: make the shards again")
            if member.size != header + 2 * meta.num_views * meta.tokens:
                raise ValueError(f"{path.name}: tokens of {key} have {member.size} bytes, expected {meta.num_views} views")
            rows.append((key, split, number, member.offset_data + header, int(tar.extractfile(label).read())))
            if (info := next(members, None)) is None or info.name != f"{key}.json":
                raise ValueError(f"{path.name}: {key} has no .json behind its label: make the shards again")
    return rows


def _npy_header(meta: TokenMeta) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<u2", "fortran_order": False, "shape": (meta.num_views, meta.tokens)}
    )
    return buffer.getvalue()


def write_index(folder: Path, meta: TokenMeta, shards: Sequence[tuple[str, str]], *, extra: dict | None = None) -> str:
    """Index the shards of a folder, given as (file name, split), and return the digest of the whole.

    The digest names the content of every shard and what the tokens are; readers of patch maps and models compare it.
    """
    rows = [row for number, (name, split) in enumerate(shards) for row in _scan_shard(folder / name, number, split, meta)]
    columns = list(zip(*rows)) if rows else [[] for _ in INDEX_SCHEMA]
    duplicates = len(rows) - len(set(columns[0]))
    if duplicates:
        raise ValueError(f"{folder}: {duplicates} keys occur more than once: keys must be unique")
    table = pa.table([pa.array(list(c), type=f.type) for c, f in zip(columns, INDEX_SCHEMA)], schema=INDEX_SCHEMA)
    with atomic_path(folder / INDEX) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
            writer.write_table(table)
    files = [{"name": name, "split": split, "sha256": sha256_file(folder / name)} for name, split in shards]
    summary = {"meta": asdict(meta), "shards": files, "samples": len(rows), **(extra or {})}
    summary["digest"] = digest_of({"meta": summary["meta"], "shards": files})
    write_json(folder / SUMMARY, summary)
    return summary["digest"]


class TokenShards:
    """Random access to the samples of one split: shards stay on disk, the index is memory-mapped.

    Raises FileNotFoundError or ValueError in one sentence when the folder is no shard folder, or is incomplete.
    """

    def __init__(self, folder: Path | str, split: str) -> None:
        self.folder, self.split = Path(folder), split
        if not (self.folder / SUMMARY).exists() or not (self.folder / INDEX).exists():
            raise FileNotFoundError(f"no token shards in {self.folder}: run `dvc repro tokenize_images`")
        summary = json.loads((self.folder / SUMMARY).read_text())
        self.digest: str = summary["digest"]
        self.meta = TokenMeta(**{**summary["meta"], "classes": tuple(summary["meta"]["classes"])})
        self.shard_names = [shard["name"] for shard in summary["shards"]]
        self.shard_digests = [shard["sha256"] for shard in summary["shards"]]
        wanted = {number for number, shard in enumerate(summary["shards"]) if shard["split"] == split}
        for number in sorted(wanted):
            if not (self.folder / self.shard_names[number]).exists():
                raise FileNotFoundError(f"shard {self.shard_names[number]} is missing: run `dvc repro tokenize_images`")
        table = pa.ipc.open_file(pa.memory_map(str(self.folder / INDEX))).read_all()
        shard = table["shard"].to_numpy()
        chosen = np.flatnonzero(np.isin(shard, list(wanted)))
        if not len(chosen):
            raise ValueError(f"{self.folder} holds no {split} samples: check data.{split} in params.yaml")
        # A split's samples are neighbours in the index, so a slice keeps the memory map.
        assert len(chosen) == chosen[-1] - chosen[0] + 1
        self._table = table.slice(int(chosen[0]), len(chosen))
        self._shard, self._offset = self._table["shard"].to_numpy(), self._table["offset"].to_numpy()
        self.labels = self._table["label"].to_numpy()
        self._open: dict[int, int] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self._offset)

    def key(self, index: int) -> str:
        """Return the key of a sample."""
        return self._table["key"][int(index)].as_py()

    def keys(self) -> pa.ChunkedArray:
        """Return all keys in order."""
        return self._table["key"]

    def shards(self) -> list[tuple[str, slice]]:
        """Return (file name, slice of sample indices) of each shard of the split, in order."""
        numbers, first = np.unique(self._shard, return_index=True)
        ends = np.append(first[1:], len(self))
        return [(self.shard_names[n], slice(int(a), int(b))) for n, a, b in zip(numbers, first, ends)]

    def tokens(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Read one view of each sample asked for: indices (n,), views (n,) -> (n, T) uint16. Raises OSError."""
        size = 2 * self.meta.tokens
        out = np.empty((len(indices), self.meta.tokens), dtype="<u2")
        for row, index, view in zip(out, indices, views):
            content = os.pread(self._descriptor(int(self._shard[index])), size, int(self._offset[index]) + int(view) * size)
            if len(content) != size:
                name = self.shard_names[self._shard[index]]
                raise OSError(f"shard {name} is shorter than its index says: run `dvc repro tokenize_images`")
            row[:] = np.frombuffer(content, dtype="<u2")
        return out

    def all_views(self, index: int) -> np.ndarray:
        """Read every view of one sample: (views, T) uint16."""
        views = np.arange(self.meta.num_views)
        return self.tokens(np.full(len(views), index), views)

    def _descriptor(self, number: int) -> int:
        if self._owner != os.getpid():  # a forked reader opens files of its own
            self._open, self._owner = {}, os.getpid()
        if number not in self._open:
            self._open[number] = os.open(self.folder / self.shard_names[number], os.O_RDONLY)
        return self._open[number]

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "split": self.split}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["folder"], state["split"])

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
