"""A tiny set of token shards, an entropy model's digest and patch maps, made in a folder: 16 codes, a 4 x 4 grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from dpar_core.data.shards import TokenMeta, TokenSample, TokenShards, write_index, write_shard
from dpar_core.files import atomic_folder
from dpar_core.patches.maps import RULE, MadeBy, pack_starts, write_rule, write_summary
from dpar_core.patches.rule import PatchRule, patch_starts_numpy
from stages.params import Params, parse_params
from tests.helpers.paths import ROOT

GRID, CODES = 4, 16
ENTROPY_MODEL = "feedfeedfeedfeed"


def write_tokens(folder: Path, *, train: int = 36, validation: int = 8) -> Path:
    """Write shards of images that count up or down (the two classes), two views each (the second is mirrored)."""
    random = np.random.default_rng(11)
    meta = TokenMeta(GRID, CODES, "adm_center_flip", 2, 64, ("up", "down"), "tokenizer0000000", "manifest00000000")
    shards = []
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("validation", validation)):
        samples = []
        for number in range(count):
            line = np.arange(GRID * GRID) if number % 2 == 0 else np.arange(GRID * GRID)[::-1]
            tokens = np.where(random.random(GRID * GRID) < 0.2, random.integers(0, CODES, GRID * GRID), line)
            views = np.stack([tokens, tokens.reshape(GRID, GRID)[:, ::-1].reshape(-1)]).astype(np.uint16)
            samples.append(TokenSample(f"{split}-{number:04d}", number % 2, views, {}))
        half = count // 2
        for shard, part in enumerate((samples[:half], samples[half:])):
            name = f"{split}-{shard:06d}.tar"
            write_shard(folder / name, part)
            shards.append((name, split))
    write_index(folder, meta, shards)
    return folder


def write_maps(folder: Path, tokens: Path) -> Path:
    """Write patch maps of random entropies for the shards in `tokens`."""
    rule = PatchRule("entropy_rows", GRID, 0.5, 4)
    random = np.random.default_rng(12)
    with atomic_folder(folder) as place:
        files = [RULE]
        for split in ("train", "validation"):
            shards = TokenShards(tokens, split)
            starts = patch_starts_numpy(random.random((2 * len(shards), GRID**2)).astype(np.float32), rule)
            np.save(place / f"{split}.starts.npy", pack_starts(starts, views=2))
            files.append(f"{split}.starts.npy")
        made_by = MadeBy(shards.digest, ENTROPY_MODEL, "e" * 16)
        write_rule(place / RULE, rule, made_by=made_by)
        write_summary(place, files, made_by=made_by)
    return folder


def tiny_params(*, equal_time_step: int | str | None = 6, **training: object) -> Params:
    """Return the demo's params with models and training cut to the tiny set; `training` changes both trainings."""
    raw = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    raw["entropy_model"] |= {"width": 32, "heads": 2, "layers": 2, "ffn_multiple": 32}
    raw["model"] |= {"width": 32, "heads": 2, "patch_layers": 1, "decoder_layers": 1, "ffn_multiple": 32}
    small = {
        "steps": 12,
        "batch_size": 8,
        "lr": 3.0e-3,
        "warmup_steps": 2,
        "validate_every": 4,
        "validation_images": 5,
        "checkpoint_every": 5,
        "keep_best": 0,
        "log_every": 2,
        "precision": "fp32",
        **training,
    }
    small["warmup_steps"] = min(small["warmup_steps"], small["steps"])
    raw["entropy_model"]["train"] |= small
    if isinstance(equal_time_step, int):
        equal_time_step = min(equal_time_step, small["steps"])
    raw["train"] |= small | {"equal_time_step": equal_time_step}
    return parse_params(raw)
