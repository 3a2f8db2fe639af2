"""Measure how predictable every token is: the entropy model's next-token entropies of all views."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpar_core.choices import GatePrecision
from dpar_core.data.manifest import SPLITS
from dpar_core.data.shards import TokenShards
from dpar_core.files import atomic_folder
from dpar_core.models.gpt import GPT, entropies_of
from dpar_core.models.load import read_trained
from dpar_core.patches.maps import MadeBy, parquet_name, write_entropies, write_summary
from stages import params as P
from stages.tracker import Tracker
from stages.workers.tasks import facts_of_unit, finish_unit, finished_unit, move_into_place, remove_leftovers, run_units

MOST_MOVED = 0.02  # share of tokens that a lower precision may put on the other side of a threshold
MEASURED_SHARDS, MEASURED_IMAGES = 8, 32  # shards, evenly spaced, and images of each on which that share is measured


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


@dataclass(frozen=True)
class Unit:
    """A unit of work: the samples `first` ... `last` - 1 of a split, which are one shard."""

    name: str
    split: str
    first: int
    last: int


def identity(params: Params) -> dict[str, Any]:
    """Return what of the params decides the entropies: who computes them does not."""
    return {"entropies": params.entropies.model_dump(mode="json", exclude={"workers"})}


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write the entropies of every view beside its shard; shards that an interrupted run finished are kept."""
    remove_leftovers(work, outputs.entropies)
    precision = params.entropies.precision
    splits = [TokenShards(inputs.tokens, split) for split in SPLITS]
    _, digest = load_entropy_model(inputs.entropy_model, splits[0], "cpu")
    tracker.log_input("tokens", inputs.tokens, splits[0].digest)
    tracker.log_input("entropy_model", inputs.entropy_model, digest)
    plan = plan_units(splits)
    todo = [unit for unit in plan if finished_unit(work, unit.name) is None]
    images, left = (sum(unit.last - unit.first for unit in units) for units in (plan, todo))
    build = functools.partial(
        ShardEntropies, inputs.tokens.absolute(), inputs.entropy_model.absolute(), params.entropies, work.absolute(), device
    )
    workers = params.entropies.workers
    facts: dict[str, Any] = {"precision": precision}
    made_by = MadeBy(splits[0].digest, digest, precision=precision)
    if precision != "fp32":
        facts["moved_share"] = build().moved_share(plan)
        tracker.log_metrics({f"entropy/{precision}_moved_share": facts["moved_share"]})
    with tracker.progress(images, "entropies", done=images - left, unit="images") as progress:
        for unit, _ in run_units(todo, build, workers=workers, device=device, section="entropies"):
            progress.advance(unit.last - unit.first)
    mean = publish(plan, work, outputs.entropies, made_by=made_by, facts=facts)
    tracker.log_metrics({"entropy/mean_nats": mean})


def load_entropy_model(path: Path, shards: TokenShards | None, device: str) -> tuple[GPT, str]:
    """Return the entropy model of a weights file and the file's digest.

    Raises ValueError when it was trained on the tokens of another tokenizer than `shards` hold.
    """
    made_with = None if shards is None else {"tokenizer": shards.meta.tokenizer}
    trained = read_trained(path, "entropy_model", made_with=made_with)
    config = trained.config
    if shards is not None and (config.tokens, config.codebook_size) != (shards.meta.tokens, shards.meta.codebook_size):
        raise ValueError(
            f"entropy model {path} is for {config.tokens} tokens of {config.codebook_size} codes, but {shards.folder} "
            f"holds {shards.meta.tokens} of {shards.meta.codebook_size}: run `dpar-cli run entropy_model`"
        )
    return trained.build(device), trained.digest


def plan_units(splits: Sequence[TokenShards]) -> list[Unit]:
    """Return the units of work of all splits, in order."""
    return [
        Unit(parquet_name(name), shards.split, part.start, part.stop) for shards in splits for name, part in shards.shards()
    ]


class ShardEntropies:
    """Makes the entropies of shards."""

    def __init__(
        self, tokens: Path, entropy_model: Path, settings: P.Entropies, work: Path, device: str, threads: int = 1
    ) -> None:
        self.shards = {split: TokenShards(tokens, split) for split in SPLITS}
        self.model, self.digest = load_entropy_model(entropy_model, self.shards[SPLITS[0]], device)
        self.settings, self.work, self.device = settings, work, device

    def __call__(self, unit: Unit) -> None:
        """Write the entropies of one shard into the work folder. Raises ValueError when they are not finite."""
        shards, part, precision = self.shards[unit.split], slice(unit.first, unit.last), self.settings.precision
        found = self.entropies(shards, part)
        known = found[:, 1:]
        if not np.isfinite(known).all():
            way_out = "train the entropy model again" if precision == "fp32" else "set entropies.precision to fp32"
            raise ValueError(f"entropies of {unit.name} in {precision} are not finite numbers: {way_out}")
        write_entropies(self.work / unit.name, shards, part, found, entropy_model=self.digest, precision=precision)
        total = float(known.sum(dtype=np.float64))
        finish_unit(self.work, unit.name, [unit.name], sum=total, count=known.size)

    def made_by(self) -> MadeBy:
        """Return what the folder of entropies says it was made by."""
        return MadeBy(self.shards["train"].digest, self.digest, precision=self.settings.precision)

    def moved_share(self, plan: Sequence[Unit]) -> float:
        """Return the share of tokens that are on the other side of a threshold than in fp32, on some images of some shards.

        It is the largest of the shares for thresholds between the 5th and the 95th percentile of the entropies. Raises
        ValueError when it is too large.
        """
        count = min(MEASURED_SHARDS, len(plan))
        of_plan = (plan[number * len(plan) // count] for number in range(count))
        parts = [
            (self.shards[unit.split], slice(unit.first, min(unit.first + MEASURED_IMAGES, unit.last))) for unit in of_plan
        ]
        whole, rounded = (
            np.concatenate([self.entropies(shards, part, precision=precision)[:, 1:] for shards, part in parts]).ravel()
            for precision in ("fp32", self.settings.precision)
        )
        thresholds = np.percentile(whole, np.arange(5, 96, 5))
        share = max(float(((whole > at) != (rounded > at)).mean()) for at in thresholds)
        if not share <= MOST_MOVED or not np.isfinite(rounded).all():
            raise ValueError(
                f"entropies.precision {self.settings.precision} puts {share:.1%} of {whole.size} tokens on the other side "
                f"of a threshold, more than {MOST_MOVED:.0%}, or gives no finite numbers: set it to fp32"
            )
        return share

    def entropies(self, shards: TokenShards, part: slice, *, precision: GatePrecision | None = None) -> np.ndarray:
        """Return the entropies of a shard's views: (samples * views, T) float32. precision: another than the params'.

        Every batch has the same number of rows (the last is filled up), so that no kernel works on another shape and a
        view's entropies do not depend on how many neighbours it has.
        """
        views, size = shards.meta.num_views, self.settings.batch_size
        index = np.repeat(np.arange(part.start, part.stop), views)
        view = np.tile(np.arange(views), part.stop - part.start)
        found = torch.empty(len(index), shards.meta.tokens, device=self.device)
        for first in range(0, len(index), size):
            tokens = shards.tokens(index[first : first + size], view[first : first + size]).astype(np.int64)
            full = np.zeros((size, tokens.shape[1]), np.int64)
            full[: len(tokens)] = tokens
            batch = torch.from_numpy(full)
            if self.device == "cuda":  # the next batch is read while this one is worked on
                batch = batch.pin_memory()
            batch = batch.to(self.device, non_blocking=True)
            of_batch = entropies_of(self.model, batch, precision or self.settings.precision)
            found[first : first + size] = of_batch[: len(tokens)]
        return found.cpu().numpy()


def publish(plan: Sequence[Unit], work: Path, entropies: Path, *, made_by: MadeBy, facts: dict[str, Any]) -> float:
    """Put all finished files in place at once; return the mean entropy in nats."""
    records = [facts_of_unit(work, unit.name) for unit in plan]
    mean: float = sum(record["sum"] for record in records) / sum(record["count"] for record in records)
    with atomic_folder(entropies) as folder:
        for unit in plan:
            move_into_place(work / unit.name, folder / unit.name)
        write_summary(folder, [unit.name for unit in plan], made_by=made_by, facts={"mean_nats": mean, **facts})
    return mean
