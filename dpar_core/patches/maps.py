"""Entropies and patch lengths of every view, in Parquet beside the shards they belong to.

entropies/: {shard}.parquet with key, view, entropies (fixed list of T float32 nats, entry 0 nan).
patch_maps/: {shard}.parquet with key, view, lengths (list of uint16), rule.json, and for training at random
{split}.starts.npy: the same boundaries as bits, (samples, views, ceil(T / 8)) uint8, read by offset.
Both folders have a summary.json with the digests of what made them; readers refuse what does not belong together.

Shapes: n maps asked for, T tokens of a view.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpar_core.choices import GatePrecision
from dpar_core.data.remote import Folder
from dpar_core.data.shards import OpenFiles, TokenShards
from dpar_core.files import (
    atomic_path,
    digest_of,
    npy_header,
    read_record,
    seal_holds,
    sha256_file,
    write_json,
    write_record,
)
from dpar_core.patches.rule import PatchRule, flat_lengths, lengths_from_starts

SUMMARY, RULE = "summary.json", "rule.json"


def stated(precision: GatePrecision) -> dict[str, str]:
    """Return what records say of the precision of entropies; fp32 goes without saying, as in records of earlier versions."""
    return {} if precision == "fp32" else {"entropy_precision": precision}


def precision_in(record: Mapping[str, Any]) -> GatePrecision:
    """Return the precision of the entropies that something was made with, as its `made_by` or a model's meta states it."""
    found: GatePrecision = record.get("entropy_precision", "fp32")
    return found


@dataclass(frozen=True)
class MadeBy:
    """What entropies, patch lengths or a rule were made from, by digest: `made_by` in their files.

    tokens: of the token shards.
    entropy_model: of its weights.
    entropies: of the stored entropies; None in the files of these themselves.
    precision: of the entropy model's products.
    """

    tokens: str
    entropy_model: str
    entropies: str | None = None
    precision: GatePrecision = "fp32"

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> MadeBy:
        """Return the record that `to_json` gave. Raises KeyError, TypeError for what is none."""
        made_by = cls(found["tokens"], found["entropy_model"], found.get("entropies"), precision_in(found))
        if made_by.to_json() != found:
            raise TypeError("names something else than what maps are made by")
        return made_by

    def to_json(self) -> dict[str, str]:
        """Return the record as JSON data."""
        entropies = {} if self.entropies is None else {"entropies": self.entropies}
        return {"tokens": self.tokens, "entropy_model": self.entropy_model, **entropies, **stated(self.precision)}


@dataclass(frozen=True)
class MapsSummary:
    """What summary.json says of a folder of entropies or patch maps.

    files: SHA-256 of each, by name.
    digest: of `made_by` and `files`.
    facts: numbers about the content for readers, no part of its identity.
    """

    made_by: MadeBy
    files: dict[str, str]
    digest: str
    facts: dict[str, Any]


def parquet_name(shard_name: str) -> str:
    """Return the name of the Parquet file beside a shard."""
    return shard_name.removesuffix(".tar") + ".parquet"


def starts_name(split: str) -> str:
    """Return the name of the file that holds the boundaries of a split as bits."""
    return f"{split}.starts.npy"


def _expected(shards: TokenShards, part: slice) -> tuple[pa.Array, pa.Array]:
    """Return the key and the view of every map of the samples `part` of a shard, in order."""
    count = shards.meta.num_views
    keys = shards.keys().slice(part.start, part.stop - part.start).combine_chunks()
    index = pa.array(np.repeat(np.arange(len(keys)), count))
    return keys.take(index), pa.array(np.tile(np.arange(count, dtype=np.uint8), len(keys)))


def _check_order(table: pa.Table, keys: pa.Array, views: pa.Array, path: str, shard_name: str) -> None:
    """Raise ValueError, naming the first difference, unless the maps of a table are those of these keys and views."""
    mend = "run `dpar-cli data check --repair`, or `dvc repro -sf entropies`"
    if len(table) != len(keys):
        raise ValueError(f"{path} holds {len(table)} maps, {shard_name} has {len(keys)}: {mend}")
    found_keys, found_views = (table[name].combine_chunks() for name in ("key", "view"))
    other = pc.or_(pc.not_equal(found_keys, keys), pc.not_equal(found_views, views))
    row = pc.index(pc.fill_null(other, True), True).as_py()
    if row >= 0:
        raise ValueError(
            f"{path}: map {row} is of view {found_views[row]} of {found_keys[row]}, the index of {shard_name} has view "
            f"{views[row]} of {keys[row]} there: {mend}"
        )


def _write(
    path: Path, shards: TokenShards, part: slice, name: str, values: pa.Array, *, made_by: MadeBy, **encoding: Any
) -> None:
    keys, views = _expected(shards, part)
    table = pa.table({"key": keys, "view": views, name: values})
    metadata = {"dpar": json.dumps(made_by.to_json(), sort_keys=True)}
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd", **encoding)


def write_entropies(
    path: Path,
    shards: TokenShards,
    part: slice,
    entropies: np.ndarray,
    *,
    entropy_model: str,
    precision: GatePrecision = "fp32",
) -> None:
    """Write the entropies (samples * views, T) float32 of the samples `part` of a shard, whole or not at all.

    entropy_model: digest of the model.
    precision: what its products were computed in.
    """
    flat = pa.array(np.ascontiguousarray(entropies, dtype=np.float32).reshape(-1))
    values = pa.FixedSizeListArray.from_arrays(flat, entropies.shape[1])
    # The bytes of floats compress when those of equal place stand together; dictionaries of floats do not pay.
    encoding = {"use_dictionary": ["key"], "use_byte_stream_split": ["entropies.list.element"]}
    made_by = MadeBy(shards.digest, entropy_model, precision=precision)
    _write(path, shards, part, "entropies", values, made_by=made_by, **encoding)


def write_lengths(path: Path, shards: TokenShards, part: slice, starts: np.ndarray, *, made_by: MadeBy) -> None:
    """Write the patch lengths of boundaries (samples * views, T) bool of the samples `part` of a shard."""
    lengths, counts = flat_lengths(starts)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    values = pa.ListArray.from_arrays(pa.array(offsets), pa.array(lengths))
    _write(path, shards, part, "lengths", values, made_by=made_by)


def write_summary(folder: Path, files: Iterable[str], *, made_by: MadeBy, facts: dict[str, Any] | None = None) -> str:
    """Record the digests of a folder's files and of what made them; return the digest of the whole.

    facts: numbers about the content for readers, no part of its identity.
    """
    content = {"made_by": made_by.to_json(), "files": {name: sha256_file(folder / name) for name in sorted(files)}}
    digest = digest_of(content)
    whole = {**content, **({"facts": facts} if facts else {}), "digest": digest}
    write_json(folder / SUMMARY, {**whole, "seal": digest_of(whole)})
    return digest


def read_summary(folder: Path | Folder, *, stage: str) -> MapsSummary:
    """Read summary.json of a folder. Raises FileNotFoundError or ValueError that names the stage to run."""
    source = folder if isinstance(folder, Folder) else Folder(folder)
    content = source.read(SUMMARY)
    if content is None:
        raise FileNotFoundError(f"nothing whole in {folder}: run `dpar-cli run {stage}`")
    try:
        summary: dict[str, Any] = json.loads(content)
        made_by, files = MadeBy.read(summary["made_by"]), summary["files"]
        sound = digest_of({"made_by": made_by.to_json(), "files": files}) == summary["digest"] and seal_holds(summary)
        sound &= all(isinstance(one, str) for one in (*made_by.to_json().values(), *files.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{folder}/{SUMMARY} is damaged, or of an older version: run `dvc repro -sf {stage}`")
    return MapsSummary(made_by, files, summary["digest"], summary.get("facts", {}))


def _summary_of(folder: Folder, shards: TokenShards, *, stage: str) -> MapsSummary:
    """Read the summary of a folder that was made from these very shards. Raises ValueError for others."""
    summary = read_summary(folder, stage=stage)
    if summary.made_by.tokens != shards.digest:
        raise ValueError(
            f"{folder} was made with token shards {summary.made_by.tokens}, but {shards.folder} holds {shards.digest}: "
            f"run `dpar-cli run {stage}`"
        )
    return summary


@dataclass(frozen=True)
class EntropySample:
    """Some stored entropies.

    entropies: (n, T) float32.
    labels: (n,) int64, the class of each.
    whole: whether it is all.
    """

    entropies: np.ndarray
    labels: np.ndarray
    whole: bool


class EntropyMaps:
    """The stored entropies of one split, shard by shard. Raises ValueError when they belong to other shards."""

    def __init__(self, folder: Path | str, shards: TokenShards, *, cache: Path | None = None) -> None:
        self._source = Folder(folder, cache=cache)
        self.folder, self.shards = self._source.address, shards
        self.summary = _summary_of(self._source, shards, stage="entropies")
        self.made_by, self.digest = self.summary.made_by, self.summary.digest

    def maps_made_by(self) -> MadeBy:
        """Return what patch maps of these entropies are made by."""
        return replace(self.made_by, entropies=self.digest)

    def shard(self, shard_name: str) -> np.ndarray:
        """Return the entropies of a shard: (samples * views, T) float32, in the order of the shard.

        Raises FileNotFoundError or ValueError when they are missing, were made by another entropy model, or stand in
        another order than the samples.
        """
        name = parquet_name(shard_name)
        table = _read_parquet(self._source, name, self.summary, columns=["key", "view", "entropies"], stage="entropies")
        made_by = json.loads((table.schema.metadata or {}).get(b"dpar", b"{}"))
        if made_by != self.made_by.to_json():
            found, precision = made_by.get("entropy_model"), precision_in(made_by)
            raise ValueError(
                f"entropies {name} were made with entropy model {found} in {precision} on tokens {made_by.get('tokens')}, "
                f"this run has {self.made_by.entropy_model} in {self.made_by.precision} on {self.shards.digest}: "
                "run `dvc repro -sf entropies`"
            )
        part = next(part for found, part in self.shards.shards() if found == shard_name)
        keys, views = _expected(self.shards, part)
        _check_order(table, keys, views, f"{self._source}/{name}", shard_name)
        flat: np.ndarray = table["entropies"].combine_chunks().flatten().to_numpy()
        return flat.reshape(-1, self.shards.meta.tokens)

    def views_of(self, index: int) -> np.ndarray:
        """Return the entropies of all views of a sample, reading its shard only: (views, T) float32."""
        name, part = self.shards.shard_of(index)
        by_sample = self.shard(name).reshape(part.stop - part.start, self.shards.meta.num_views, -1)
        views: np.ndarray = by_sample[index - part.start]
        return views

    def all(self) -> np.ndarray:
        """Return all entropies of the split: (samples * views, T) float32."""
        return np.concatenate([self.shard(name) for name, _ in self.shards.shards()])

    def sample(self, limit: int, *, shards: int = 16) -> EntropySample:
        """Return at most `limit` maps, chosen at random in at most `shards` evenly spaced shards: always the same ones.

        Shards hold images in random order, so some of them stand for all. The views of an image follow each other: every
        20th map of ten-crop views would be of the same corner.
        """
        parts = self.shards.shards()
        chosen = [parts[number * len(parts) // min(shards, len(parts))] for number in range(min(shards, len(parts)))]
        views = self.shards.meta.num_views
        total = sum((part.stop - part.start) * views for _, part in chosen)
        taken = np.zeros(total, bool)
        taken[np.random.default_rng(0).permutation(total)[:limit]] = True
        entropies, labels, before = [], [], 0
        for name, part in chosen:
            count = (part.stop - part.start) * views
            keep = taken[before : before + count]
            before += count
            entropies.append(self.shard(name)[keep])
            labels.append(np.repeat(self.shards.labels[part], views)[keep].astype(np.int64))
        whole = len(chosen) == len(parts) and total <= limit
        return EntropySample(np.concatenate(entropies), np.concatenate(labels), whole)


def _read_parquet(source: Folder, name: str, summary: MapsSummary, *, columns: list[str], stage: str) -> pa.Table:
    if name not in summary.files:
        raise FileNotFoundError(f"{source} has no {name}: run `dvc repro -sf {stage}`")
    try:
        return pq.read_table(source.path(name, summary.files[name]), columns=columns, partitioning=None)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{source}/{name} is missing: run `dpar-cli data check --repair`, or `dvc repro -sf {stage}`"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{source}/{name} is damaged ({str(error).splitlines()[0]}): run `dpar-cli data check --repair`"
        ) from None


def read_rule(path: Path, *, entropy_model: str | None = None) -> PatchRule:
    """Return the rule that a patch_maps folder was made with, its threshold measured or given.

    entropy_model: digest of the model whose entropies the rule will cut; None: not compared. Raises FileNotFoundError,
    Damaged when the file is not what its digest says, ValueError when its threshold belongs to another entropy model.
    """
    record = read_record(path, way_out="run `dvc repro -sf patch_maps`")
    try:
        rule, made_with = PatchRule(**record["rule"]), record["made_by"].get("entropy_model")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no rule of this version ({error}): run `dvc repro -sf patch_maps`") from None
    if entropy_model is not None and rule.reads_entropies and made_with != entropy_model:
        raise ValueError(
            f"{path} was made with entropy model {made_with}, but this run has {entropy_model}: "
            "run `dpar-cli run patch_maps`"
        )
    return rule


def rule_precision(path: Path) -> GatePrecision:
    """Return the precision of the entropies that a rule of `write_rule` was made with. Raises as `read_rule`."""
    return precision_in(read_record(path, way_out="run `dvc repro -sf patch_maps`")["made_by"])


def write_rule(path: Path, rule: PatchRule, *, made_by: MadeBy, facts: dict[str, Any] | None = None) -> None:
    """Write a rule, the digests of what it was made with, and what was found with it (facts), as a record with a digest."""
    write_record(path, {"rule": asdict(rule), "made_by": made_by.to_json(), **(facts or {})})


class PatchMaps:
    """Random access to the patch lengths of one split; boundaries stay where they are, as bits.

    Map i belongs to sample i of the shards: both digests are compared, so their order is the same. Raises
    FileNotFoundError or ValueError, saying what to run, when the maps are missing, damaged, of other shards, or (where
    `entropy_model` is given) of another entropy model.
    """

    def __init__(
        self, folder: Path | str, shards: TokenShards, *, entropy_model: str | None = None, cache: Path | None = None
    ) -> None:
        self._source = Folder(folder, cache=cache)
        self.folder, self.shards = self._source.address, shards
        self.summary = _summary_of(self._source, shards, stage="patch_maps")
        self.made_by, self.digest, files = self.summary.made_by, self.summary.digest, self.summary.files
        if entropy_model is not None and entropy_model != self.made_by.entropy_model:
            raise ValueError(
                f"patch maps in {self._source} were made with entropy model {self.made_by.entropy_model}, this run has "
                f"{entropy_model}: run `dpar-cli run patch_maps`"
            )
        name = starts_name(shards.split)
        if not {RULE, name} <= files.keys():
            raise ValueError(f"{self._source} has no maps of the {shards.split} images: run `dvc repro -sf patch_maps`")
        self.rule = read_rule(self._source.path(RULE, files[RULE]))
        self._path = self._source.path(name, files[name])
        header = np.load(self._path, mmap_mode="r", allow_pickle=False)
        expected = (len(shards), shards.meta.num_views, -(-shards.meta.tokens // 8))
        if header.shape != expected or header.dtype != np.uint8 or not header.flags.c_contiguous:
            raise ValueError(
                f"{self._source}/{name} holds maps of shape {header.shape}, expected {expected}: "
                "run `dvc repro -sf patch_maps`"
            )
        self._offset = header.offset
        self._open = OpenFiles()

    def starts(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return which tokens begin a patch: (n, T) bool, for indices (n,) and views (n,). Raises IndexError, OSError."""
        meta = self.shards.meta
        indices, views = np.asarray(indices, dtype=np.int64), np.asarray(views, dtype=np.int64)
        inside = (indices >= 0) & (indices < len(self.shards)) & (views >= 0) & (views < meta.num_views)
        if not inside.all():
            raise IndexError(f"maps of {len(self.shards)} samples with {meta.num_views} views: asked for one beyond")
        size = -(-meta.tokens // 8)
        bits = np.empty((len(indices), size), np.uint8)
        content = memoryview(bits).cast("B") if len(bits) else memoryview(b"")
        file = self._open.get(0, lambda: self._path)
        for row, offset in enumerate(((indices * meta.num_views + views) * size + self._offset).tolist()):
            if os.preadv(file.descriptor, [content[row * size : (row + 1) * size]], offset) != size:
                raise OSError(f"{self._path} was cut off while it was read: run `dvc repro -sf patch_maps`")
        return np.unpackbits(bits, axis=1, count=meta.tokens).astype(bool)

    def lengths(self, indices: np.ndarray, views: np.ndarray) -> list[np.ndarray]:
        """Return the patch lengths of each map asked for: n arrays (M,) uint16 that sum to T."""
        return lengths_from_starts(self.starts(indices, views))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "shards": self.shards, "cache": self._source.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PatchMaps.__init__(self, state["folder"], state["shards"], cache=state["cache"])


def pack_starts(starts: np.ndarray, *, views: int) -> np.ndarray:
    """Turn boundaries (samples * views, T) bool into bits (samples, views, ceil(T / 8)) uint8."""
    return np.packbits(starts, axis=1).reshape(-1, views, -(-starts.shape[1] // 8))


def join_starts(path: Path, parts: Iterable[Path], *, maps: tuple[int, int, int]) -> None:
    """Write the bits of many shards, each (samples, views, bytes) uint8 in an npy file, as one file of shape `maps`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(npy_header(maps, "|u1"))
        written = 0
        for part in parts:
            bits = np.load(part, allow_pickle=False)
            written += len(bits)
            stream.write(bits.tobytes())
        assert written == maps[0], f"{written} samples written, {maps[0]} expected"
