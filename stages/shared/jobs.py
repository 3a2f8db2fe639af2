"""What the entropy model, DPAR and its LlamaGen baseline have in common as stages: data, objective, run, outputs."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpar_core.data.images import CENTER_VIEWS
from dpar_core.data.shards import TokenShards
from dpar_core.files import (
    atomic_path,
    atomic_write,
    digest_of,
    load_weights,
    save_weights,
    sha256_file,
    write_json,
    write_record,
)
from dpar_core.models import flops
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig, next_token_loss
from dpar_core.models.memory import training_memory
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.maps import PatchMaps
from dpar_core.training.checkpoint import Architecture, Checkpoint, CheckpointStore
from dpar_core.training.loop import Hooks, RunProgress, TrainingRun, TrainSettings
from dpar_core.training.optim import OptimSettings
from dpar_core.training.order import DataOrder, fixed_subset
from dpar_core.training.parallel import Ranks
from dpar_core.training.prefetch import Batch
from stages.params import Training
from stages.terminal import print_fitted
from stages.tracker import Progress, Tracker
from stages.workers import fit as ray_train

ModelKind = Literal["entropy_model", "dpar", "llamagen"]

# Where a run takes place and what it keeps on the way: when these change, a run goes on. What it keeps, log_every and
# activation_checkpointing leave the result as it is, bit by bit on CPUs; workers and accumulate change the masks of
# dropout and rounding; strategy, compile and the device change rounding. equal_time_step is the baseline's alone.
_PLACEMENT = {
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "accumulate",
    "strategy",
    "compile",
    "activation_checkpointing",
    "storage",
    "keep_last",
    "keep_best",
    "checkpoint_every",
    "log_every",
}
_EXPLODED = 3.0  # times ln V, the loss of a model that knows nothing


@dataclass(frozen=True)
class TrainJob:
    """One training run: plain data, so that it travels to the workers.

    read: digests of tokens and patch maps that workers have to find; what is not in it is not compared.
    """

    kind: ModelKind
    config: GPTConfig | DPARConfig
    training: Training
    seed: int
    tokens: Path
    patch_maps: Path | None = None
    snapshot_steps: tuple[int, ...] = ()
    read: Mapping[str, str] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        return Architecture("dpar" if self.kind == "dpar" else "gpt", asdict(self.config))

    def settings(self) -> TrainSettings:
        """Return the training loop's settings."""
        training = self.training
        names = ("lr", "lr_schedule", "warmup_steps", "weight_decay", "clip_norm")
        optim = OptimSettings(
            betas=(training.betas[0], training.betas[1]), **{name: getattr(training, name) for name in names}
        )
        same = [field.name for field in fields(TrainSettings) if field.name in Training.model_fields]
        return TrainSettings(
            optim=optim,
            seed=self.seed,
            largest_loss=_EXPLODED * float(np.log(self.config.codebook_size)),
            snapshot_steps=self.snapshot_steps,
            **{name: getattr(training, name) for name in same},
        )

    def digest(self, inputs: dict[str, str]) -> str:
        """Return the name of this run's result: what it is trained on, what it is, how; not where."""
        training = recipe(self.training)
        training.pop("equal_time_step", None)
        what = {"kind": self.kind, "config": asdict(self.config), "training": training, "seed": self.seed}
        return digest_of({**what, "snapshots": list(self.snapshot_steps), "inputs": inputs})


def recipe(training: Training) -> dict[str, Any]:
    """Return what of a training section decides the result."""
    return {name: value for name, value in training.model_dump(mode="json").items() if name not in _PLACEMENT}


class TrainData:
    """Batches of a job for one rank, read from token shards and joined with their patch lengths."""

    def __init__(self, job: TrainJob, ranks: Ranks) -> None:
        self.job, self.ranks = job, ranks
        self.train = _SplitBatches(job, "train")
        self.held_out = _SplitBatches(job, "validation")
        shards, training = self.train.shards, job.training
        self.order = DataOrder(
            images=len(shards), views=shards.meta.num_views, batch_size=training.batch_size, seed=job.seed
        )

    def micro_batch(self, step: int, micro: int) -> Batch:
        """Return this rank's micro-batch of a step."""
        micros = self.job.training.accumulate
        part = self.order.part(step, rank=self.ranks.rank, ranks=self.ranks.world, micro=micro, micros=micros)
        return self.train.batch(part.indices, part.views)

    def validation(self) -> Iterator[tuple[Batch, float]]:
        """Yield this rank's share of the fixed validation images (centre crops), each rank equally many batches."""
        training, world = self.job.training, self.ranks.world
        chosen = fixed_subset(len(self.held_out.shards), training.validation_images)
        view = CENTER_VIEWS[self.held_out.shards.meta.views]
        size = training.batch_size // (world * training.accumulate)
        for first in range(0, len(chosen), size * world):
            mine = chosen[first + self.ranks.rank * size : first + (self.ranks.rank + 1) * size]
            shown = mine if len(mine) else chosen[:1]
            yield self.held_out.batch(shown, np.full(len(shown), view)), float(len(mine))


class _SplitBatches:
    """One split of a data set, as batches."""

    def __init__(self, job: TrainJob, split: str) -> None:
        self.labelled = job.kind != "entropy_model"
        self.shards = TokenShards(job.tokens, split)
        self.maps = None if job.patch_maps is None else PatchMaps(job.patch_maps, self.shards)
        found = {"tokens": self.shards.digest, **({} if self.maps is None else {"patch_maps": self.maps.digest})}
        if changed := [name for name, digest in found.items() if job.read.get(name, digest) != digest]:
            raise ValueError(
                f"{' and '.join(changed)} in {job.tokens.parent} changed while training began: run `dpar-cli run`"
            )

    def batch(self, indices: np.ndarray, views: np.ndarray) -> Batch:
        tokens = torch.from_numpy(self.shards.tokens(indices, views).astype(np.int64))
        labels = torch.from_numpy(self.shards.labels[indices].astype(np.int64)) if self.labelled else None
        layout = None
        if self.maps is not None:
            layout = PatchLayout.from_lengths(self.maps.lengths(indices, views), row_width=self.shards.meta.row_width)
        return Batch(tokens, labels, layout)


@dataclass(frozen=True)
class TrainObjective:
    """Cross-entropy in nats per token: over T tokens, or T - 1 for the entropy model."""

    config: GPTConfig | DPARConfig

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if batch.layout is None:
            return next_token_loss(model, batch.tokens, batch.labels)
        loss: Tensor = model(batch.tokens, batch.labels, batch.layout, targets=batch.tokens)
        return loss

    def forward_flops(self, patches_per_image: float) -> float:
        if isinstance(self.config, DPARConfig):
            return flops.dpar_forward_flops(self.config, patches_per_image)
        return flops.gpt_forward_flops(self.config)


def build(config: GPTConfig | DPARConfig, seed: int) -> nn.Module:
    """Return the untrained model of a config; its initial weights are a function of the seed."""
    torch.manual_seed(seed)
    return DPAR(config) if isinstance(config, DPARConfig) else GPT(config)


def train_job(job: TrainJob, root: str, *, ranks: Ranks, hooks: Hooks) -> dict[str, Any]:
    """Train on one rank, inside a Ray worker."""
    data = TrainData(job, ranks)
    if ranks.first and ranks.device.type == "cuda":
        device = torch.cuda.get_device_properties(ranks.device)
        if (line := memory_line(job, data, device.total_memory)) is not None:
            print_fitted(line)
    progress = TrainingRun(
        build(job.config, job.seed),
        TrainObjective(job.config),
        data,
        job.settings(),
        _store(job, root),
        hooks=hooks,
        ranks=ranks,
    ).run()
    return {"step": progress.step}


def memory_line(job: TrainJob, data: TrainData, device_bytes: float) -> str | None:
    """Return what to expect when a micro-batch is estimated not to fit a worker's GPU, None when it is.

    An estimate does not stop a run; and `accumulate` is not raised by itself, as that changes the dropout masks.
    """
    training, batch = job.training, data.micro_batch(0, 0)
    images = len(batch.tokens)
    estimate = training_memory(
        job.config,
        None if batch.layout is None else batch.layout.patches / images,
        bf16=training.precision == "bf16",
        checkpointing=training.activation_checkpointing,
        shards=training.workers if training.strategy == "fsdp" else 1,
    )
    if images <= estimate.largest_batch(device_bytes):
        return None
    fits = estimate.micro_batches(images * training.accumulate, device_bytes, at_least=training.accumulate)
    way_out = f"raise `accumulate` to {fits}" if fits else "set `strategy: fsdp`, or use more workers"
    return (
        f"training {images} images at a time is estimated to take {estimate.total(images) / 1e9:.0f} GB of this GPU's "
        f"{device_bytes / 1e9:.0f} GB: if memory runs out, {way_out}"
    )


def _store(job: TrainJob, root: str) -> CheckpointStore:
    return CheckpointStore(
        root, job.architecture, keep_last=job.training.keep_last, keep_best=job.training.keep_best, warn=print
    )


@dataclass(frozen=True)
class Result:
    """A finished run.

    checkpoint: its last step.
    store: where snapshots are.
    images: in the training set.
    """

    job: TrainJob
    checkpoint: Checkpoint
    store: CheckpointStore
    progress: RunProgress
    images: int


def run_job(job: TrainJob, inputs: dict[str, str], tracker: Tracker, *, section: str, device: str, work: Path) -> Result:
    """Train a job to its end through Ray Train, going on from where an earlier call was interrupted.

    inputs: digests of what is read.
    section: of params.yaml, for sentences.
    work: the stage's resumable folder, the same as long as `recipe` and inputs are.
    """
    job = replace(job, read=dict(inputs))
    images = len(TokenShards(job.tokens, "train"))
    view = CENTER_VIEWS[TokenShards(job.tokens, "validation").meta.views]
    # Runs of ten-crop views validated on view 0, a corner, once: they are not continued. View 0 is what it always was.
    name = f"run-{job.digest(inputs | {'validation_view': str(view)} if view else inputs)}"
    root = ray_train.run_folder(job.training.storage, work, name)
    store, steps = _store(job, root), job.training.steps
    tracker.log_params({"model/parameters": job.config.num_parameters, "train/run": name})
    checkpoint = store.newest()
    if checkpoint is None or checkpoint.step != steps:
        done = 0 if checkpoint is None else checkpoint.step
        with tracker.progress(steps, f"train {job.kind}", done=done, unit="step") as bar:
            ray_train.fit(
                partial(train_job, job, root),
                root=root,
                work=work,
                scale=ray_train.Scale.of(job.training, device=device),
                section=section,
                on_event=_Reporter(tracker, bar, done),
            )
        checkpoint = store.newest()
    if checkpoint is None or checkpoint.step != steps:
        raise RuntimeError(f"the run in {root} did not reach step {steps}: run the same command again, it goes on")
    return Result(job, checkpoint, store, RunProgress(**checkpoint.state["progress"]), images)


class _Reporter:
    """Passes a run's events on to the tracker."""

    def __init__(self, tracker: Tracker, bar: Progress, done: int) -> None:
        self.tracker, self.bar, self.step = tracker, bar, done

    def __call__(self, event: ray_train.Event) -> None:
        step, metrics = event.step, event.metrics
        if metrics:
            self.tracker.log_metrics(metrics, step)
        shown = {"loss": metrics["train/loss"]} if "train/loss" in metrics else {}
        if step > self.step:
            self.bar.advance(step - self.step, **shown)
            self.step = step


def publish(result: Result, outputs: Any, meta: dict[str, Any], tracker: Tracker) -> None:
    """Write the outputs that all three stages have: curve, timings, metrics and, last, the model.

    outputs: has the paths model, metrics, curve, timings.
    meta: what the model was made from, goes into its file.
    """
    progress, job = result.progress, result.job
    write_curve(outputs.curve, progress.curve)
    timings = [dict(zip(("step", "seconds", "images_per_s"), row)) for row in progress.timings]
    trained = progress.step * job.training.batch_size
    speed = {"seconds": progress.seconds, "images_per_s": trained / progress.seconds}
    write_record(outputs.timings, {**speed, "curve": timings, "curve_sha256": sha256_file(outputs.curve)})
    best = min(progress.curve, key=lambda row: row[2])
    metrics = {
        "train/loss": progress.curve[-1][1],
        "validation/loss": progress.curve[-1][2],
        "validation/best_loss": best[2],
        "validation/best_step": best[0],
        "steps": progress.step,
        "images": trained,
        "epochs": trained / result.images,
        "validation/view": CENTER_VIEWS[TokenShards(job.tokens, "validation").meta.views],
        "parameters": job.config.num_parameters,
    }
    write_json(outputs.metrics, metrics)
    tracker.log_metrics({"perf/images_per_s": speed["images_per_s"], **metrics})
    publish_model(result.checkpoint.model_file, outputs.model, job, {**meta, "step": progress.step})


def publish_model(source: Path, target: Path, job: TrainJob, meta: dict[str, Any]) -> None:
    """Write weights of the run's store as the artifact that other stages read."""
    architecture = job.architecture
    weights = load_weights(source, kind=architecture.kind)
    everything = {"seed": job.seed, "precision": job.training.precision, **meta}
    save_weights(target, weights.state, kind=architecture.kind, config=architecture.config, meta=everything)


def write_curve(path: Path, rows: list[list[float]]) -> None:
    """Write loss curves as CSV: step, train/loss (mean since the row before), validation/loss; nats per token."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "train/loss", "validation/loss"])
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
