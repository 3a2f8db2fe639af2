"""The time of `dpar-cli patches stats` on data of ImageNet's size: 20 views per image, shards of 5,000 images.

    python -m benchmarks.patch_stats [--views 20] [--repeats 3]

The command reads at most 16 shards, evenly spaced, however many there are, so 16 made shards stand for the 256 of ImageNet
(2.5 GB on disk). The baseline is reading the same Parquet files with pyarrow alone. "First" includes holding every file
against its digest, which happens once per machine. Files are in memory from being written; a disk adds its own time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.loader import SHARD, TOKENS, make
from dpar_core.data.shards import TokenShards
from dpar_core.patches.maps import MadeBy, parquet_name, write_entropies, write_summary
from stages.tools.patch_stats import patch_stats

SHARDS = 16
THRESHOLDS, MAX_LENGTHS = (7.6, 7.7, 7.8, 7.9, 8.0, 8.1), (1, 2, 4, 8)


def make_entropies(folder: Path, tokens: Path, views: int) -> Path:
    """Write made entropies of all shards; return their folder."""
    shards, rng = TokenShards(tokens, "train"), np.random.default_rng(0)
    folder.mkdir()
    for name, part in shards.shards():
        count = (part.stop - part.start) * views
        values = (7.8 + rng.standard_normal((count, TOKENS), dtype=np.float32)).astype(np.float32)
        values[:, 0] = np.nan
        write_entropies(folder / parquet_name(name), shards, part, values, entropy_model="made")
    files = [parquet_name(name) for name, _ in shards.shards()]
    write_summary(folder, files, made_by=MadeBy(shards.digest, "made"))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--views", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="patch-stats-") as place:
        os.environ["DPAR_CACHE"] = f"{place}/cache"
        tokens, _ = make(Path(place) / "data", SHARDS * SHARD, options.views)
        entropies = make_entropies(Path(place) / "entropies", tokens, options.views)
        seconds, bare = [], []
        for _ in range(options.repeats + 1):
            started = time.perf_counter()
            stats = patch_stats(tokens, entropies, thresholds=THRESHOLDS, max_lengths=MAX_LENGTHS)
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            for file in sorted(entropies.glob("*.parquet")):
                pq.read_table(file, columns=["key", "view", "entropies"])
            bare.append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in entropies.glob("*.parquet"))
    again, baseline = statistics.median(seconds[1:]), statistics.median(bare)
    print(
        f"{len(stats.cells)} rules on {stats.maps:,} of {SHARDS * SHARD * options.views:,} views of {SHARDS} shards, "
        f"{size / 1e9:.2f} GB: first {seconds[0]:.1f} s, again {again:.1f} s; reading alone {baseline:.1f} s"
    )
    found = {
        "views": options.views,
        "first_seconds": seconds[0],
        "seconds": again,
        "read_seconds": baseline,
        "ratio": again / baseline,
    }
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
