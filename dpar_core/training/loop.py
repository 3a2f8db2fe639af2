"""The training loop of all three models. It knows neither Ray nor MLflow: it takes batches and hooks.

Everything random is a function of (seed, step, micro-batch, rank), every choice of images a function of (seed, step), so a
run that was interrupted ends as an uninterrupted one would have. Nothing is read back from the device inside a step:
a guard on the device skips the update when a loss turns bad, and the host learns of it at the next log interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dpar_core.choices import Strategy
from dpar_core.models import flops
from dpar_core.precision import Precision
from dpar_core.training import parallel
from dpar_core.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from dpar_core.training.meters import Clock, Counts, Guard, MeanLoss, memory_gb, peak_flops
from dpar_core.training.optim import OptimSettings, adamw, clip_gradients, learning_rate, set_learning_rate
from dpar_core.training.parallel import Ranks
from dpar_core.training.prefetch import Batch, Prefetcher

PEAK_SECONDS = 30.0  # after which a CPU's peak is measured again at a validation: at a start much else runs beside it


class TrainingStopped(RuntimeError):
    """A loss was not finite or exploded; the sentence names the step and the last good checkpoint."""


class Data(Protocol):
    """Where batches come from. All batches are this rank's, on the CPU, and a function of their arguments alone."""

    def micro_batch(self, step: int, micro: int) -> Batch:
        """Return micro-batch `micro` of optimizer step `step`."""

    def validation(self) -> Iterator[tuple[Batch, float]]:
        """Yield the fixed validation set in batches, each with its weight (its images; 0: only to keep ranks in step)."""


class Objective(Protocol):
    """What a model learns and what that costs."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch in nats per token: () float32."""

    def forward_flops(self, patches_per_image: float) -> float:
        """Return FLOPs of a forward pass of one image (the patches are 0 for a model that has none)."""


class Hooks(Protocol):
    """Called on every rank with the same arguments, in the same order."""

    def begin(self, step: int) -> None:
        """The loop is about to take `step` (0, or where a checkpoint left off)."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """`step` steps are done."""

    def checkpoint(self, step: int, address: str) -> None:
        """A checkpoint of `step` is safe."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train. steps: optimizer steps of batch_size images over all ranks, each in `accumulate` micro-batches."""

    steps: int
    batch_size: int
    optim: OptimSettings
    seed: int
    largest_loss: float  # nats per token; a loss above it has exploded
    accumulate: int = 1
    precision: Precision = "fp32"
    compile: bool = False
    activation_checkpointing: bool = False
    strategy: Strategy = "ddp"
    validate_every: int = 100
    checkpoint_every: int = 100
    log_every: int = 10
    snapshot_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            known = " or ".join(get_args(Precision))
            raise ValueError(f"precision is {self.precision!r}, expected {known}: settle it for the device first")


@dataclass
class RunProgress:
    """What a run has to show so far; it travels in every checkpoint. Losses in nats per token, seconds of pure training.

    curve: a row (step, train loss since the row before, validation loss) for each validation.
    timings: rows (step, seconds, images/s since the row before).
    Sums are over the steps since the last log line or curve row.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    timings: list[list[float]] = field(default_factory=list)
    log_sum: float = 0.0
    log_steps: int = 0
    curve_sum: float = 0.0
    curve_steps: int = 0


class TrainingRun:
    """Trains a model from its newest checkpoint, or from its initial weights, to `settings.steps` steps.

    The last step is always validated and saved. Raises TrainingStopped before a bad loss reaches the weights,
    CheckpointError when a checkpoint cannot be written, ValueError for a checkpoint of another architecture.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Data,
        settings: TrainSettings,
        store: CheckpointStore,
        *,
        hooks: Hooks,
        ranks: Ranks | None = None,
    ) -> None:
        self.objective, self.data, self.settings = objective, data, settings
        self.store, self.hooks, self.ranks = store, hooks, (ranks := ranks or Ranks())
        self.bf16 = settings.precision == "bf16"
        self.model = model.to(ranks.device)
        if settings.compile:
            parallel.compile_blocks(self.model)
        if settings.activation_checkpointing:
            parallel.checkpoint_activations(self.model)
        self.module = parallel.spread(self.model, settings.strategy, ranks)
        self.parameters = list(self.model.parameters())
        self.optimizer = adamw(self.model.named_parameters(), settings.optim)
        self.peak, self.peak_age = peak_flops(ranks.device, bf16=self.bf16), time.monotonic()
        self.progress = self._resumed()
        self.guard = Guard(settings.largest_loss, ranks.device)
        self.loss_log = MeanLoss(ranks.device, self.progress.log_sum, self.progress.log_steps)
        self.loss_curve = MeanLoss(ranks.device, self.progress.curve_sum, self.progress.curve_steps)

    def _resumed(self) -> RunProgress:
        found = self._newest()
        if found is None:
            return RunProgress()
        parallel.load_model(self.model, found.model())
        parallel.load_optimizer(self.model, self.optimizer, found.optimizer())
        return RunProgress(**found.state["progress"])

    def _newest(self) -> Checkpoint | None:
        """Return the newest checkpoint; the first rank chooses, so that all go on from the same step."""
        found, error = None, None
        if self.ranks.first:
            try:
                found = self.store.newest()
            except ValueError as caught:
                error = str(caught)
        error = self.ranks.agree(error)
        if error is not None:
            raise ValueError(error)
        step = self.ranks.agree(None if found is None else found.step)
        return found if step is None or self.ranks.first else self.store.read(step)

    def run(self) -> RunProgress:
        """Take the steps that are left, and return what the run has to show."""
        settings, progress, last = self.settings, self.progress, self.settings.steps
        self.hooks.begin(progress.step)
        with Prefetcher(
            self.data.micro_batch,
            first=progress.step,
            last=last,
            micros=settings.accumulate,
            device=self.ranks.device,
        ) as batches:
            self.clock = Clock(progress.seconds)
            self.counts = Counts(progress.seconds)
            while progress.step < last:
                micros = batches.next()
                self._step(micros)
                self.counts.add(micros, batches.waited)
                progress.step += 1
                self._after_step(progress.step, final=progress.step == last)
        return progress

    def _step(self, micros: list[Batch]) -> None:
        settings, step, ranks = self.settings, self.progress.step, self.ranks
        set_learning_rate(self.optimizer, learning_rate(settings.optim, step, steps=settings.steps))
        self.model.train()
        losses = []
        for number, batch in enumerate(micros):
            torch.manual_seed(stream_seed(settings.seed, step, number, ranks.rank))
            with parallel.gradient_sync(self.module, on=number == len(micros) - 1):
                with self._autocast():
                    loss = self.objective.loss(self.module, batch) / len(micros)
                loss.backward()
            losses.append(loss.detach())
        loss = ranks.sum(torch.stack(losses).sum()) / ranks.world
        self.norm = clip_gradients(self.parameters, settings.optim.clip_norm)
        self.guard.look(step, loss, self.norm)
        if ranks.device.type == "cpu":  # where reading costs nothing, a bad loss is reported at once
            self._stop_if_bad()
        vars(self.optimizer).update(grad_scale=None, found_inf=self.guard.bad)  # AdamW reads them, undeclared
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_log.add(loss)
        self.loss_curve.add(loss)

    def _after_step(self, step: int, *, final: bool) -> None:
        settings, loss = self.settings, None
        metrics = self._log_line() if final or step % settings.log_every == 0 else {}
        if final or step % settings.validate_every == 0:
            loss = metrics["validation/loss"] = self._curve_row()
        if metrics:
            with self.clock.paused():
                self.hooks.log(step, metrics)
        snapshot = step in settings.snapshot_steps
        checkpoint = final or step % settings.checkpoint_every == 0
        if snapshot or checkpoint:
            self._stop_if_bad()
            with self.clock.paused():
                if snapshot:
                    weights = parallel.full_model(self.model)
                    self._on_first(lambda: self.store.save_snapshot(step, weights))
                if checkpoint:
                    self._save(loss)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16)

    def _stop_if_bad(self) -> None:
        """Raise TrainingStopped when a loss was bad. Waits for the device."""
        found = self.guard.read()
        if found is None:
            return
        raise TrainingStopped(
            f"training stopped at step {found.step + 1}, before its update: the loss is {found.loss:.4g} nats per token "
            f"(limit {self.settings.largest_loss:.4g}), the gradient norm {found.norm:.4g}; "
            f"{self._way_out()}"
        )

    def _way_out(self) -> str:
        return f"{self.store.last_good()}: lower lr, lengthen warmup_steps or set precision: fp32, and run again"

    def _log_line(self) -> dict[str, float]:
        """Read what the device has summed up; it is the host's first wait since the last line."""
        loss = self.loss_log.take()
        self._stop_if_bad()
        counts, world, seconds = self.counts, self.ranks.world, self.clock.seconds - self.counts.began
        images = counts.images * world / seconds
        training = flops.training_flops(self.objective.forward_flops(counts.patches / counts.images))
        metrics = {
            "train/loss": loss,
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/grad_norm": float(self.norm),
            "perf/images_per_s": images,
            "perf/tokens_per_s": counts.tokens * world / seconds,
            "perf/step_time": seconds / counts.steps,
            "perf/data_wait": counts.waited / seconds,
            "perf/memory_gb": memory_gb(self.ranks.device),
            "perf/mfu": training * images / (self.peak * world),
        }
        if counts.patches:
            metrics["perf/patches_per_s"] = counts.patches * world / seconds
            metrics["patch/mean_length"] = counts.tokens / counts.patches
        self.counts = Counts(self.clock.seconds)
        return metrics

    def _curve_row(self) -> float:
        """Validate, add a row to the curve and to the timings, and return the loss in nats per token."""
        train_loss = self.loss_curve.take()
        self._stop_if_bad()
        progress, seconds = self.progress, self.clock.seconds
        with self.clock.paused():
            loss = self._validation_loss()
            if self.ranks.device.type == "cpu" and time.monotonic() - self.peak_age > PEAK_SECONDS:
                self.peak, self.peak_age = peak_flops(self.ranks.device, bf16=self.bf16, again=True), time.monotonic()
        if not loss <= self.settings.largest_loss:  # NaN as well; all ranks have the same sum
            raise TrainingStopped(
                f"training stopped after step {progress.step}: the validation loss is {loss:.4g} nats per token (limit "
                f"{self.settings.largest_loss:.4g}); {self._way_out()}"
            )
        before = progress.timings[-1] if progress.timings else [0, 0.0, 0.0]
        images = (progress.step - before[0]) * self.settings.batch_size
        progress.timings.append([progress.step, seconds, images / (seconds - before[1])])
        progress.curve.append([progress.step, train_loss, loss])
        return loss

    @torch.no_grad()
    def _validation_loss(self) -> float:
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for batch, weight in self.data.validation():
            with self._autocast():
                loss = self.objective.loss(self.module, batch.to(self.ranks.device)).double()
            total += torch.stack([loss * weight, torch.full_like(loss, weight)])
        parallel.let_go(self.module)
        weighted, weights = self.ranks.sum(total).tolist()
        return float(weighted / weights)

    def _save(self, validation_loss: float | None) -> None:
        progress = self.progress
        progress.seconds = self.clock.seconds
        progress.log_sum, progress.log_steps = self.loss_log.peek()
        progress.curve_sum, progress.curve_steps = self.loss_curve.peek()
        weights = parallel.full_model(self.model)
        optimizer = parallel.full_optimizer(self.model, self.optimizer)
        state = {
            "progress": asdict(progress),
            "seed": self.settings.seed,
            "images": progress.step * self.settings.batch_size,
            "random": "every micro-batch seeds its generators from (seed, step, micro-batch, rank)",
            "ranks": self.ranks.world,
        }
        step = progress.step
        self._on_first(lambda: self.store.save(step, model=weights, optimizer=optimizer, state=state, score=validation_loss))
        self.hooks.checkpoint(step, self.store.where(step))

    def _on_first(self, write: Callable[[], object]) -> None:
        """Let the first rank write, and let all of them know when it could not."""
        error = None
        if self.ranks.first:
            try:
                write()
            except CheckpointError as caught:
                error = str(caught)
        error = self.ranks.agree(error)
        if error is not None:
            raise CheckpointError(error)


def stream_seed(*numbers: int) -> int:
    """Return a 63-bit seed for a random stream named by numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
