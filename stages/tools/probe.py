"""Linear probe: how much of an image's class a trained model's frozen features show (DPAR, representation quality)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpar_core.data.images import CENTER_VIEWS
from dpar_core.data.shards import TokenShards
from dpar_core.evaluation.block_features import block_features, block_names
from dpar_core.files import Weights
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT
from dpar_core.models.load import read_trained, role_of
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.maps import PatchMaps
from dpar_core.training.order import fixed_subset
from dpar_core.training.prefetch import Batch
from stages.tracker import Tracker

BATCH = 32  # images whose features are computed at once
_INVERSE_PENALTY = 0.1  # C of scikit-learn's logistic regression, on standardised features


@dataclass(frozen=True)
class Probe:
    """What one block shows. top1, top5: share of held-out images whose class is the first, or among the first five."""

    block: str
    top1: float
    top5: float


@dataclass(frozen=True)
class ProbedModel:
    """What all blocks of a model show. model: digest of its weights; step: at which it was saved."""

    model: str
    step: int
    best: Probe
    blocks: list[Probe]


@dataclass(frozen=True)
class ProbeReport:
    """Models by name, how many images and classes were used (train, held_out, classes), and the digest of the tokens."""

    models: dict[str, ProbedModel]
    images: dict[str, int]
    tokens: str


@dataclass(frozen=True)
class SplitFeatures:
    """Features of some images: (L, n, D) float32, and their labels (n,)."""

    features: np.ndarray
    labels: np.ndarray


def load_model(path: Path, shards: TokenShards) -> tuple[GPT | DPAR, Weights]:
    """Read a trained model. Raises ValueError when it was trained on other tokens, or has no classes."""
    trained = read_trained(path, role_of(path), made_with={"tokens": shards.digest})
    if trained.role == "entropy_model":
        raise ValueError(f"{path} is an entropy model, which knows no classes: probe dpar or llamagen")
    return trained.build(), trained.weights


def features_of(
    model: GPT | DPAR, shards: TokenShards, patch_maps: Path, images: int, tracker: Tracker, *, device: str
) -> SplitFeatures:
    """Return features of evenly spaced images (their centre crops) of a split, for every block."""
    chosen = fixed_subset(len(shards), images)
    maps = PatchMaps(patch_maps, shards) if isinstance(model.config, DPARConfig) else None
    model.to(device)
    found = []
    with tracker.progress(len(chosen), f"features {shards.split}", unit="images") as progress:
        for first in range(0, len(chosen), BATCH):
            indices = chosen[first : first + BATCH]
            views = np.full(len(indices), CENTER_VIEWS[shards.meta.views])
            tokens = torch.from_numpy(shards.tokens(indices, views).astype(np.int64))
            layout = None
            if maps is not None:
                layout = PatchLayout.from_lengths(maps.lengths(indices, views), row_width=shards.meta.row_width)
            read = Batch(tokens, None, layout).to(torch.device(device))
            found.append(block_features(model, read).cpu().numpy())
            progress.advance(len(indices))
    return SplitFeatures(np.concatenate(found, axis=1), np.asarray(shards.labels)[chosen])


def probe(model: GPT | DPAR, train: SplitFeatures, held_out: SplitFeatures) -> list[Probe]:
    """Fit a logistic regression on the features of each block and test it on held-out images.

    Raises ValueError when the training images show fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(train.labels)
    if len(classes) < 2:
        raise ValueError(f"a probe needs images of at least two classes, found {len(classes)}: give more --images")
    probes = []
    for name, seen, unseen in zip(block_names(model), train.features, held_out.features):
        mean, spread = seen.mean(0), seen.std(0) + 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps are far past what changes the top class
            fitted = LogisticRegression(C=_INVERSE_PENALTY, max_iter=300).fit((seen - mean) / spread, train.labels)
        ranked = classes[np.argsort(-fitted.predict_log_proba((unseen - mean) / spread), axis=1, kind="stable")]
        right = ranked == held_out.labels[:, None]
        probes.append(Probe(name, float(right[:, 0].mean()), float(right[:, :5].any(1).mean())))
    return probes
