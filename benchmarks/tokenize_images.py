"""Images/s of the tokenizing stage, from files to shards, against the bare encoder on ready tensors of the same batch.

    python benchmarks/tokenize_images.py [--shape demo|vq16|gpu] [--images N] [--repeats 3] [--precision tf32]

Makes a folder of JPEG files and a tokenizer with random weights of that shape. The stage reads the manifest and the weights,
decodes, cuts both views, encodes and writes shards with digests and index; bare is `encode` on full batches of float tensors
that lie ready on the device. They take turns, medians are shown. The stage encodes full batches too, so what a shard's last
batch lacks is lost: the share of slots filled is printed, as is how fast one core decodes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from dpar_core.choices import EncodePrecision
from dpar_core.data.images import VIEW_COUNTS, views
from dpar_core.data.manifest import read_manifest
from dpar_core.files import save_weights
from dpar_core.models.vq import VQ, VQConfig, encode_at, to_float
from dpar_core.system import cpus
from stages import data, tokenize_images
from stages import params as P
from stages.tracker import NullTracker

ROOT = Path(__file__).resolve().parents[1]
VIEWS = "adm_center_flip"


@dataclass(frozen=True)
class Shape:
    """A tokenizer and what it is fed. pixels: of a view; sides: of the JPEG files; batch: views; shard, images: images."""

    tokenizer: VQConfig
    pixels: int
    sides: tuple[int, int]
    batch: int
    shard: int
    images: int


SHAPES = {
    "demo": Shape(
        VQConfig(512, 8, 32, (1, 2, 2), 64, 1, norm_groups=8), 32, (90, 120), 64, 500, 4000
    ),  # as params/demo.yaml
    "vq16": Shape(VQConfig(16384, 8, 128, (1, 1, 2, 2, 4), 256, 2), 256, (375, 500), 8, 5000, 32),
    "gpu": Shape(VQConfig(16384, 8, 128, (1, 1, 2, 2, 4), 256, 2), 256, (375, 500), 160, 5000, 2400),  # as the paper presets
}


def make_images(folder: Path, count: int, validation: int, sides: tuple[int, int]) -> None:
    """Write JPEG files of two classes whose content compresses like a photograph's."""
    rng = np.random.default_rng(0)
    for number in range(count + validation):
        split = "train" if number < count else "validation"
        rough = rng.integers(0, 256, (sides[0] // 8 + 1, sides[1] // 8 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(rough).resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
        place = folder / split / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number:05d}.jpg", quality=92)


def bare_images_per_s(model: VQ, ready: torch.Tensor, batches: int, precision: EncodePrecision) -> float:
    """Encode a batch of float tensors again and again; return images/s."""
    started = time.perf_counter()
    for _ in range(batches):
        codes = encode_at(model, ready, precision)
    codes.cpu()
    return batches * len(ready) / VIEW_COUNTS[VIEWS] / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--images", type=int, help="training images (default: some seconds' work)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=get_args(EncodePrecision), default="fp32")
    options = parser.parse_args()
    threads = cpus()
    torch.set_num_threads(threads)
    shape = SHAPES[options.shape]
    per_batch = shape.batch // VIEW_COUNTS[VIEWS]  # images
    images = options.images or shape.images
    params = P.load_params(ROOT / "params" / "smoke.yaml")
    tracker = NullTracker()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_images(place / "images", images, per_batch, shape.sides)
        section = params.data.model_copy(
            update={
                "source": "imagefolder",
                "train": str(place / "images" / "train"),
                "validation": str(place / "images" / "validation"),
                "image_size": shape.pixels,
                "views": VIEWS,
            }
        )
        made = data.Outputs(place / "manifest.parquet", place / "data.json")
        (place / "work").mkdir()
        inputs = data.Inputs(place / "images.json")
        data.run(data.Params(params.seed, section), inputs, made, tracker, device="cpu", work=place / "work")
        torch.manual_seed(0)
        config = asdict(shape.tokenizer)
        save_weights(place / "vq.safetensors", VQ(shape.tokenizer).state_dict(), kind="vq", config=config, meta={})
        settings = {"shard_images": shape.shard, "batch_size": shape.batch, "precision": options.precision, "workers": 0}
        stage = tokenize_images.Params(section, params.tokenize_images.model_copy(update=settings))
        inputs = tokenize_images.Inputs(place / "manifest.parquet", place / "vq.safetensors")
        manifest = read_manifest(inputs.manifest)
        rows, total = manifest.rows, len(manifest.rows)
        plan = tokenize_images.plan_shards(manifest, shape.shard)
        batches = sum(-(-len(shard.indices) // per_batch) for shard in plan)
        opener, model = data.ManifestOpener(manifest), tokenize_images.load_tokenizer(inputs.tokenizer, options.device)[0]
        some = rows.take(np.arange(min(total, 100)))
        started = time.perf_counter()
        decoded = [views(opener(row), shape.pixels, VIEWS) for row in some]
        decode = len(some) / (time.perf_counter() - started)
        ready = to_float(torch.from_numpy(np.concatenate(decoded)[: shape.batch])).to(options.device)
        bare_images_per_s(model, ready, 2, options.precision)
        pipeline, bare = [], []
        for repeat in range(options.repeats):
            work = place / f"work{repeat}"
            work.mkdir()
            outputs = tokenize_images.Outputs(place / f"tokens{repeat}", place / f"tokens{repeat}.json")
            started = time.perf_counter()
            tokenize_images.run(stage, inputs, outputs, tracker, device=options.device, work=work)
            pipeline.append(total / (time.perf_counter() - started))
            bare.append(bare_images_per_s(model, ready, batches, options.precision))
    end_to_end, encode, filled = statistics.median(pipeline), statistics.median(bare), total / (batches * per_batch)
    print(
        f"{options.shape} on {options.device}, {total} JPEG files of {shape.sides[1]} x {shape.sides[0]}, "
        f"{shape.batch} views per batch, {threads} threads, medians of {options.repeats}"
    )
    print(f"  stage          {end_to_end:9.2f} images/s (both views, decoding, shards, digests, index)")
    print(f"  bare encode    {encode:9.2f} images/s")
    print(f"  decoding alone {decode:9.2f} images/s on one core: {encode / decode:.2f} cores feed the encoder")
    print(f"  efficiency {end_to_end / encode:.3f}; {filled:.3f} of the slots of {batches} batches are filled")
    print(
        "RESULT "
        + json.dumps(
            {
                "shape": options.shape,
                "device": options.device,
                "pipeline_images_per_s": end_to_end,
                "encode_images_per_s": encode,
                "efficiency": end_to_end / encode,
                "decode_images_per_s_core": decode,
                "filled_share": filled,
            }
        )
    )


if __name__ == "__main__":
    main()
