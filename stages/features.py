"""Train the demo's feature network: a classifier of the training crops, used where no Inception file is at hand.

Where scores come from a file (`score.features: inception`), nothing is trained and the outputs record no classifier.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dpar_core.data.manifest import read_manifest
from dpar_core.evaluation.features import DemoClassifier
from dpar_core.files import save_weights, write_json
from dpar_core.training.order import DataOrder, random_subset
from stages import params as P
from stages.data import ManifestOpener
from stages.shared.crops import CenterCrops
from stages.terminal import print_fitted
from stages.tracker import Tracker

MEASURED_IMAGES = 1000  # of a split, on which accuracy is measured


@dataclass(frozen=True)
class Params:
    seed: int
    data: P.Data
    features: str = field(metadata={"section": "score.features"})
    demo_classifier: P.DemoClassifier = field(metadata={"section": "score.demo_classifier"})


@dataclass(frozen=True)
class Inputs:
    manifest: Path


@dataclass(frozen=True)
class Outputs:
    weights: Path
    metrics: Path


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Train the classifier (seconds, so an interrupted run starts it anew) and measure its accuracy."""
    if params.features != "demo":
        print_fitted(f"features: score.features is {params.features}, so no classifier is trained")
        save_weights(outputs.weights, {}, kind="no_classifier", config={}, meta={"features": params.features})
        write_json(outputs.metrics, {})
        return
    manifest = read_manifest(inputs.manifest)
    tracker.log_input("manifest", inputs.manifest, manifest.digest)
    settings, size = params.demo_classifier, params.data.image_size
    opener = ManifestOpener(manifest)
    torch.manual_seed(params.seed)
    model = DemoClassifier(len(manifest.classes)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    rows = manifest.split("train")
    images, labels = CenterCrops(rows, opener, size), np.array([row.label for row in rows])
    order = DataOrder(images=len(rows), views=2, batch_size=settings.batch_size, seed=params.seed)
    with tracker.progress(settings.steps, "features", unit="steps") as progress:
        for step in range(settings.steps):
            picks = order.batch(step)
            crops = images.batch(picks.indices, picks.views)
            batch = torch.from_numpy(crops.images).to(device).permute(0, 3, 1, 2).float()
            loss = F.cross_entropy(model(batch), torch.from_numpy(labels[crops.indices]).to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress.advance(1, loss=loss.item())
            if (step + 1) % 20 == 0:
                tracker.log_metrics({"train/loss": loss.item()}, step=step + 1)
    if (note := images.note("training")) is not None:
        print_fitted(note)
    metrics = {
        f"features/{split}_accuracy": _accuracy(model, CenterCrops(manifest.split(split), opener, size), device=device)
        for split in ("train", "validation")
    }
    tracker.log_metrics(metrics)
    write_json(outputs.metrics, metrics)
    meta = {"manifest": manifest.digest, "image_size": size}
    save_weights(
        outputs.weights, model.state_dict(), kind="demo_classifier", config={"num_classes": len(manifest.classes)}, meta=meta
    )


@torch.inference_mode()
def _accuracy(model: DemoClassifier, images: CenterCrops, *, device: str) -> float:
    """Return the share whose class is found of up to MEASURED_IMAGES images, chosen at random: rows have an order."""
    model.eval()
    crops, right = images.readable(random_subset(len(images), MEASURED_IMAGES)), 0
    labels = np.array([images.rows[index].label for index in crops.indices])
    for first in range(0, len(labels), 64):
        batch = torch.from_numpy(crops.images[first : first + 64]).to(device).permute(0, 3, 1, 2).float()
        right += int((model(batch).argmax(dim=1).cpu().numpy() == labels[first : first + 64]).sum())
    return right / len(labels)
