"""Random reading of a made data set of ImageNet's size: opening, memory, samples/s, and the share of what `cat` reads.

    python benchmarks/loader.py [--samples 1280000] [--views 2] [--keep FOLDER]

Makes shards of 256 random tokens per view and their patch maps (5 GB on disk at full size, a few minutes), and a set of
10,000 samples to compare with. Opening and reading are measured in processes of their own. `cat FILES > /dev/null` and the
reader take turns; both have read everything they are timed on once before, so they find it in memory (warm cache): what is
compared is the reader, not the disk. The share of cat is of the bytes really read: of a sample the tokens of one view and
its map.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dpar_core.data.shards import TokenMeta, TokenSample, TokenShards, write_index, write_shard
from dpar_core.models.dpar import DPARConfig
from dpar_core.models.flops import PUBLISHED_PEAKS, dpar_forward_flops, training_flops
from dpar_core.patches.maps import MadeBy, starts_name, write_lengths, write_rule, write_summary
from dpar_core.patches.rule import PatchRule

CODES, GRID, CLASSES, SHARD = 16384, 16, 1000, 5000
TOKENS = GRID * GRID
UTILISATION, MEAN_LENGTH = 0.4, 1.81  # share of the peak that good training code reaches; tokens per patch as published
READER = """
import json, os, sys, time
import numpy as np, psutil
from dpar_core.patches.maps import PatchMaps
from dpar_core.data.shards import TokenShards
folder, maps, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = psutil.Process().memory_info().rss
started = time.perf_counter()
shards = TokenShards(folder, "train")
opened = time.perf_counter() - started
lengths = PatchMaps(maps, shards)
maps_opened = time.perf_counter() - started - opened
rng = np.random.default_rng(0)
order = rng.permutation(len(shards))[:count]
views = rng.integers(0, shards.meta.num_views, len(order))
seconds = []
for repeat in range(2):
    started = time.perf_counter()
    for first in range(0, len(order), 256):
        part, seen = order[first:first + 256], views[first:first + 256]
        shards.tokens(part, seen)
        lengths.lengths(part, seen)
        shards.labels[part]
    seconds.append(time.perf_counter() - started)
print(json.dumps({"opened": opened, "maps_opened": maps_opened, "first_per_s": len(order) / seconds[0],
                  "per_s": len(order) / seconds[1],
                  "grown": psutil.Process().memory_info().rss - before}))
"""


def make(folder: Path, samples: int, views: int) -> tuple[Path, Path]:
    """Write shards and patch maps of random content; return their folders."""
    tokens, maps = folder / "tokens", folder / "patch_maps"
    tokens.mkdir(parents=True)
    maps.mkdir()
    rng = np.random.default_rng(0)
    meta = TokenMeta(GRID, CODES, "adm_center_flip", views, 256, tuple(f"n{i:08d}" for i in range(CLASSES)), "made", "made")
    names, contents, began = [], [], time.monotonic()
    for number, first in enumerate(range(0, samples, SHARD)):
        count = min(SHARD, samples - first)
        codes = rng.integers(0, CODES, (count, views, TOKENS), dtype=np.uint16)
        made = (
            TokenSample(
                f"train-{first + i:09d}", (first + i) % CLASSES, codes[i], {"source": f"n{i % CLASSES:08d}/{first + i}.JPEG"}
            )
            for i in range(count)
        )
        name = f"train-{number:06d}.tar"
        contents.append(write_shard(tokens / name, made))
        names.append((name, "train"))
        if time.monotonic() - began > 10:
            began = time.monotonic()
            print(f"  made {first + count:,} of {samples:,} samples", file=sys.stderr, flush=True)
    write_index(tokens, meta, names, contents=contents)
    shards = TokenShards(tokens, "train")
    gates = rng.random((samples, views, TOKENS), dtype=np.float32) < 0.5
    gates[:, :, ::GRID] = True
    np.save(maps / starts_name("train"), np.packbits(gates, axis=2))
    made_by = MadeBy(shards.digest, "made", "made")
    write_rule(maps / "rule.json", PatchRule("entropy_rows", GRID, 7.8, None), made_by=made_by)
    part = slice(0, min(SHARD, samples))
    write_lengths(maps / "train-000000.parquet", shards, part, gates[part].reshape(-1, TOKENS), made_by=made_by)
    write_summary(maps, ["rule.json", starts_name("train"), "train-000000.parquet"], made_by=made_by)
    return tokens, maps


def read(tokens: Path, maps: Path, count: int) -> dict[str, float]:
    """Read in a process of its own."""
    words = [sys.executable, "-c", READER, str(tokens), str(maps), str(count)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def cat(files: list[Path]) -> float:
    """Return the bytes per second of `cat FILES > /dev/null`."""
    started = time.perf_counter()
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)
    return sum(file.stat().st_size for file in files) / (time.perf_counter() - started)


def training_flops_of_image() -> float:
    """Return the FLOPs that training DPAR-B takes for an image, by dpar_core/models/flops.py."""
    return training_flops(dpar_forward_flops(DPARConfig(CODES, GRID, 768, 12, 1, 8, 3, CLASSES), TOKENS / MEAN_LENGTH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=1_280_000)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--read", type=int, default=200_000, help="samples read in random order")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder that the made data stays in and is taken from")
    options = parser.parse_args()
    place = options.keep or Path(tempfile.mkdtemp(prefix="loader-"))
    try:
        folders = []
        for name, count in (("large", options.samples), ("small", 10_000)):
            made = place / name
            if not (made / "patch_maps" / "summary.json").exists():
                shutil.rmtree(made, ignore_errors=True)
                make(made, count, options.views)
            folders.append((made / "tokens", made / "patch_maps"))
        (tokens, maps), (few, few_maps) = folders
        files = [*sorted(tokens.glob("*.tar")), maps / starts_name("train")]
        cat(files)
        speeds, reads = [], []
        for _ in range(options.repeats):
            speeds.append(cat(files))
            reads.append(read(tokens, maps, options.read))
        small = read(few, few_maps, 10_000)
        speed, large = statistics.median(speeds), {name: statistics.median(one[name] for one in reads) for name in reads[0]}
        shard_bytes = sum(file.stat().st_size for file in tokens.iterdir()) / options.samples
        map_bytes = files[-1].stat().st_size / options.samples
        parquet = (maps / "train-000000.parquet").stat().st_size / min(SHARD, options.samples)
        least, read_bytes = options.views * TOKENS * np.log2(CODES) / 8, 2 * TOKENS + -(-TOKENS // 8)
        flops, peak = training_flops_of_image(), PUBLISHED_PEAKS["H200"]
        needed = UTILISATION * peak / flops
        found = {
            "samples": options.samples,
            "index_seconds": large["opened"],
            "maps_seconds": large["maps_opened"],
            "memory_growth_mb": (large["grown"] - small["grown"]) / 1e6,
            "samples_per_s": large["per_s"],
            "samples_per_s_first_pass": large["first_per_s"],
            "read_bytes_per_sample": read_bytes,
            "share_of_cat": large["per_s"] * read_bytes / speed,
            "cat_gb_per_s": speed / 1e9,
            "h200_images_per_s": needed,
            "times_h200": large["per_s"] / needed,
            "shard_bytes_per_sample": shard_bytes,
            "uint16_bytes_per_sample": 2 * options.views * TOKENS,
            "least_bytes_per_sample": least,
            "map_bytes_per_sample": map_bytes,
            "map_parquet_bytes_per_sample": parquet,
            "least_map_bytes_per_sample": options.views * (TOKENS - 1) / 8,
        }
        print(
            f"medians of {options.repeats} repeats of {options.read:,} samples, warm cache; training DPAR-B takes "
            f"{flops / 1e9:.1f} GFLOP per image of {TOKENS} tokens at {MEAN_LENGTH} per patch, so an H200 trains "
            f"{UTILISATION} x {peak / 1e12:.0f}e12 / {flops / 1e9:.1f}e9 = {needed:,.0f} images/s"
        )
        for name, value in found.items():
            print(f"{name:30} {value:14,.3f}")
        print("RESULT " + json.dumps(found))
    finally:
        if options.keep is None:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
