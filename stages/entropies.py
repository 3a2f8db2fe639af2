"""Measure how predictable every token is: the entropy model's next-token entropies of all views."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpar_core.files import atomic_folder, load_weights
from dpar_core.gpt import GPT, GPTConfig, entropies_of
from dpar_core.patch_maps import parquet_name, write_entropies, write_summary
from dpar_core.shards import TokenShards
from stages import params as P
from stages.tracker import Tracker

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Params:
    entropies: P.Entropies


@dataclass(frozen=True)
class Inputs:
    tokens: Path
    entropy_model: Path


@dataclass(frozen=True)
class Outputs:
    entropies: Path


def load_entropy_model(path: Path, shards: TokenShards | None, device: str) -> tuple[GPT, str]:
    """Return the entropy model of a weights file and the file's digest.

    Raises ValueError when it was trained on the tokens of another tokenizer than `shards` hold.
    """
    weights = load_weights(path, kind="gpt")
    config = GPTConfig(**weights.config)
    if config.num_classes is not None:
        raise ValueError(f"{path} is conditioned on classes: an entropy model has none, run `dvc repro entropy_model`")
    if shards is not None:
        trained_on = weights.meta.get("tokenizer")
        if trained_on != shards.meta.tokenizer:
            raise ValueError(
                f"entropy model {path} was trained on tokens of tokenizer {trained_on}, but {shards.folder} holds those of "
                f"{shards.meta.tokenizer}: run `dvc repro entropy_model`"
            )
    model = GPT(config).to(device).eval()
    model.load_state_dict(weights.state)
    return model.requires_grad_(False), weights.digest


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write the entropies of every view beside its shard; shards that an interrupted run finished are kept."""
    if params.entropies.workers:
        raise ValueError("entropies.workers above 0 is not built yet: set it to 0 (this process)")
    splits = [TokenShards(inputs.tokens, split) for split in SPLITS]
    model, digest = load_entropy_model(inputs.entropy_model, splits[0], device)
    tracker.log_input("tokens", inputs.tokens, splits[0].digest)
    tracker.log_input("entropy_model", inputs.entropy_model, digest)
    plan = [(shards, name, part) for shards in splits for name, part in shards.shards()]
    done = [(work / parquet_name(name)).exists() for _, name, _ in plan]
    images = sum(part.stop - part.start for (_, _, part), there in zip(plan, done) if there)
    sums, count = 0.0, 0
    with tracker.progress(sum(len(s) for s in splits), "entropies", done=images, unit="images") as progress:
        for (shards, name, part), there in zip(plan, done):
            if there:
                continue
            found = _shard_entropies(model, shards, part, params.entropies.batch_size, device=device)
            write_entropies(work / parquet_name(name), shards, part, found, entropy_model=digest)
            progress.advance(part.stop - part.start)
            sums, count = sums + float(found[:, 1:].sum(dtype=np.float64)), count + found[:, 1:].size
    with atomic_folder(outputs.entropies) as folder:
        names = [parquet_name(name) for _, name, _ in plan]
        for name in names:
            os.link(work / name, folder / name)
        write_summary(folder, names, made_by={"tokens": splits[0].digest, "entropy_model": digest})
    if count:
        tracker.log_metrics({"entropy/mean_nats": sums / count})


def _shard_entropies(model: GPT, shards: TokenShards, part: slice, batch_size: int, *, device: str) -> np.ndarray:
    """Return the entropies of a shard's views: (samples * views, T) float32.

    Every batch has the same number of rows (the last is filled up), so that no kernel works on another shape and a
    view's entropies do not depend on how many neighbours it has.
    """
    views = shards.meta.num_views
    index = np.repeat(np.arange(part.start, part.stop), views)
    view = np.tile(np.arange(views), part.stop - part.start)
    found = []
    for first in range(0, len(index), batch_size):
        tokens = shards.tokens(index[first : first + batch_size], view[first : first + batch_size]).astype(np.int64)
        full = np.concatenate([tokens, np.zeros((batch_size - len(tokens), tokens.shape[1]), np.int64)])
        found.append(entropies_of(model, torch.from_numpy(full).to(device))[: len(tokens)].cpu().numpy())
    return np.concatenate(found)
