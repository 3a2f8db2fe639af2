"""Images/s of the tokenizing stage, from files to shards, against the bare encoder on ready tensors of the same batch.

    python benchmarks/tokenize_images.py [--shape demo|vq16] [--images 600] [--repeats 3]

Makes a folder of JPEG files and a tokenizer with random weights of that shape. The stage decodes, cuts both views, encodes
and writes shards with digests and index; the bare encoder sees nothing but full batches in memory. They take turns, medians
are shown. Decoding shares the cores with the encoder on a CPU: its own time on one core is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpar_core.files import save_weights
from dpar_core.images import VIEW_COUNTS, views
from dpar_core.manifest import read_manifest
from dpar_core.tokenizer import VQ, VQConfig
from stages import data, tokenize_images
from stages import params as P
from stages.tracker import NullTracker

ROOT = Path(__file__).resolve().parents[1]
# tokenizer, pixels of the cropped image, sides of the JPEG files, views a batch, VQ images at once
SHAPES = {
    "demo": (VQConfig(512, 8, 32, (1, 2, 2), 64, 1, norm_groups=8), 32, (40, 56), 64),
    "vq16": (VQConfig(16384, 8, 128, (1, 1, 2, 2, 4), 256, 2), 256, (375, 500), 8),
}
VIEWS = "adm_center_flip"


def make_images(folder: Path, count: int, sides: tuple[int, int]) -> None:
    """Write JPEG files of two classes whose content compresses like a photograph's."""
    rng = np.random.default_rng(0)
    for number in range(count + 8):
        split = "train" if number < count else "validation"
        rough = rng.integers(0, 256, (sides[0] // 8 + 1, sides[1] // 8 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(rough).resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
        place = folder / split / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number:05d}.jpg", quality=92)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    config, size, sides, batch = SHAPES[options.shape]
    params = P.load_params(ROOT / "params" / "smoke.yaml")
    tracker = NullTracker()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_images(place / "images", options.images, sides)
        section = params.data.model_copy(update={
            "source": "imagefolder", "train": str(place / "images" / "train"),
            "validation": str(place / "images" / "validation"), "image_size": size, "views": VIEWS,
        })  # fmt: skip
        made = data.Outputs(place / "manifest.parquet", place / "data.json")
        (place / "work").mkdir()
        data.run(data.Params(params.seed, section), data.Inputs(), made, tracker, device="cpu", work=place / "work")
        torch.manual_seed(0)
        save_weights(place / "vq.safetensors", VQ(config).state_dict(), kind="vq", config=asdict(config), meta={})
        settings = params.tokenize_images.model_copy(update={"shard_images": 200, "batch_size": batch, "precision": "fp32"})
        stage = tokenize_images.Params(section, settings)
        inputs = tokenize_images.Inputs(place / "manifest.parquet", place / "vq.safetensors")
        rows = read_manifest(inputs.manifest).rows
        total = len(rows)
        worker = tokenize_images.ShardTokenizer(inputs, stage, place / "work", options.device, place, threads)
        ready = np.concatenate([views(worker.opener(row), size, VIEWS) for row in rows.take(np.arange(min(total, batch)))])
        ready = ready[:batch]
        started = time.perf_counter()
        for row in rows.take(np.arange(min(total, 100))):
            views(worker.opener(row), size, VIEWS)
        decode = min(total, 100) / (time.perf_counter() - started)
        worker.encode(ready)
        pipeline, bare = [], []
        for repeat in range(options.repeats):
            work = place / f"work{repeat}"
            work.mkdir()
            outputs = tokenize_images.Outputs(place / f"tokens{repeat}", place / f"tokens{repeat}.json")
            started = time.perf_counter()
            tokenize_images.run(stage, inputs, outputs, tracker, device=options.device, work=work)
            pipeline.append(total / (time.perf_counter() - started))
            batches = max(round(total * VIEW_COUNTS[VIEWS] / batch), 1)
            started = time.perf_counter()
            for _ in range(batches):
                tokens = worker.encode(ready)
            tokens.cpu()
            bare.append(batches * batch / VIEW_COUNTS[VIEWS] / (time.perf_counter() - started))
    end_to_end, encode = statistics.median(pipeline), statistics.median(bare)
    print(f"{options.shape}, {total} JPEG files of {sides[1]} x {sides[0]}, {batch} views a batch, {threads} threads")
    print(f"  stage          {end_to_end:9.2f} images/s (both views, decoding, shards, digests, index)")
    print(f"  bare encoder   {encode:9.2f} images/s")
    print(f"  decoding alone {decode:9.2f} images/s on one core")
    bound = 1 / (1 + encode / (decode * threads))
    print(f"  efficiency {end_to_end / encode:.3f}; where decoding takes the encoder's cores: at most {bound:.3f}")
    print("RESULT " + json.dumps({
        "shape": options.shape, "pipeline_images_per_s": end_to_end, "encode_images_per_s": encode,
        "efficiency": end_to_end / encode, "decode_images_per_s_core": decode,
        "shared_cores_bound": bound,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
