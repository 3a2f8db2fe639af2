"""A training step of DPAR against its LlamaGen baseline and against plain PyTorch, by the clock and by FLOPs.

    python benchmarks/train_step.py --size B L/4 --batch 8 [--repeats 5] [--precision fp32] [--device cpu] [--compile]

Forward, loss, backward, clipping and AdamW with the project's networks, loss and optimizer, in a bare loop of this file
(nothing is loaded, logged or guarded), on random tokens (16 x 16 of 16,384 codes) with patch plans of mean length 1.81 and
at most 4, whose number of patches differs between images as on the demo's photographs. Every round has a batch of its own,
which the three take in turns; medians are shown. `L/4` has L's width with a quarter of its layers. "plain" is the baseline's
architecture as one writes it first; it shows that the baseline is not slow. The last figure, efficiency, is the
ratio of speeds over the ratio that the FLOPs promise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dpar_core.models import flops
from dpar_core.models.dpar import DPAR, DPARConfig, spare_rows
from dpar_core.models.gpt import GPT, GPTConfig, next_token_loss
from dpar_core.models.layers import PackedCausal, has_ragged_attention
from dpar_core.models.sizes import MODEL_SIZES, ModelSize
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.rule import PatchRule, lengths_from_starts, patch_starts_numpy, threshold_for_mean_length
from dpar_core.system import cpus
from dpar_core.training.allocator import keep_freed_blocks
from dpar_core.training.meters import peak_flops
from dpar_core.training.optim import OptimSettings, adamw, clip_gradients
from dpar_core.training.parallel import compile_blocks

CODES, ROW, CLASSES, MEAN, MAX = 16384, 16, 1000, 1.81, 4
TOKENS = ROW * ROW
SIZES = {
    **MODEL_SIZES,
    "L/4": MODEL_SIZES["L"]._replace(patch_layers=4, decoder_layers=1),
    "tiny": ModelSize(64, 4, 1, 2, 1),
}
OPTIM = OptimSettings(lr=1e-4)


class PlainBlock(nn.Module):
    """LlamaGen's block, written straight down."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)), 0.1, self.training)
        y = self.norm2(x)
        return x + F.dropout(self.down(F.silu(self.gate(y)) * self.up(y)), 0.1, self.training)


class PlainGPT(nn.Module):
    """LlamaGen's network, written straight down."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.classes, self.tokens = nn.Embedding(CLASSES + 1, config.width), nn.Embedding(CODES, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config.width, config.heads, config.hidden) for _ in range(config.layers))
        self.norm, self.output = nn.RMSNorm(config.width, eps=1e-5), nn.Linear(config.width, CODES, bias=False)
        angles = torch.arange(TOKENS)[:, None] * 10000.0 ** -(torch.arange(config.width // config.heads // 2) / 32)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.classes(labels)[:, None], self.tokens(tokens[:, :-1])], dim=1)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.output(self.norm(x))


@dataclass
class Contender:
    """A model with its optimizer, ready to step."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    bf16: bool
    device: torch.device

    def step(self, tokens: torch.Tensor, labels: torch.Tensor, layout: PatchLayout) -> float:
        """Take one training step; return its seconds."""
        self.wait()
        started = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.name == "dpar":
                loss = self.model(tokens, labels, layout, targets=tokens)
            elif self.name == "llamagen":
                loss = next_token_loss(self.model, tokens, labels)
            else:
                loss = F.cross_entropy(self.model(tokens, labels).float().flatten(0, 1), tokens.flatten())
        loss.backward()
        clip_gradients(list(self.model.parameters()), OPTIM.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Round(NamedTuple):
    """What all contenders train on in one round, and the patch lengths of its images."""

    tokens: torch.Tensor
    labels: torch.Tensor
    layout: PatchLayout
    lengths: list[np.ndarray]


def plans(batch: int, rounds: int, seed: int) -> list[list[np.ndarray]]:
    """Return patch lengths of a batch for every round, as the rule cuts random entropies at a mean of 1.81.

    An image's entropies share an offset as wide as their noise: so patches per image spread by 0.39 of their mean, as
    those of the demo's photographs do (0.389 on 4,500 training views, 0.386 on 450 validation views).
    """
    rng, images = np.random.default_rng(seed), max(16 * rounds * batch, 1024)
    entropies = (rng.normal(size=(images, TOKENS)) + rng.normal(size=(images, 1))).astype(np.float32)
    threshold = threshold_for_mean_length(entropies, PatchRule("entropy_rows", ROW, 0.0, MAX), MEAN)
    starts = patch_starts_numpy(entropies, PatchRule("entropy_rows", ROW, float(threshold), MAX))
    # the batches whose number of patches is nearest to the mean, so that the FLOPs are those of the mean length
    batches = starts[: images // batch * batch].reshape(-1, batch, TOKENS)
    nearest = np.argsort(abs(batches.sum((1, 2)) - batch * TOKENS / MEAN), kind="stable")[:rounds]
    return [lengths_from_starts(batches[number]) for number in nearest]


def make_rounds(batch: int, rounds: int, device: torch.device) -> list[Round]:
    """Draw a batch for every round."""
    rng = np.random.default_rng(1)
    return [
        Round(
            torch.from_numpy(rng.integers(0, CODES, (batch, TOKENS))).to(device),
            torch.from_numpy(rng.integers(0, CLASSES, batch)).to(device),
            PatchLayout.from_lengths(lengths, row_width=ROW).to(device),
            lengths,
        )
        for lengths in plans(batch, rounds, 2)
    ]


def padding_waste(dpar: DPARConfig, rounds: list[Round], *, bf16: bool) -> float:
    """Return the FLOPs spent on rows that hold no patch, as a share of all that the forward passes need.

    That is the spare rows, and attention of the patch transformer on (B, most) rows instead of the images' own, where
    the device cannot attend to a ragged list and images are too small to attend one after the other.
    """
    device = rounds[0].tokens.device
    dtype = torch.bfloat16 if bf16 else torch.float32
    head = torch.empty(1, dpar.heads, dpar.width // dpar.heads, device=device, dtype=dtype)
    needed = padded = 0.0
    for one in rounds:
        counts = np.array([len(lengths) for lengths in one.lengths])
        needed += sum(flops.dpar_forward_flops(dpar, count) for count in counts)
        padded += spare_rows(one.layout.patches, device) * dpar.patch_layers * flops.block_flops(dpar.width, dpar.hidden)
        packed = PackedCausal(one.layout.offsets, rows=one.layout.patches, longest=one.layout.most_patches)
        if not has_ragged_attention(head) and not packed.pays_alone(head):
            squares = len(counts) * counts.max() ** 2 - (counts**2).sum()
            padded += 4 * dpar.width * dpar.patch_layers * squares
    return float(padded / needed)


def contenders(
    size: str, device: torch.device, *, bf16: bool, compiled: bool
) -> tuple[list[Contender], DPARConfig, GPTConfig]:
    """Build the three models."""
    width, heads, encoder, patch, decoder = SIZES[size]
    dpar = DPARConfig(CODES, ROW, width, heads, encoder, patch, decoder, CLASSES, dropout=0.1, class_dropout=0.1)
    baseline = GPTConfig(
        CODES, ROW, width, heads, encoder + patch + decoder, num_classes=CLASSES, dropout=0.1, class_dropout=0.1
    )
    found = []
    for name, build in (
        ("dpar", lambda: DPAR(dpar)),
        ("llamagen", lambda: GPT(baseline)),
        ("plain", lambda: PlainGPT(baseline)),
    ):
        torch.manual_seed(0)
        model = build().to(device).train()
        if compiled and name != "plain":
            compile_blocks(model)
        found.append(Contender(name, model, adamw(model.named_parameters(), OPTIM), bf16, device))
    return found, dpar, baseline


def measure(size: str, options: argparse.Namespace, device: torch.device) -> dict:
    """Train all contenders of a size in turns, print what was found and return it."""
    bf16 = options.precision == "bf16"
    models, dpar, baseline = contenders(size, device, bf16=bf16, compiled=options.compile)
    if options.without_plain:
        models = models[:2]
    rounds = make_rounds(options.batch, options.repeats + 1, device)
    seconds: dict[str, list[float]] = {one.name: [] for one in models}
    for number, one_round in enumerate(rounds):  # the first round warms up
        for one in models[number % len(models) :] + models[: number % len(models)]:
            taken = one.step(one_round.tokens, one_round.labels, one_round.layout)
            if number:
                seconds[one.name].append(taken)
    speed = {name: options.batch / statistics.median(taken) for name, taken in seconds.items()}
    counts = np.array([len(lengths) for one in rounds for lengths in one.lengths])
    patches, waste = counts.mean(), padding_waste(dpar, rounds, bf16=bf16)
    needed = flops.dpar_forward_flops(dpar, patches)
    promised = flops.gpt_forward_flops(baseline) / needed
    utilisation = flops.training_flops(needed) * speed["dpar"] / peak_flops(device, bf16=bf16)
    ratio = speed["dpar"] / speed["llamagen"]
    print(f"{size}, batch {options.batch}, {options.precision}, {device}, {torch.get_num_threads()} threads")
    print(
        f"mean patch length {TOKENS / patches:.3f}; patches per image {counts.min()} to {counts.max()}, "
        f"spread {counts.std() / patches:.2f} of their mean"
    )
    for name, value in speed.items():
        spread = max(seconds[name]) / min(seconds[name])
        step = statistics.median(seconds[name])
        print(f"  {name:10} {value:8.3f} images/s   step {step:7.3f} s   slowest/fastest {spread:.2f}")
    print(f"padding waste {waste:.2%} of all forward FLOPs, DPAR's utilisation {utilisation:.1%} of the peak")
    print(f"ratio {ratio:.3f}, promised by FLOPs {promised:.3f}, efficiency {ratio / promised:.3f}")
    found = {
        "size": size,
        "batch": options.batch,
        "precision": options.precision,
        "device": str(device),
        "dpar_images_per_s": speed["dpar"],
        "llamagen_images_per_s": speed["llamagen"],
        "ratio": ratio,
        "flop_ratio": promised,
        "efficiency": ratio / promised,
        "padding_waste": waste,
        "utilisation": utilisation,
        "mean_length": TOKENS / patches,
    }
    if "plain" in speed:
        print(f"baseline against plain code {speed['llamagen'] / speed['plain']:.3f}")
        found |= {"plain_images_per_s": speed["plain"], "baseline_against_plain": speed["llamagen"] / speed["plain"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), nargs="+", default=["B", "L/4"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--without-plain", action="store_true", help="leave the yardstick out, where memory is short")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or cpus())
    keep_freed_blocks()  # as workers do, and for plain code too
    found = [measure(size, options, torch.device(options.device)) for size in options.size]
    print("RESULT " + json.dumps({**found[0], "sizes": found}))


if __name__ == "__main__":
    main()
