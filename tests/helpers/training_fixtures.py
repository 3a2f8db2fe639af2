"""A tiny training set and objectives, made in memory: 16 codes, a 4 x 4 grid, 37 images of two kinds."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dpar_core.models import flops
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig, next_token_loss
from dpar_core.patches.layout import PatchLayout
from dpar_core.training.checkpoint import Architecture, CheckpointStore
from dpar_core.training.loop import TrainingRun, TrainSettings
from dpar_core.training.optim import OptimSettings
from dpar_core.training.order import DataOrder
from dpar_core.training.parallel import Ranks
from dpar_core.training.prefetch import Batch

GRID, CODES, IMAGES = 4, 16, 37
GPT_CONFIG = GPTConfig(CODES, GRID, 32, 2, 2, ffn_multiple=32, num_classes=2, dropout=0.1, class_dropout=0.1)
DPAR_CONFIG = DPARConfig(CODES, GRID, 32, 2, 1, 1, 1, num_classes=2, ffn_multiple=32, dropout=0.1, class_dropout=0.1)


def tiny_images() -> tuple[np.ndarray, np.ndarray]:
    """Tokens (37, 16) and labels (37,): class 0 counts up, class 1 counts down, with some noise."""
    random = np.random.default_rng(5)
    labels = np.arange(IMAGES) % 2
    ramp = np.arange(GRID * GRID)
    tokens = np.where(labels[:, None] == 0, ramp, ramp[::-1])
    noise = random.integers(0, CODES, tokens.shape)
    return np.where(random.random(tokens.shape) < 0.2, noise, tokens), labels


class TinyData:
    """Batches of the tiny set for one rank."""

    def __init__(self, settings: TrainSettings, ranks: Ranks | None = None, *, patches: bool = False) -> None:
        self.settings, self.ranks, self.patches = settings, ranks or Ranks(), patches
        self.tokens, self.labels = tiny_images()
        self.order = DataOrder(images=IMAGES, views=1, batch_size=settings.batch_size, seed=settings.seed)

    def _batch(self, indices: np.ndarray) -> Batch:
        layout = None
        if self.patches:
            lengths = [np.array([1, 2, 1] * 4) if i % 3 else np.array([1, 3, 4, 4, 4]) for i in indices]
            layout = PatchLayout.from_lengths(lengths, row_width=GRID)
        return Batch(torch.from_numpy(self.tokens[indices]), torch.from_numpy(self.labels[indices]), layout)

    def micro_batch(self, step: int, micro: int) -> Batch:
        rank, world = self.ranks.rank, self.ranks.world
        part = self.order.part(step, rank=rank, ranks=world, micro=micro, micros=self.settings.accumulate)
        return self._batch(part.indices)

    def validation(self):
        mine = np.arange(8).reshape(-1, self.ranks.world)[:, self.ranks.rank]
        yield self._batch(mine), float(len(mine))


class BaselineObjective:
    def loss(self, model, batch):
        return next_token_loss(model, batch.tokens, batch.labels)

    def forward_flops(self, patches):
        return flops.gpt_forward_flops(GPT_CONFIG)


class DPARObjective:
    def loss(self, model, batch):
        return model(batch.tokens, batch.labels, batch.layout, targets=batch.tokens)

    def forward_flops(self, patches):
        return flops.dpar_forward_flops(DPAR_CONFIG, patches)


@dataclass
class Recorder:
    """Hooks that remember, and break the run off (as a crash would) after `crash_after` steps."""

    crash_after: int | None = None
    began: list[int] = field(default_factory=list)
    lines: dict[int, dict[str, float]] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)

    def begin(self, step):
        self.began.append(step)

    def log(self, step, metrics):
        self.lines[step] = metrics
        if self.crash_after is not None and step >= self.crash_after:
            raise KeyboardInterrupt

    def checkpoint(self, step, address):
        self.checkpoints.append(step)


def tiny_settings(**changes) -> TrainSettings:
    values = dict(
        steps=12,
        batch_size=8,
        seed=3,
        largest_loss=9.0,
        validate_every=4,
        checkpoint_every=5,
        log_every=1,
        optim=OptimSettings(lr=3e-3, warmup_steps=2),
    )
    return TrainSettings(**{**values, **changes})


def tiny_model(kind: str):
    torch.manual_seed(0)
    return GPT(GPT_CONFIG) if kind == "gpt" else DPAR(DPAR_CONFIG)


def tiny_store(root: Path, kind: str, **options) -> CheckpointStore:
    return CheckpointStore(root, Architecture(kind, {"size": "tiny"}), **options)


def tiny_run(root: Path, kind: str = "gpt", *, hooks=None, ranks=None, **changes):
    """Train in `root` and return (progress, final weights or None on other ranks, hooks)."""
    settings = tiny_settings(**changes)
    hooks = hooks or Recorder()
    data = TinyData(settings, ranks, patches=kind == "dpar")
    objective = BaselineObjective() if kind == "gpt" else DPARObjective()
    store = tiny_store(root, kind)
    progress = TrainingRun(tiny_model(kind), objective, data, settings, store, hooks=hooks, ranks=ranks).run()
    return progress, store.newest(), hooks
