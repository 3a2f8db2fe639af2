"""Entropies and patch lengths of every view, in Parquet beside the shards they belong to.

entropies/: {shard}.parquet with key, view, entropies (fixed list of T float32 nats, entry 0 nan).
patch_maps/: {shard}.parquet with key, view, lengths (list of uint16), rule.json, and for training at random
{split}.starts.npy: the same boundaries as bits, (samples, views, ceil(T / 8)) uint8, memory-mapped.
Both folders have a summary.json with the digests of what made them; readers refuse what does not belong together.

Shapes: n maps asked for, T tokens of a view.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpar_core.files import atomic_path, digest_of, sha256_file, write_json
from dpar_core.patching import PatchRule, lengths_from_starts
from dpar_core.shards import TokenShards

SUMMARY, RULE = "summary.json", "rule.json"


def parquet_name(shard_name: str) -> str:
    """Return the name of the Parquet file beside a shard."""
    return shard_name.removesuffix(".tar") + ".parquet"


def _write(path: Path, shards: TokenShards, part: slice, name: str, values: pa.Array, *, made_by: dict) -> None:
    views = shards.meta.num_views
    keys = shards.keys().slice(part.start, part.stop - part.start).combine_chunks()
    index = pa.array(np.repeat(np.arange(len(keys)), views))
    view = pa.array(np.tile(np.arange(views, dtype=np.uint8), len(keys)))
    table = pa.table({"key": keys.take(index), "view": view, name: values})
    metadata = {"dpar": json.dumps({"tokens": shards.digest, **made_by}, sort_keys=True)}
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")


def write_entropies(path: Path, shards: TokenShards, part: slice, entropies: np.ndarray, *, entropy_model: str) -> None:
    """Write the entropies (samples * views, T) float32 of the samples `part` of a shard, whole or not at all."""
    flat = pa.array(np.ascontiguousarray(entropies, dtype=np.float32).reshape(-1))
    values = pa.FixedSizeListArray.from_arrays(flat, entropies.shape[1])
    _write(path, shards, part, "entropies", values, made_by={"entropy_model": entropy_model})


def write_lengths(path: Path, shards: TokenShards, part: slice, starts: np.ndarray, *, made_by: dict) -> None:
    """Write the patch lengths of boundaries (samples * views, T) bool of the samples `part` of a shard."""
    lengths = lengths_from_starts(starts)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in lengths])]).astype(np.int32)
    values = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(lengths), type=pa.uint16()))
    _write(path, shards, part, "lengths", values, made_by=made_by)


def write_summary(folder: Path, files: Iterable[str], *, made_by: dict) -> str:
    """Record the digests of a folder's files and of what made them; return the digest of the whole."""
    content = {"made_by": made_by, "files": {name: sha256_file(folder / name) for name in sorted(files)}}
    digest = digest_of(content)
    write_json(folder / SUMMARY, {**content, "digest": digest})
    return digest


def read_summary(folder: Path, *, stage: str) -> dict:
    """Return summary.json of a folder. Raises FileNotFoundError that names the stage to run."""
    if not (folder / SUMMARY).exists():
        raise FileNotFoundError(f"nothing whole in {folder}: run `dvc repro {stage}`")
    return json.loads((folder / SUMMARY).read_text())


def check_tokens(summary: dict, shards: TokenShards, folder: Path, *, stage: str) -> None:
    """Raise ValueError unless the folder was made from these very shards."""
    found = summary["made_by"]["tokens"]
    if found != shards.digest:
        raise ValueError(
            f"{folder} was made with token shards {found}, but {shards.folder} holds {shards.digest}: "
            f"run `dvc repro {stage}`"
        )


class EntropyMaps:
    """The stored entropies of one split, shard by shard. Raises ValueError when they belong to other shards."""

    def __init__(self, folder: Path | str, shards: TokenShards) -> None:
        self.folder, self.shards = Path(folder), shards
        self.summary = read_summary(self.folder, stage="entropies")
        check_tokens(self.summary, shards, self.folder, stage="entropies")
        self.entropy_model: str = self.summary["made_by"]["entropy_model"]
        self.digest: str = self.summary["digest"]

    def shard(self, shard_name: str) -> np.ndarray:
        """Return the entropies of a shard: (samples * views, T) float32, in the order of the shard."""
        table = pq.read_table(self.folder / parquet_name(shard_name), columns=["entropies"])
        flat = table["entropies"].combine_chunks().flatten().to_numpy()
        return flat.reshape(-1, self.shards.meta.tokens)

    def all(self) -> np.ndarray:
        """Return all entropies of the split: (samples * views, T) float32."""
        return np.concatenate([self.shard(name) for name, _ in self.shards.shards()])


def read_rule(path: Path) -> PatchRule:
    """Return the rule that a patch_maps folder was made with, its threshold measured or given."""
    if not path.exists():
        raise FileNotFoundError(f"no patch rule at {path}: run `dvc repro patch_maps`")
    return PatchRule(**json.loads(path.read_text())["rule"])


def write_rule(path: Path, rule: PatchRule, *, made_by: dict) -> None:
    """Write a rule and the digests of what it was made with."""
    write_json(path, {"rule": asdict(rule), "made_by": made_by})


class PatchMaps:
    """Random access to the patch lengths of one split; boundaries stay on disk as memory-mapped bits.

    Raises FileNotFoundError or ValueError, saying what to run, when the maps are missing, of other shards, or (where
    `entropy_model` is given) of another entropy model.
    """

    def __init__(self, folder: Path | str, shards: TokenShards, *, entropy_model: str | None = None) -> None:
        self.folder, self.shards = Path(folder), shards
        summary = read_summary(self.folder, stage="patch_maps")
        check_tokens(summary, shards, self.folder, stage="patch_maps")
        self.digest: str = summary["digest"]
        self.entropy_model_digest: str = summary["made_by"]["entropy_model"]
        if entropy_model is not None and entropy_model != self.entropy_model_digest:
            raise ValueError(
                f"patch maps in {self.folder} were made with entropy model {self.entropy_model_digest}, this run has "
                f"{entropy_model}: run `dvc repro patch_maps`"
            )
        self.rule = read_rule(self.folder / RULE)
        self._starts = np.load(self.folder / f"{shards.split}.starts.npy", mmap_mode="r", allow_pickle=False)
        expected = (len(shards), shards.meta.num_views, -(-shards.meta.tokens // 8))
        if self._starts.shape != expected:
            found = self._starts.shape
            raise ValueError(f"{self.folder} holds maps of shape {found}, expected {expected}: run `dvc repro patch_maps`")

    def starts(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return which tokens begin a patch: (n, T) bool, for indices (n,) and views (n,)."""
        bits = np.unpackbits(self._starts[indices, views], axis=1, count=self.shards.meta.tokens)
        return bits.astype(bool)

    def lengths(self, indices: np.ndarray, views: np.ndarray) -> list[np.ndarray]:
        """Return the patch lengths of each map asked for: n arrays (M,) uint16 that sum to T."""
        return lengths_from_starts(self.starts(indices, views))

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "shards": self.shards}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["folder"], state["shards"])


def pack_starts(starts: np.ndarray, *, views: int) -> np.ndarray:
    """Turn boundaries (samples * views, T) bool into bits (samples, views, ceil(T / 8)) uint8."""
    return np.packbits(starts, axis=1).reshape(-1, views, -(-starts.shape[1] // 8))
