"""Token shards: webdataset tars with an index that gives random access to every sample.

Layout of a shard {split}-{number:06d}.tar: KEY.tokens.npy (uint16, (views, T)), KEY.cls (the label in ASCII),
KEY.json. Beside the shards: index.arrow (Arrow IPC, memory-mapped: shard, offset of the tokens, key, split, label)
and summary.json (what the tokens are, the digest of each shard, of the index and of the whole). webdataset writes and
streams shards, but has no random access, which a seeded order of images and resuming inside an epoch need: hence our index.

Shapes: n samples asked for, T tokens per view of a G x G grid.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpar_core.data.remote import Folder
from dpar_core.data.tars import BLOCK, members
from dpar_core.files import atomic_path, canonical_json, digest_of, npy_header, seal_holds, sha256_file, write_json
from dpar_core.system import open_files_limit

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
_LARGE_INDEX = 1 << 24  # bytes, of some 250,000 samples
_ENDINGS = ("tokens.npy", "cls", "json")


@dataclass(frozen=True)
class TokenMeta:
    """What the tokens of a data set are.

    tokenizer: digest of the weights.
    manifest: digest of the image list.
    precision: of the tokenizer's network.
    """

    row_width: int
    codebook_size: int
    views: str
    num_views: int
    image_size: int
    classes: tuple[str, ...]
    tokenizer: str
    manifest: str
    precision: str = "fp32"

    @property
    def tokens(self) -> int:
        """Tokens of an image, T."""
        return self.row_width**2


@dataclass(frozen=True)
class ShardFile:
    """One shard of a folder. samples: images in it."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardsSummary:
    """What summary.json says of a folder of shards. digest: of what the tokens are and of every shard."""

    meta: TokenMeta
    shards: tuple[ShardFile, ...]
    samples: int
    index_sha256: str
    digest: str


@dataclass(frozen=True)
class TokenSample:
    """One image in a shard. tokens: (views, T) uint16."""

    key: str
    label: int
    tokens: np.ndarray
    info: dict[str, Any]


@dataclass(frozen=True)
class ShardContents:
    """What a shard holds: a key, a label and the offset of the raw tokens of each sample; size and digest of the file."""

    keys: list[str]
    labels: list[int]
    offsets: list[int]
    bytes: int
    sha256: str


def write_shard(path: Path, samples: Iterable[TokenSample]) -> ShardContents:
    """Write a shard, whole or not at all; the same samples give the same bytes (times, owners and order are fixed).

    Needs webdataset, which nothing that only reads shards imports.
    """
    from webdataset import TarWriter

    keys, labels, offsets = [], [], []
    with atomic_path(path) as temporary:
        with (
            open(temporary, "wb") as stream,
            TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
        ):
            tar.tarstream.format = tarfile.USTAR_FORMAT  # TarWriter takes a format and leaves it unused
            for sample in samples:
                tokens = np.ascontiguousarray(sample.tokens, dtype="<u2")
                header = npy_header(tokens.shape, "<u2")
                keys.append(sample.key)
                labels.append(int(sample.label))
                offsets.append(tar.tarstream.offset + BLOCK + len(header))
                parts = (header + tokens.tobytes(), str(sample.label).encode(), canonical_json(sample.info).encode())
                for ending, content in zip(_ENDINGS, parts):  # one at a time: TarWriter sorts the endings of a sample
                    tar.write({"__key__": sample.key, ending: content})
        size, sha256 = temporary.stat().st_size, sha256_file(temporary)
    return ShardContents(keys, labels, offsets, size, sha256)


def scan_shard(path: Path, meta: TokenMeta) -> ShardContents:
    """Read a shard's contents from the tar itself. Raises BadTar or ValueError, in one sentence, unless it is sound."""
    keys, labels, offsets = [], [], []
    header, size = npy_header((meta.num_views, meta.tokens), "<u2"), 2 * meta.num_views * meta.tokens
    expected: list[str] = []
    with open(path, "rb") as stream:
        for member in members(path):
            if not expected:
                key, _, ending = member.name.partition(".")
                if not key or ending != _ENDINGS[0]:
                    raise ValueError(f"shard {path}: expected KEY.tokens.npy, found {member.name!r}: make it again")
                head = os.pread(stream.fileno(), len(header), member.offset)
                if head != header or member.size != len(header) + size:
                    raise ValueError(
                        f"shard {path}: tokens of {key} are not uint16 of shape ({meta.num_views}, {meta.tokens}): "
                        "make it again"
                    )
                keys.append(key)
                offsets.append(member.offset + len(header))
                expected = [f"{key}.{ending}" for ending in _ENDINGS[1:]]
                continue
            if member.name != expected[0]:
                raise ValueError(f"shard {path}: expected {expected[0]!r}, found {member.name!r}: make it again")
            expected.pop(0)
            if member.name.endswith(".cls"):
                label = os.pread(stream.fileno(), min(member.size, 20), member.offset)
                if not label.isdigit() or int(label) >= len(meta.classes):
                    raise ValueError(f"shard {path}: {member.name} is {label!r}, expected a class: make it again")
                labels.append(int(label))
    if expected:
        raise ValueError(f"shard {path} ends before {expected[0]!r}: make it again")
    if len(set(keys)) < len(keys):
        raise ValueError(f"shard {path} holds a key twice: keys must be unique, make it again")
    return ShardContents(keys, labels, offsets, path.stat().st_size, sha256_file(path))


def write_index(
    folder: Path,
    meta: TokenMeta,
    shards: Sequence[tuple[str, str]],
    *,
    contents: Sequence[ShardContents] | None = None,
) -> str:
    """Index the shards of a folder, given as (file name, split), and return the digest of the whole.

    contents: what `write_shard` returned for each; without it the tars are read. The digest names the content of every
    shard and what the tokens are; readers of patch maps and models compare it. Raises ValueError for a key that occurs
    twice, or shards of a split that are not neighbours.
    """
    if contents is None:
        contents = [scan_shard(folder / name, meta) for name, _ in shards]
    splits = [split for _, split in shards]
    if splits != sorted(splits, key=splits.index):
        raise ValueError(f"{folder}: the shards of a split must stand together, found {splits}")
    count = np.array([len(one.keys) for one in contents], dtype=np.int64)
    keys = pa.array([key for one in contents for key in one.keys], pa.string())
    if pc.count_distinct(keys).as_py() < len(keys):
        raise ValueError(f"{folder}: {len(keys) - pc.count_distinct(keys).as_py()} keys occur twice: keys must be unique")
    names = pa.array(list(dict.fromkeys(splits)), pa.string())
    column = pa.array(np.repeat([names.index(split).as_py() for split in splits], count).astype(np.int8))
    columns = [
        keys,
        pa.DictionaryArray.from_arrays(column, names),
        pa.array(np.repeat(np.arange(len(shards), dtype=np.int32), count)),
        pa.array([offset for one in contents for offset in one.offsets], pa.int64()),
        pa.array([label for one in contents for label in one.labels], pa.int32()),
    ]
    with atomic_path(folder / INDEX) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
            writer.write_table(pa.table(columns, schema=INDEX_SCHEMA))
    files = tuple(
        ShardFile(name, split, len(one.keys), one.bytes, one.sha256) for (name, split), one in zip(shards, contents)
    )
    digest = digest_of({"meta": asdict(meta), "shards": [asdict(one) for one in files]})
    summary = asdict(ShardsSummary(meta, files, int(count.sum()), sha256_file(folder / INDEX), digest))
    write_json(folder / SUMMARY, {**summary, "seal": digest_of(summary)})
    return digest


def read_summary(folder: Folder) -> ShardsSummary:
    """Read summary.json of a folder of shards. Raises FileNotFoundError or ValueError with the way out."""
    content = folder.read(SUMMARY)
    if content is None:
        raise FileNotFoundError(f"no token shards in {folder}: run `dpar-cli run tokenize_images`")
    try:
        found = json.loads(content)
        digest = digest_of({"meta": found["meta"], "shards": found["shards"]})
        sound = digest == found["digest"] and seal_holds(found)
        meta = TokenMeta(**{**found["meta"], "classes": tuple(found["meta"]["classes"])})
        shards = tuple(ShardFile(**one) for one in found["shards"])
        summary = ShardsSummary(meta, shards, found["samples"], found["index_sha256"], digest)
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{folder}/{SUMMARY} is damaged, or of an older version: run `dvc repro -sf tokenize_images`")
    return summary


class _File:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class OpenFiles:
    """Files kept open while they are in use: the newest `limit`, or half of what the process may open."""

    def __init__(self, limit: int | None = None) -> None:
        if limit is None:
            limit = max(min(open_files_limit() // 2, 4096), 16)
        self.limit = limit
        self._files: OrderedDict[object, _File] = OrderedDict()

    def get(self, key: object, open_file: Callable[[], Path]) -> _File:
        """Return the open file of a key, opened by open_file() -> Path where it is not; many threads may call."""
        file = self._files.get(key)
        if file is None:
            file = self._files[key] = _File(open_file())
            while len(self._files) > self.limit:
                self._files.popitem(last=False)  # closed when the last reader lets go of it
        return file


class TokenShards:
    """Random access to the samples of one split: shards stay where they are, the index is memory-mapped where it is large.

    folder: a path, or an address that fsspec opens, of which shards are copied to `cache` when first read (see
    `remote.Folder`). Many threads and forked or pickled copies may read. Raises FileNotFoundError or ValueError in one
    sentence when the folder is not a shard folder, or is incomplete.
    """

    def __init__(self, folder: Path | str, split: str, *, cache: Path | None = None) -> None:
        source = Folder(folder, cache=cache)
        self.folder, self.split, self._source = source.address, split, source
        summary = read_summary(source)
        self.digest, self.meta, self._files = summary.digest, summary.meta, summary.shards
        counts = np.array([shard.samples for shard in summary.shards], dtype=np.int64)
        mine = [number for number, shard in enumerate(summary.shards) if shard.split == split]
        total = int(counts[mine].sum())
        if not total:
            raise ValueError(f"{source} holds no {split} samples: check data.{split} in params.yaml")
        first = int(counts[: mine[0]].sum())
        self._numbers = mine
        self._ends = np.cumsum(counts[mine])
        if not source.remote:
            for name in [INDEX, *(self._files[number].name for number in mine)]:
                if not Path(self.folder, name).exists():
                    raise FileNotFoundError(
                        f"shard {name} is missing: run `dpar-cli data check --repair`, or `dvc repro -sf tokenize_images` "
                        f"(looked in {self.folder})"
                    )
        table = _open_index(source.path(INDEX, summary.index_sha256))
        if table.num_rows != summary.samples:
            raise ValueError(
                f"{source}/{INDEX} has {table.num_rows} samples, its summary says {summary.samples}: "
                "run `dpar-cli data check --repair`"
            )
        self._table = table.slice(first, total)
        self._shard, self._offset = self._table["shard"].to_numpy(), self._table["offset"].to_numpy()
        self.labels = self._table["label"].to_numpy()
        self._open = OpenFiles()

    def __len__(self) -> int:
        return len(self._offset)

    def key(self, index: int) -> str:
        """Return the key of a sample."""
        key: str = self._table["key"][int(index)].as_py()
        return key

    def keys(self) -> pa.ChunkedArray:
        """Return all keys in order."""
        return self._table["key"]

    def find(self, key: str) -> int | None:
        """Return the index of the sample with a key, or None."""
        index = pc.index(self._table["key"], key).as_py()
        return index if index >= 0 else None

    def shards(self) -> list[tuple[str, slice]]:
        """Return (file name, slice of sample indices) of each shard of the split that holds any, in order."""
        starts = [0, *self._ends[:-1].tolist()]
        parts = zip(self._numbers, starts, self._ends.tolist())
        return [(self._files[number].name, slice(first, last)) for number, first, last in parts if last > first]

    def shard_of(self, index: int) -> tuple[str, slice]:
        """Return (file name, slice of sample indices) of the shard that a sample is in."""
        return next((name, part) for name, part in self.shards() if part.start <= index < part.stop)

    def tokens(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Read one view of each sample asked for: indices (n,), views (n,) -> (n, T) uint16. Raises OSError."""
        size = 2 * self.meta.tokens
        indices, views = np.asarray(indices, dtype=np.int64), np.asarray(views, dtype=np.int64)
        if len(views) and not (views.min() >= 0 and views.max() < self.meta.num_views):
            raise IndexError(f"views must be 0 to {self.meta.num_views - 1}; got {views.min()} to {views.max()}")
        out = np.empty((len(indices), self.meta.tokens), dtype="<u2")
        content = memoryview(out).cast("B") if len(out) else memoryview(b"")
        offsets = (self._offset[indices] + views * size).tolist()
        for row, (number, offset) in enumerate(zip(self._shard[indices].tolist(), offsets)):
            file = self._open.get(number, partial(self._path, number))
            if os.preadv(file.descriptor, [content[row * size : (row + 1) * size]], offset) != size:
                raise self._other_length(self._files[number], "shorter")
        return out

    def all_views(self, index: int) -> np.ndarray:
        """Read every view of one sample: (views, T) uint16."""
        views = np.arange(self.meta.num_views)
        return self.tokens(np.full(len(views), index), views)

    def _path(self, number: int) -> Path:
        """Return the path of a shard, held against its size and digest when it is first read."""
        shard = self._files[number]
        if not self._source.remote:  # another length is seen without reading all of it
            size = Path(self.folder, shard.name).stat().st_size
            if size != shard.bytes:
                raise self._other_length(shard, "shorter" if size < shard.bytes else "longer")
        return self._source.path(shard.name, shard.sha256)

    def _other_length(self, shard: ShardFile, how: str) -> OSError:
        return OSError(
            f"shard {shard.name} is {how} than its index says ({shard.bytes:,} bytes): "
            f"run `dpar-cli data check --repair` (looked in {self.folder})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "split": self.split, "cache": self._source.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TokenShards.__init__(self, state["folder"], state["split"], cache=state["cache"])


def _open_index(path: Path) -> pa.Table:
    """Read an index, or map it where it is large: one that is written over or cut off in place then changes its readers."""
    try:
        large = path.stat().st_size > _LARGE_INDEX
        table = pa.ipc.open_file(pa.memory_map(str(path)) if large else path.read_bytes()).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): run `dpar-cli data check --repair`") from None
    if table.schema.names != INDEX_SCHEMA.names:
        raise ValueError(f"{path} is not a shard index: expected columns {INDEX_SCHEMA.names}, found {table.schema.names}")
    return table
