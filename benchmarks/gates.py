"""Which gate to sample with: entropy models of several sizes, and DPAR's own decoder, on a finished project.

    python benchmarks/gates.py [--root .] [--gates B,S,XS,own,decoder] [--images 450]

Trains an entropy model of each size on ROOT's tokens (`own` is ROOT's, which also cut the patches that its DPAR was
trained on), measures for each the threshold that gives `patching.target_mean_length` on training images, and samples and
scores images of ROOT's DPAR with it. The decoder's threshold is the one that gives this length on images it samples.

Agreement with gate B, at each gate's own threshold: of all tokens, the share that both begin a patch at, or both do not;
on held-out images for entropy models, on the sampled images for the decoder.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpar_core.data.shards import TokenShards
from dpar_core.models.gpt import GPT, entropies_of
from dpar_core.patches.maps import read_rule
from dpar_core.patches.rule import patch_starts_numpy, starts_from_lengths, threshold_for_mean_length
from pipeline.commands.sweep import subject_of
from stages import entropy_model
from stages import params as P
from stages.artifacts import ENTROPY_MODEL, TOKENS
from stages.entropies import load_entropy_model
from stages.shared.sampler import Sampler
from stages.tools.sweep import Point, Subject, Trial, run_trial
from stages.tracker import PrintTracker

STEPS = {"B": 150, "S": 250, "XS": 250}
LR = {"B": 3e-4, "S": 6e-4, "XS": 1e-3}
IMAGES = 500  # whose entropies are measured, of each split
DRAWN = 64  # images a try at the decoder's threshold
SEED = 30_000_000


@dataclass
class Gate:
    """A way to decide where patches begin. model: an entropy model's file, None for the decoder."""

    name: str
    model: Path | None
    parameters: int
    loss: float
    threshold: float = float("nan")
    agreement: float = float("nan")


def train_gate(name: str, params: P.Params, tokens: Path, folder: Path) -> Gate:
    """Train an entropy model of a named size through the stage that does it."""
    steps = STEPS[name]
    changes = {"steps": steps, "lr": LR[name], "lr_schedule": "cosine", "validate_every": steps, "checkpoint_every": steps}
    training = params.entropy_model.train.model_copy(update=changes)
    section = params.entropy_model.model_copy(update={"size": name, **P.ENTROPY_MODEL_SIZES[name], "train": training})
    (folder / "work").mkdir(parents=True, exist_ok=True)
    files = [folder / file for file in ("model.safetensors", "metrics.json", "curve.csv", "timings.json")]
    entropy_model.run(
        entropy_model.Params(params.seed, section),
        entropy_model.Inputs(tokens),
        entropy_model.Outputs(*files),
        PrintTracker(),
        device="cpu",
        work=folder / "work",
    )
    return read_gate(name, folder)


def read_gate(name: str, folder: Path) -> Gate:
    metrics = json.loads((folder / "metrics.json").read_text())
    return Gate(name, folder / "model.safetensors", metrics["parameters"], metrics["validation/loss"])


@torch.inference_mode()
def entropies(model: GPT, shards: TokenShards) -> np.ndarray:
    """Return the entropies of the first views of images spread over a split: (n, T) float32."""
    index = np.linspace(0, len(shards) - 1, min(IMAGES, len(shards))).astype(np.int64)
    tokens = torch.from_numpy(shards.tokens(index, np.zeros_like(index)).astype(np.int64))
    return torch.cat([entropies_of(model, part) for part in tokens.split(64)]).numpy()


def decoder_threshold(subject: Subject, target: float, tokens: int) -> float:
    """Return the threshold in nats at which images sampled with the decoder as gate have the mean patch length."""
    low, high = 0.0, 8.0
    for _ in range(7):
        middle = (low + high) / 2
        lengths = sample_with(subject, middle).patch_lengths
        if DRAWN * tokens / sum(map(len, lengths)) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def sample_with(subject: Subject, threshold: float) -> Any:
    section = subject.sample.model_copy(update={"threshold": threshold})
    sampler = Sampler(subject.models[None], section, device=subject.device)
    return sampler.generate([i % sampler.config.num_classes for i in range(DRAWN)], list(range(SEED, SEED + DRAWN)))


def measure(gate: Gate, subject: Subject, images: int, folder: Path) -> dict[str, Any]:
    """Draw and score images with a gate."""
    trial = Trial(Point(gate.threshold, subject.sample.cfg_scale), images, SEED, final=True)
    folder.mkdir(parents=True, exist_ok=True)
    found = run_trial(subject, trial, folder, folder / "work")
    name = subject.distance
    row = {
        "gate": gate.name,
        "parameters": gate.parameters,
        "threshold": gate.threshold,
        "agreement": gate.agreement,
        "mean_length": found.patches["patch/mean_length"],
        "distance": found.value(name),
        "interval": found.interval(name),
        "images_per_s": found.images_per_s,
    }
    if gate.model:
        row["validation_loss"] = gate.loss
    low, high = row["interval"]
    score = f"{name} {row['distance']:.3f} ({low:.2f} to {high:.2f}), {row['images_per_s']:.1f} images/s"
    shape = f"{gate.parameters / 1e6:6.2f} M, loss {gate.loss:.3f}, threshold {gate.threshold:.3f}"
    agreement = f"agreement {gate.agreement:.3f}, mean length {row['mean_length']:.3f}"
    print(f"{gate.name:8} {shape}, {agreement}, {score}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--gates", default="B,S,XS,own,decoder")
    parser.add_argument("--images", type=int, default=450)
    parser.add_argument("--folder", type=Path, default=Path("work/gates"), help="under ROOT; trained gates stay there")
    options = parser.parse_args()
    os.chdir(options.root)
    subject, params = subject_of("dpar", None)
    tokens, folder = Path(TOKENS.path).resolve(), options.folder.resolve()
    train, held_out = TokenShards(tokens, "train"), TokenShards(tokens, "validation")
    files, rule = subject.models[None], read_rule(subject.models[None].rule)
    target, names = params.patching.target_mean_length, options.gates.split(",")
    rows, starts, models = [], {}, {}
    for name in ["B", *(n for n in names if n != "B")]:
        if name == "decoder":
            its = replace(subject, sample=subject.sample.model_copy(update={"gate": "decoder"}))
            gate = Gate("decoder", None, 0, float("nan"), decoder_threshold(its, target, train.meta.tokens))
            sampled = sample_with(its, gate.threshold)
            b = models["B"]
            with torch.inference_mode():
                e = entropies_of(load_entropy_model(b.model, held_out, "cpu")[0], sampled.tokens).numpy()
            own = starts_from_lengths(sampled.patch_lengths, train.meta.tokens)
            gate.agreement = float((own == patch_starts_numpy(e, replace(rule, threshold=b.threshold))).mean())
        else:
            place = Path(ENTROPY_MODEL.path).resolve().parent if name == "own" else folder / name
            gate = read_gate(name, place) if (place / "metrics.json").exists() else train_gate(name, params, tokens, place)
            model = load_entropy_model(gate.model, train, "cpu")[0]
            gate.threshold = threshold_for_mean_length(entropies(model, train), rule, target)
            starts[name] = patch_starts_numpy(entropies(model, held_out), replace(rule, threshold=gate.threshold))
            models[name], gate.agreement = gate, float((starts[name] == starts["B"]).mean())
            its = replace(subject, models={None: replace(files, entropy_model=gate.model)})
        if name in names:
            rows.append(measure(gate, its, options.images, folder / "results"))
    print("RESULT " + json.dumps({"images": options.images, "gates": rows}))


if __name__ == "__main__":
    main()
