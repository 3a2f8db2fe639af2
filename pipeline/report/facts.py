"""The numbers of the report, read from artifacts/ and checked to belong together.

Shapes: T tokens per image, M patches, n validation images.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dpar_core import files
from dpar_core.data.images import CENTER_VIEWS
from dpar_core.data.shards import TokenShards
from dpar_core.evaluation.protocol import Scores, read_scores
from dpar_core.files import read_weights_header, sha256_file
from dpar_core.models import flops
from dpar_core.models.dpar import DPARConfig
from dpar_core.models.gpt import GPTConfig
from dpar_core.models.load import read_trained, role_of
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.maps import PatchMaps
from dpar_core.patches.rule import PatchRule, starts_by_entropy
from dpar_core.training.order import fixed_subset
from pipeline.report.speeds import Speed, Speeds, read_speeds
from pipeline.report.verdicts import Comparison, Contest, judge_losses, judge_scores, nothing_learned, too_little_training
from stages import artifacts
from stages.artifacts import CURVE, METRICS, MODELS_FOLDER, SAMPLE_PROTOCOL, SAMPLE_TOKENS, TIMINGS, WEIGHTS, maker_of

LOSS_IMAGES, LOSS_BATCH = 512, 16  # validation images whose losses are compared one by one
# The models compared, by the names of their samples and scores; files in the folder of models.
MODELS = {name: Path(one.name).relative_to(MODELS_FOLDER.name) for name, one in artifacts.MODELS.items()}
UNEQUAL = 0.10  # share by which training times may differ and still count as equal


@dataclass(frozen=True)
class TrainingFacts:
    """How one model was trained.

    seconds: of pure training, by the clock of that run alone.
    curve: rows (step, seconds, train loss, validation loss), losses in nats per token.
    images_per_s: at each row of the curve, since the row before.
    """

    config: DPARConfig | GPTConfig
    steps: int
    seconds: float
    curve: tuple[tuple[int, float, float, float], ...]
    images_per_s: tuple[float, ...]

    def loss_at(self, step: float) -> float:
        """Return the validation loss at a step, between measured points on a line."""
        return float(np.interp(step, [row[0] for row in self.curve], [row[3] for row in self.curve]))

    @property
    def drift(self) -> float:
        """By how much the pace of this run moved, as a share of its median (the first row, with its warm-up, left out)."""
        rates = self.images_per_s[1:] or self.images_per_s
        return float(max(abs(rate / np.median(rates) - 1) for rate in rates))


def _stage(folder: Path) -> str:
    """Return the stage that writes a folder of artifacts/."""
    return "entropy_model" if folder.name == "entropy_model" else f"train_{folder.name}"


def read_training(folder: Path) -> TrainingFacts:
    """Read a folder that a training stage wrote. Raises ValueError when curve and timings have different steps."""
    header = read_weights_header(folder / WEIGHTS)
    way_out = f"run `dvc repro -sf {_stage(folder)}`"
    timings = files.read_json(folder / TIMINGS, way_out=way_out, digest="digest" in header)
    try:
        config = (DPARConfig if header["kind"] == "dpar" else GPTConfig)(**header["config"])
        expected = timings.get("curve_sha256")
        if expected is not None and sha256_file(folder / CURVE) != expected:
            raise ValueError(f"{folder / CURVE} is damaged or was edited: {way_out}")
        with open(folder / CURVE, newline="", encoding="utf-8") as stream:
            losses = [(int(r["step"]), float(r["train/loss"]), float(r["validation/loss"])) for r in csv.DictReader(stream)]
        if not losses or [point["step"] for point in timings["curve"]] != [step for step, _, _ in losses]:
            raise ValueError(f"{folder}: curve.csv and timings.json are of different runs: {way_out}")
        curve = tuple((s, p["seconds"], a, b) for (s, a, b), p in zip(losses, timings["curve"]))
        rates = tuple(point["images_per_s"] for point in timings["curve"])
        return TrainingFacts(config, losses[-1][0], timings["seconds"], curve, rates)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} holds {TIMINGS} or {WEIGHTS} of another version ({error}): {way_out}") from None


@dataclass(frozen=True)
class PatchFacts:
    """Patches per image of the training set, and of each class. percentiles: 5 % and 95 % of the images."""

    tokens: int
    mean: float
    percentiles: tuple[float, float]
    by_class: dict[str, float]
    shares: tuple[tuple[int, float], ...]  # patch length -> share of patches


def count_patches(patch_maps: Path, histogram: Path, shards: TokenShards) -> PatchFacts:
    """Count the patches of every training view."""
    maps, meta = PatchMaps(patch_maps, shards), shards.meta
    counts = np.empty((len(shards), meta.num_views), np.int32)
    for first in range(0, len(shards), 50_000):
        part = np.arange(first, min(first + 50_000, len(shards)))
        for view in range(meta.num_views):
            counts[part, view] = maps.starts(part, np.full(len(part), view)).sum(axis=1)
    by_class = {
        name: float(counts[shards.labels == label].mean())
        for label, name in enumerate(meta.classes)
        if (shards.labels == label).any()
    }
    expected = maps.summary.facts.get("patch_lengths_sha256")
    if expected is not None and sha256_file(histogram) != expected:
        raise ValueError(f"{histogram} is damaged or was edited: run `dvc repro -sf patch_maps`")
    with open(histogram, newline="", encoding="utf-8") as stream:
        rows = [(int(row["length"]), int(row["train"])) for row in csv.DictReader(stream)]
    total = sum(count for _, count in rows)
    low, high = np.percentile(counts, [5, 95])
    shares = tuple((length, count / total) for length, count in rows)
    return PatchFacts(meta.tokens, float(counts.mean()), (float(low), float(high)), by_class, shares)


@dataclass(frozen=True)
class Costs:
    """FLOPs of an image, by the formulas of the method.

    forward: one forward pass.
    sampling: one sampled image, guidance and entropy model included.
    gate: the entropy model.
    parts: where the FLOPs of a sampled image go in DPAR, by name.
    """

    forward: dict[str, float]
    sampling: dict[str, float]
    gate: float
    parts: dict[str, float]

    def saved(self, kind: str) -> float:
        """Return DPAR's saving against the baseline, as a share: kind "forward" or "sampling"."""
        values: dict[str, float] = getattr(self, kind)
        return 1 - values["dpar"] / values["llamagen"]

    def promised(self, kind: str) -> float:
        """Return how many times as fast the FLOPs allow: kind "forward" or "sampling"."""
        return 1 / (1 - self.saved(kind))


def count_costs(trainings: dict[str, TrainingFacts], gate: GPTConfig, patches: PatchFacts, samples: Path) -> Costs:
    """Count FLOPs by the formulas of the method."""
    sampled = read_json(samples / "dpar" / METRICS)["patch/patches_per_image"]
    how = read_json(samples / "dpar" / SAMPLE_PROTOCOL)
    dpar, baseline = trainings["dpar"].config, trainings["llamagen"].config
    assert isinstance(dpar, DPARConfig) and isinstance(baseline, GPTConfig)
    guidance = [how[name] for name in ("cfg_scale", "cfg_schedule", "cfg_interval")]
    forwards = flops.guidance_passes(*guidance, tokens=dpar.tokens)
    rule, again = PatchRule(**how["rule"]), 0.0
    asked = how["gate"] == "entropy_model" and rule.reads_entropies
    gate_flops = float(flops.gpt_forward_flops(gate)) if asked else 0.0
    if rule.reads_entropies and how["gate"] == "decoder":
        with np.load(samples / "dpar" / SAMPLE_TOKENS, allow_pickle=False) as archive:
            starts = np.unpackbits(archive["starts"], axis=1, count=dpar.tokens).astype(bool)
        again = float(starts_by_entropy(starts, rule).sum(axis=1).mean())
    parts = {"entropy model": gate_flops, **flops.dpar_parts(dpar, sampled, passes=forwards, again=again)}
    return Costs(
        forward={"dpar": flops.dpar_forward_flops(dpar, patches.mean), "llamagen": flops.gpt_forward_flops(baseline)},
        sampling={"dpar": sum(parts.values()), "llamagen": forwards * flops.gpt_forward_flops(baseline)},
        gate=gate_flops,
        parts={words: value for words, value in parts.items() if value > 0},
    )


def measured_speeds(folder: Path, costs: Costs) -> Speeds:
    """Read the speeds that were measured in turns, beside what the FLOPs allow."""
    return read_speeds(folder, training_promise=costs.promised("forward"), sampling_promise=costs.promised("sampling"))


@torch.inference_mode()
def held_out_losses(weights: Path, shards: TokenShards, maps: PatchMaps, *, device: str) -> np.ndarray:
    """Return the loss of a model on each of (up to LOSS_IMAGES) validation images: (n,) nats per token, in float32."""
    role = role_of(weights)
    model = read_trained(weights, role, made_with={"tokens": shards.digest}).build(device)
    chosen, found = fixed_subset(len(shards), LOSS_IMAGES), []
    for first in range(0, len(chosen), LOSS_BATCH):
        picks = chosen[first : first + LOSS_BATCH]
        views = np.full(len(picks), CENTER_VIEWS[shards.meta.views])
        tokens = torch.from_numpy(shards.tokens(picks, views).astype(np.int64)).to(device)
        labels = torch.from_numpy(shards.labels[picks].astype(np.int64)).to(device)
        if role == "dpar":
            layout = PatchLayout.from_lengths(maps.lengths(picks, views), row_width=shards.meta.row_width).to(device)
            logits = model(tokens, labels, layout)
        else:
            logits = model(tokens[:, :-1], labels)
        found.append(F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none").mean(dim=1).cpu())
    return torch.cat(found).double().numpy()


@dataclass(frozen=True)
class EqualTime:
    """What "equal training time" means in this run, by the pace that both models had in turns.

    steps: DPAR's.
    model: which of the baseline's models is compared: its last, or the one kept for equal time.
    step: when that was.
    needed: the step at which the baseline had trained as long as DPAR.
    spread: by how much the interval of the speed ratio reaches from the ratio, as a share.
    at: both steps at which the shorter of the two trainings ended.
    losses: both validation curves read there.
    """

    steps: int
    model: str
    step: int
    needed: float
    at: dict[str, float]
    losses: dict[str, float]
    spread: float = 0.0

    @property
    def difference(self) -> float:
        """By how much the baseline had trained longer (positive) or shorter than DPAR, as a share."""
        return self.step / self.needed - 1

    @property
    def is_equal(self) -> bool:
        """Whether the times are near enough to be called equal."""
        return abs(self.difference) <= UNEQUAL

    @property
    def obstacle(self) -> str:
        """Why this is not a comparison at equal time; an empty text when it is one."""
        if self.spread > UNEQUAL:
            return (
                f"the ratio of speeds is known only to within {100 * self.spread:.0f} %, too little to compare at equal "
                f"times (at most {100 * UNEQUAL:.0f} %): run `dvc repro -sf time_training` on a machine that is not busy"
            )
        if self.is_equal:
            return ""
        more = "longer" if self.difference > 0 else "less"
        way_out = (
            f"step {self.needed:.0f} would have been equal (train.equal_time_step: auto keeps steps near it)"
            if self.needed <= self.steps * (1 + UNEQUAL)
            else f"it would have needed {self.needed:.0f} steps, more than it was given"
        )
        return (
            f"at step {self.step} the baseline had trained {100 * abs(self.difference):.0f} % {more} than DPAR at step "
            f"{self.steps}, more than the {100 * UNEQUAL:.0f} % that count as equal; {way_out}"
        )


def equal_time(trainings: dict[str, TrainingFacts], models: Path, training: Speed) -> EqualTime:
    """Find the baseline's model that had trained about as long as DPAR, and how equal the times are."""
    dpar, baseline = trainings["dpar"], trainings["llamagen"]
    kept = {name: read_weights_header(models / file)["meta"]["step"] for name, file in MODELS.items() if name != "dpar"}
    needed = dpar.steps / training.ratio
    name = min(kept, key=lambda name: abs(kept[name] - needed))
    shorter = min(baseline.steps, needed)
    at = {"dpar": dpar.steps * shorter / needed, "llamagen": shorter}
    losses = {name: trained.loss_at(at[name]) for name, trained in trainings.items()}
    return EqualTime(dpar.steps, name, kept[name], needed, at, losses, training.pace.turns.spread)


def contests(
    losses: dict[str, np.ndarray], scores: Path, times: EqualTime, training: Speed, *, seen: int, images: int, chance: float
) -> tuple[Contest, Contest]:
    """Compare DPAR with its baseline at equal steps and at equal training time.

    losses: by model (see held_out_losses).
    seen: images in all training batches.
    images: in the training set.
    chance: loss of a model that knows nothing, ln V nats per token.
    """
    found = {name: scores_of(scores, name) for name in MODELS}
    short = too_little_training(steps=times.steps, seen=seen, images=images)
    short = short or nothing_learned(float(losses["dpar"].mean()), float(losses["llamagen"].mean()), chance)

    def rows(baseline: str) -> tuple[Comparison, ...]:
        loss = judge_losses("validation loss", losses["dpar"], losses[baseline])
        return (loss, *judge_scores(found["dpar"], found[baseline]))

    unequal = tuple(filter(None, (training.doubt, "" if training.doubt else times.obstacle)))
    by_time = Contest("at equal training time", rows(times.model), (*short, *unequal))
    return Contest("at equal steps", rows("llamagen"), short), by_time


def scores_of(folder: Path, name: str) -> Scores:
    """Return the scores of a model. Raises FileNotFoundError, Damaged, ScoreError with the way out."""
    path = folder / f"{name}.json"
    read_json(path)  # names the stage to run, for a file that is missing or damaged
    return read_scores(path)


def read_json(path: Path) -> Any:
    """Read JSON, checked against its digest where it carries one. Raises FileNotFoundError, Damaged with the way out."""
    maker = maker_of(path, project_of(path))
    way_out = f"run `dvc repro -sf {maker}`" if maker else "make it again"
    return files.read_json(path, way_out=way_out, digest=path.name == SAMPLE_PROTOCOL)


def project_of(path: Path) -> Path:
    """Return the project's folder: what holds the folder of artifacts that a path lies in."""
    return next((above.parent for above in path.absolute().parents if above.name == artifacts.FOLDER), path.parent)
