"""The numbers of the report, read from artifacts/ and checked to belong together.

Shapes: T tokens an image, M patches, n validation images.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dpar_core.data.shards import TokenShards
from dpar_core.files import load_weights, read_weights_header
from dpar_core.models import flops
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.maps import PatchMaps
from dpar_core.training.order import fixed_subset
from pipeline.report.verdicts import Contest, Row, Side, judge_losses, judge_scores
from stages import artifacts
from stages.artifacts import CURVE, METRICS, MODELS_FOLDER, SAMPLE_PROTOCOL, TIMINGS, WEIGHTS

LOSS_IMAGES, LOSS_BATCH = 512, 16  # validation images whose losses are compared one by one
# The models compared, by the names of their samples and scores; files in the folder of models.
MODELS = {name: Path(one.name).relative_to(MODELS_FOLDER.name) for name, one in artifacts.MODELS.items()}
UNEQUAL = 0.10  # share by which training times may differ and still be called equal


@dataclass(frozen=True)
class Training:
    """How one model was trained. seconds: of pure training; curve: rows (step, seconds, train loss, validation loss),
    losses in nats a token."""

    config: DPARConfig | GPTConfig
    steps: int
    seconds: float
    images_per_s: float
    curve: tuple[tuple[int, float, float, float], ...]

    def seconds_at(self, step: float) -> float:
        """Return when a step was reached, between measured points on a line."""
        return float(np.interp(step, [0, *(row[0] for row in self.curve)], [0, *(row[1] for row in self.curve)]))

    def step_at(self, seconds: float) -> float:
        """Return the step that was reached after some seconds; past the end, at the mean rate."""
        if seconds > self.curve[-1][1]:
            return self.steps * seconds / self.seconds
        return float(np.interp(seconds, [0, *(row[1] for row in self.curve)], [0, *(row[0] for row in self.curve)]))

    def loss_at(self, seconds: float) -> float:
        """Return the validation loss after some seconds, between measured points on a line."""
        return float(np.interp(seconds, [row[1] for row in self.curve], [row[3] for row in self.curve]))


def _stage(folder: Path) -> str:
    """Return the stage that writes a folder of artifacts/."""
    return "entropy_model" if folder.name == "entropy_model" else f"train_{folder.name}"


def read_training(folder: Path) -> Training:
    """Read a folder that a training stage wrote. Raises ValueError when curve and timings have different steps."""
    header = read_weights_header(folder / WEIGHTS)
    config = (DPARConfig if header["kind"] == "dpar" else GPTConfig)(**header["config"])
    timings = read_json(folder / TIMINGS)
    with open(folder / CURVE, newline="") as stream:
        losses = [(int(r["step"]), float(r["train/loss"]), float(r["validation/loss"])) for r in csv.DictReader(stream)]
    steps = [point["step"] for point in timings["curve"]]
    if not losses or steps != [step for step, _, _ in losses]:
        raise ValueError(f"{folder}: curve.csv and timings.json are of different runs: run `dvc repro -f {_stage(folder)}`")
    curve = tuple((s, p["seconds"], a, b) for (s, a, b), p in zip(losses, timings["curve"]))
    return Training(config, losses[-1][0], timings["seconds"], timings["images_per_s"], curve)


@dataclass(frozen=True)
class Patches:
    """Patches an image of the training set, and of each class. percentiles: 5 % and 95 % of the images."""

    tokens: int
    mean: float
    percentiles: tuple[float, float]
    by_class: dict[str, float]
    shares: tuple[tuple[int, float], ...]  # patch length -> share of patches


def count_patches(patch_maps: Path, histogram: Path, shards: TokenShards) -> Patches:
    """Count the patches of every training view."""
    maps, meta = PatchMaps(patch_maps, shards), shards.meta
    counts = np.empty((len(shards), meta.num_views), np.int32)
    for first in range(0, len(shards), 50_000):
        part = np.arange(first, min(first + 50_000, len(shards)))
        for view in range(meta.num_views):
            counts[part, view] = maps.starts(part, np.full(len(part), view)).sum(axis=1)
    by_class = {name: float(counts[shards.labels == label].mean()) for label, name in enumerate(meta.classes)
                if (shards.labels == label).any()}  # fmt: skip
    with open(histogram, newline="") as stream:
        rows = [(int(row["length"]), int(row["train"])) for row in csv.DictReader(stream)]
    total = sum(count for _, count in rows)
    low, high = np.percentile(counts, [5, 95])
    shares = tuple((length, count / total) for length, count in rows)
    return Patches(meta.tokens, float(counts.mean()), (float(low), float(high)), by_class, shares)


@dataclass(frozen=True)
class Costs:
    """What an image costs: FLOPs of a forward pass and of drawing one (guidance and entropy model included), measured
    images a second."""

    forward: dict[str, float]
    drawing: dict[str, float]
    gate: float
    training_speed: dict[str, float]
    drawing_speed: dict[str, float]

    def saved(self, kind: str) -> float:
        """Return DPAR's saving against the twin, as a share: kind "forward" or "drawing"."""
        values = getattr(self, kind)
        return 1 - values["dpar"] / values["llamagen"]

    def promised(self, kind: str) -> float:
        """Return how many times as fast the FLOPs promise: kind "forward" or "drawing"."""
        return 1 / (1 - self.saved(kind))

    def clocked(self, kind: str) -> float:
        """Return how many times as fast as the twin DPAR was by the clock: kind "training_speed" or "drawing_speed"."""
        values = getattr(self, kind)
        return values["dpar"] / values["llamagen"]


def count_costs(trainings: dict[str, Training], gate: GPTConfig, patches: Patches, samples: Path) -> Costs:
    """Count FLOPs by the formulas of the method, and read the clocks."""
    drawn = read_json(samples / "dpar" / METRICS)["patch/patches_per_image"]
    how = read_json(samples / "dpar" / SAMPLE_PROTOCOL)
    dpar, twin = trainings["dpar"].config, trainings["llamagen"].config
    passes = 2 if how["cfg_scale"] > 1 else 1
    gate_flops = float(flops.gpt_forward_flops(gate)) if how["gate"] == "entropy_model" else 0.0
    return Costs(
        forward={"dpar": flops.dpar_forward_flops(dpar, patches.mean), "llamagen": flops.gpt_forward_flops(twin)},
        drawing={
            "dpar": passes * flops.dpar_forward_flops(dpar, drawn) + gate_flops,
            "llamagen": passes * flops.gpt_forward_flops(twin),
        },
        gate=gate_flops,
        training_speed={name: training.images_per_s for name, training in trainings.items()},
        drawing_speed={n: read_json(samples / n / TIMINGS)["images_per_s"] for n in ("dpar", "llamagen")},
    )


@torch.inference_mode()
def held_out_losses(weights: Path, shards: TokenShards, maps: PatchMaps, *, device: str) -> np.ndarray:
    """Return the loss of a model on each of (up to LOSS_IMAGES) validation images: (n,) nats a token, in float32."""
    kind = read_weights_header(weights)["kind"]
    loaded = load_weights(weights, kind=kind)
    model = DPAR(DPARConfig(**loaded.config)) if kind == "dpar" else GPT(GPTConfig(**loaded.config))
    if loaded.meta.get("tokens") != shards.digest:
        raise ValueError(
            f"{weights} was trained on token shards {loaded.meta.get('tokens')}, but {shards.folder} holds "
            f"{shards.digest}: run `dvc repro {_stage(weights.parent)}`"
        )
    model.load_state_dict(loaded.state)
    model.to(device).eval()
    chosen, found = fixed_subset(len(shards), LOSS_IMAGES), []
    for first in range(0, len(chosen), LOSS_BATCH):
        picks = chosen[first : first + LOSS_BATCH]
        views = np.zeros(len(picks), dtype=np.int64)
        tokens = torch.from_numpy(shards.tokens(picks, views).astype(np.int64)).to(device)
        labels = torch.from_numpy(shards.labels[picks].astype(np.int64)).to(device)
        if kind == "dpar":
            layout = PatchLayout.from_lengths(maps.lengths(picks, views), row_width=shards.meta.row_width).to(device)
            logits = model(tokens, labels, layout)
        else:
            logits = model(tokens[:, :-1], labels)
        found.append(F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none").mean(dim=1).cpu())
    return torch.cat(found).double().numpy()


@dataclass(frozen=True)
class EqualTime:
    """What "equal training time" means in this run.

    seconds: DPAR's. twin: which of the twin's models is set beside it, the one whose training time is nearest (its last, or
    the one kept at train.equal_time_step); step, twin_seconds: when that was. needed: the step at which the twin had
    trained as long as DPAR. shared: the shorter of both trainings; losses: both validation curves read there.
    """

    seconds: float
    twin: str
    step: int
    twin_seconds: float
    needed: float
    shared: float
    losses: dict[str, float]

    @property
    def difference(self) -> float:
        """By how much the twin had trained longer (positive) or shorter than DPAR, as a share."""
        return self.twin_seconds / self.seconds - 1

    @property
    def is_equal(self) -> bool:
        """Whether the times are near enough to be called equal."""
        return abs(self.difference) <= UNEQUAL

    @property
    def advantaged(self) -> Side | None:
        """Who had more time, when it was not equal."""
        return None if self.is_equal else "twin" if self.difference > 0 else "dpar"

    @property
    def handicap(self) -> str:
        """How much more that was, in words."""
        more = self.difference if self.difference > 0 else self.seconds / self.twin_seconds - 1
        return f"{100 * more:.0f} % more training time"


def equal_time(trainings: dict[str, Training], models: Path) -> EqualTime:
    """Find the twin's model that had trained about as long as DPAR, and how equal the times are."""
    dpar, twin = trainings["dpar"], trainings["llamagen"]
    kept = {name: read_weights_header(models / file)["meta"]["step"] for name, file in MODELS.items() if name != "dpar"}
    name = min(kept, key=lambda name: abs(twin.seconds_at(kept[name]) - dpar.seconds))
    shared = min(dpar.seconds, twin.seconds)
    losses = {name: training.loss_at(shared) for name, training in trainings.items()}
    seconds = twin.seconds_at(kept[name])
    return EqualTime(dpar.seconds, name, kept[name], seconds, twin.step_at(dpar.seconds), shared, losses)


def contests(
    models: Path, scores: Path, shards: TokenShards, maps: PatchMaps, times: EqualTime, *, device: str
) -> tuple[Contest, Contest]:
    """Set DPAR beside its twin at equal steps and at equal training time. shards, maps: of the validation split."""
    losses = {name: held_out_losses(models / file, shards, maps, device=device) for name, file in MODELS.items()}
    told = {name: read_json(scores / f"{name}.json") for name in MODELS}

    def rows(twin: str) -> tuple[Row, ...]:
        loss = judge_losses("validation loss", losses["dpar"], losses[twin])
        return (loss, *judge_scores(told["dpar"], told[twin]))

    by_time = Contest("at equal training time", rows(times.twin), times.advantaged, times.handicap)
    return Contest("at equal steps", rows("llamagen")), by_time


def read_json(path: Path) -> Any:
    """Read JSON. Raises FileNotFoundError with the way out."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `dvc repro report`, which makes what it needs")
    return json.loads(path.read_text())
