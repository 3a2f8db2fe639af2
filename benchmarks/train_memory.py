"""Memory of training: it grows with the batch, not with the data set.

    python benchmarks/train_memory.py [--large 100000]

Trains DPAR (width 256, 1 + 3 + 2 layers, 16 x 16 tokens, V = 1024, bf16) for three steps in a fresh process for every
row, on shards made here, and prints the peak resident memory above what the process held after its imports. The last
columns are with activation checkpointing, and what `dpar-cli cost` expects of weights, AdamW and activations.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dpar_core.data.shards import TokenMeta, TokenSample, TokenShards, write_index, write_shard
from dpar_core.files import atomic_folder
from dpar_core.models.dpar import DPARConfig
from dpar_core.models.memory import RUNTIME, training_memory
from dpar_core.patches.maps import RULE, MadeBy, pack_starts, write_rule, write_summary
from dpar_core.patches.rule import PatchRule, patch_starts_numpy
from dpar_core.training.parallel import Ranks
from stages.params import load_params, settled
from stages.shared.jobs import TrainJob, train_job

ROOT = Path(__file__).resolve().parents[1]
GRID, CODES = 16, 1024


def make_data(folder: Path, images: int) -> None:
    """Write shards of `images` random images with two views, and patch maps of 1.8 tokens per patch."""
    random = np.random.default_rng(0)
    meta = TokenMeta(GRID, CODES, "adm_center_flip", 2, 256, ("a", "b"), "t" * 16, "m" * 16)
    (folder / "tokens").mkdir(parents=True)
    shards = []
    for split, count in (("train", images), ("validation", 100)):
        for number, first in enumerate(range(0, count, 10_000)):
            part = range(first, min(first + 10_000, count))
            tokens = random.integers(0, CODES, (len(part), 2, GRID**2), dtype=np.uint16)
            name = f"{split}-{number:06d}.tar"
            write_shard(
                folder / "tokens" / name,
                (TokenSample(f"{split}{i:08d}", i % 2, row, {}) for i, row in zip(part, tokens)),
            )
            shards.append((name, split))
    write_index(folder / "tokens", meta, shards)
    rule = PatchRule("entropy_rows", GRID, 0.63, 4)
    with atomic_folder(folder / "maps") as place:
        for split in ("train", "validation"):
            held = TokenShards(folder / "tokens", split)
            starts = [
                pack_starts(patch_starts_numpy(random.random((2 * n, GRID**2), dtype=np.float32), rule), views=2)
                for n in [min(10_000, len(held) - first) for first in range(0, len(held), 10_000)]
            ]
            np.save(place / f"{split}.starts.npy", np.concatenate(starts))
        made_by = MadeBy(held.digest, "e" * 16, "e" * 16)
        write_rule(place / RULE, rule, made_by=made_by)
        write_summary(place, [RULE, "train.starts.npy", "validation.starts.npy"], made_by=made_by)


class Silent:
    def begin(self, step): ...

    def log(self, step, metrics): ...

    def checkpoint(self, step, address): ...


def make_job(data: Path, batch: int, checkpointing: bool) -> TrainJob:
    config = DPARConfig(CODES, GRID, 256, 4, 1, 3, 2, num_classes=2, dropout=0.1, class_dropout=0.1)
    training = settled(load_params(ROOT / "params" / "demo.yaml"), "cpu").train.model_copy(
        update={
            "steps": 3,
            "batch_size": batch,
            "validate_every": 3,
            "checkpoint_every": 3,
            "validation_images": batch,
            "activation_checkpointing": checkpointing,
            "workers": 1,
            "accumulate": 1,
        }
    )
    return TrainJob("dpar", config, training, 0, data / "tokens", data / "maps")


def one_row(data: Path, batch: int, checkpointing: bool) -> None:
    """Train in this process and print its memory in MB: after imports, and at most."""

    def status(name: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1e3

    torch.set_num_threads(1)
    before = status("VmRSS")
    with tempfile.TemporaryDirectory() as root:
        train_job(make_job(data, batch, checkpointing), root, ranks=Ranks(), hooks=Silent())
    print("ROW", json.dumps([before, status("VmHWM")]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=100_000, help="images of the large data set")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        data, batch, checkpointing = arguments.row
        one_row(Path(data), int(batch), checkpointing == "True")
        return
    small, large = 2_000, arguments.large
    grown = {}
    print(
        f"python benchmarks/train_memory.py: torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.processor() or platform.machine()}; peak MB above imports, fresh processes"
    )
    print(f"{'batch':>6}{f'{small:,} images':>18}{f'{large:,} images':>18}{'checkpointing':>16}{'cost expects':>15}")
    with tempfile.TemporaryDirectory() as temporary:
        for images in (small, large):
            make_data(Path(temporary) / str(images), images)
        for batch in (4, 8, 16, 32):
            row = []
            for images, checkpointing in ((small, False), (large, False), (small, True)):
                command = [sys.executable, __file__, "--row", f"{temporary}/{images}", str(batch), str(checkpointing)]
                environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
                output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
                before, most = json.loads(next(line for line in output.splitlines() if line.startswith("ROW"))[4:])
                row.append(most - before)
            job = make_job(Path(temporary), batch, False)
            patches = GRID**2 / 1.81
            estimate = training_memory(job.config, patches, bf16=job.training.precision != "fp32")
            expected = (estimate.total(batch) - RUNTIME) / 1e6
            grown[batch] = row
            print(f"{batch:>6}{row[0]:>18.0f}{row[1]:>18.0f}{row[2]:>16.0f}{expected:>15.0f}", flush=True)
    by_batch = (grown[32][0] - grown[4][0]) / 28
    by_data = max(abs(row[1] - row[0]) for row in grown.values())
    print(f"an image more in the batch: {by_batch:.1f} MB; {large - small:,} images more in the data set: {by_data:.0f} MB")
    result = {
        "mb_an_image_of_the_batch": round(by_batch, 2),
        "mb_of_data_set_growth": round(by_data, 1),
        "data_set_growth": large - small,
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
