"""The whole truth about one GPU in at most eight minutes: is it right, and how fast.

    python benchmarks/gpu.py [--out gpu.json] [--parts correctness,sampling,training,data] [--budget 480]
    python benchmarks/gpu.py --parts sampling --sizes XL --batches 256 [--fused 512]       # one gap of the table
    python benchmarks/gpu.py --device cpu --tiny        # the same code on tiny models, in seconds

Needs torch (2.11 or later), numpy, pyarrow, pillow and safetensors, on CUDA the Triton that comes with torch, and the
folders dpar_core, benchmarks and tests/golden of this repository; nothing is installed or downloaded.

Parts run in order of value, each with a share of the budget; what a part finds is written to --out as it comes, and the
last line is `RESULT {json}`. A part that fails is reported and the others run; the exit status is then 1.

1. correctness: golden runs of the published code on the device; the static decoder, captured and eager, against the ragged
   one and against the whole network on the whole prefix, in float32.
2. sampling: images/s of DPAR (gates XS and B) and of its LlamaGen baseline, guidance 2, bfloat16, VQ decoding excluded.
3. training: images/s, MFU and memory. 4. data: tokenizing and entropies in views/s.

Random weights (models of one shape cost the same whatever they know). Random tokens are given to the
sampler, which computes everything as usual, and the gate's threshold is set for the published mean patch length on them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

if not __package__:  # started by its path: again as a module, so that this repository's packages are found
    here = str(Path(__file__).resolve().parents[1])
    os.execve(
        sys.executable, [sys.executable, "-P", "-m", "benchmarks.gpu", *sys.argv[1:]], {**os.environ, "PYTHONPATH": here}
    )

from dpar_core.choices import Strategy
from dpar_core.generation.generate import DPARGenerator, Generated, GPTGenerator
from dpar_core.generation.sampling import SampleSettings, filter_logits, guide, sample_tokens, uniforms
from dpar_core.generation.static import Schedule
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.flops import dpar_forward_flops, gpt_forward_flops
from dpar_core.models.gpt import GPT, GPTConfig, entropies_of, next_token_entropies
from dpar_core.models.sizes import GATE_SIZES, MODEL_SIZES, GateSize, ModelSize
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.rule import PatchRule, lengths_from_starts, patch_starts, threshold_for_mean_length

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
MEAN_LENGTH, MAX_LENGTH, CLASSES = 1.81, 4, 1000
IN_A_ROW = 4  # images that a place takes one after another where images are at tokens of their own (schedule rounds)
Write = Callable[[dict[str, Any]], None]
begun = time.monotonic()


def say(words: str) -> None:
    """Print a line of progress."""
    print(f"[{time.monotonic() - begun:6.1f} s] {words}", flush=True)


@dataclass(frozen=True)
class Scale:
    """What a run measures: the real sizes, or tiny ones that only show that everything runs."""

    codes: int
    row: int
    sizes: dict[str, ModelSize]
    gates: dict[str, GateSize]
    batches: tuple[int, ...]
    repeats: int
    dtype: torch.dtype


REAL = Scale(
    16384,
    16,
    {name: MODEL_SIZES[name] for name in ("B", "XL")},
    {name: GATE_SIZES[name] for name in ("XS", "B")},
    (1, 64, 256),
    3,
    torch.bfloat16,
)
TINY = Scale(16, 4, {"tiny": ModelSize(32, 2, 1, 2, 1)}, {"XS": GateSize(16, 1, 1)}, (1, 9), 1, torch.float32)


def lively(model: torch.nn.Module, seed: int) -> Any:
    """Random weights large enough that attention and norms matter, so that a mistake shows in the tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale, offset = (0.3, 1.0) if "norm" in name else (parameter.shape[-1] ** -0.5, 0.0)
            scale = 0.6 if "output" in name or "emb" in name else scale
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)
    return model.eval().requires_grad_(False)


def started(model: torch.nn.Module) -> Any:
    """Weights as at the start of training, and an output layer that is not zero."""
    torch.nn.init.normal_(model.output.weight, std=2 * model.config.width**-0.5)
    return model.eval().requires_grad_(False)


def dpar_config(scale: Scale, size: ModelSize) -> DPARConfig:
    return DPARConfig(scale.codes, scale.row, *size, CLASSES, 256 if scale.codes == REAL.codes else 32)


def gpt_config(scale: Scale, width: int, heads: int, layers: int, classes: int | None) -> GPTConfig:
    return GPTConfig(scale.codes, scale.row, width, heads, layers, 256 if scale.codes == REAL.codes else 32, classes)


# Part 1: correctness


@torch.inference_mode()
def uncached(model: DPAR, gate: GPT | None, labels: Tensor, seeds: list[int], settings: SampleSettings) -> Generated:
    """Sample with the whole network on the whole prefix for every token."""
    count, rule, device = model.config.tokens, settings.rule, labels.device
    assert rule is not None
    tokens, kept = torch.zeros(len(labels), 0, dtype=torch.int64, device=device), []
    entropies = torch.full((len(labels), count), float("nan"))
    numbers, scales = uniforms(seeds, count).to(device), settings.scales(count).to(device)
    null = torch.full_like(labels, model.config.num_classes)

    def logits(layout: PatchLayout, to: Tensor) -> Tensor:
        return model(tokens, to, layout)[:, -1]

    def layout_of(starts: Tensor) -> PatchLayout:
        return PatchLayout.from_lengths(lengths_from_starts(starts.numpy()), row_width=rule.row_width).to(device)

    for t in range(count):
        starts = patch_starts(entropies[:, : t + 1], rule)
        if t and gate is not None:
            entropies[:, t] = next_token_entropies(gate(tokens)[:, -1]).cpu()
        elif t and rule.reads_entropies:
            stays = torch.cat([starts[:, :t], torch.zeros(len(labels), 1, dtype=torch.bool)], dim=1)
            asked = next_token_entropies(logits(layout_of(stays), labels)).cpu()
            entropies[:, t] = torch.where(starts[:, t], float("nan"), asked)
        layout = layout_of(patch_starts(entropies[:, : t + 1], rule))
        guided = guide(logits(layout, labels), logits(layout, null), scales[t].expand(len(labels)))
        kept.append(guided)
        tokens = torch.cat([tokens, sample_tokens(guided, numbers[:, t], settings)[:, None]], dim=1)
    return Generated(tokens, [], entropies, torch.stack(kept, dim=1))


def unexplained(found: Tensor, expected: Generated, seeds: list[int], settings: SampleSettings | None = None) -> int:
    """Count images whose tokens differ although no rounding can turn them.

    Sums in another order move the cumulative distribution by some 1e-6, and a token falls differently where its random
    number lies that near to the border between the two; the tokens after it are then those of another image. So an image
    counts where the number at its first differing token is further than 1e-4 from that border.
    """
    found, tokens = found.cpu(), expected.tokens.cpu()
    assert expected.logits is not None
    numbers, wrong = uniforms(seeds, tokens.shape[1]), 0
    for image in (found != tokens).any(1).nonzero().flatten().tolist():
        first = int((found[image] != tokens[image]).nonzero()[0])
        logits = expected.logits[image, first].cpu()
        if settings is not None:
            logits = filter_logits(logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        low, high = sorted((int(found[image, first]), int(tokens[image, first])))
        border = cumulative[low:high]  # of tokens in between, if any, the probability is nearly nothing
        near = bool((border - numbers[image, first]).abs().max() < 1e-4)
        say(f"image {image} differs from token {first} on: {low} or {high}, {'by rounding' if near else 'NOT by rounding'}")
        wrong += not near
    return wrong


def golden_cases(device: torch.device, encodings: tuple[str, ...]) -> dict[str, float]:
    """Compare with recorded outputs of the published code: logits by their largest difference, greedy tokens by count."""
    z = dict(np.load(GOLDEN / "dpar_reference.npz"))
    rule = PatchRule("entropy_rows", 8, float(z["threshold"]), int(z["max_patch_length"]))
    gate = GPT(GPTConfig(128, 8, 64, 2, 2))
    gate.load_state_dict(load_file(GOLDEN / "llamagen_gpt_ucond.safetensors"))
    gate = gate.eval().requires_grad_(False).to(device)
    layout = PatchLayout.from_lengths(z["patch_lengths"], row_width=8).to(device)
    found: dict[str, float] = {}
    for encoding in encodings:
        model = DPAR(DPARConfig(128, 8, 64, 2, 1, 2, 2, 10, position_encoding=encoding))
        model.load_state_dict(load_file(GOLDEN / "dpar_reference.safetensors"))
        model = model.eval().requires_grad_(False).to(device)
        tokens, labels = (torch.from_numpy(z[name]).long().to(device) for name in ("tokens", "labels"))
        with torch.inference_mode():
            logits = model(tokens, labels, layout).cpu()
        found[f"DPAR {encoding}: logits"] = float((logits - torch.from_numpy(z[f"logits_{encoding}"])).abs().max())
        settings = SampleSettings(cfg_scale=2.0, rule=rule, greedy=True)
        labels = torch.from_numpy(z[f"gen_labels_{encoding}_cfg2"]).long()
        generated = DPARGenerator(model, gate, settings, static=True).generate(labels, [0] * 3)
        wrong = int((generated.tokens.cpu().numpy() != z[f"gen_tokens_{encoding}_cfg2"]).sum())
        found[f"DPAR {encoding}: greedy tokens that differ"] = wrong
    z = dict(np.load(GOLDEN / "llamagen_gpt_c2i.npz"))
    baseline = GPT(GPTConfig(128, 8, 64, 2, 2, num_classes=10))
    baseline.load_state_dict(load_file(GOLDEN / "llamagen_gpt_c2i.safetensors"))
    baseline = baseline.eval().requires_grad_(False).to(device)
    labels = torch.from_numpy(z["gen_labels"]).long()
    generated = GPTGenerator(baseline, SampleSettings(cfg_scale=2.0, greedy=True), static=True).generate(labels, [0] * 3)
    found["LlamaGen: greedy tokens that differ"] = int((generated.tokens.cpu().numpy() != z["gen_tokens_cfg2"]).sum())
    return found


def correctness(device: torch.device, tiny: bool, budget_s: float, write: Write) -> dict[str, Any]:
    """Part 1. Logits within 1e-4, tokens of all ways to sample the same."""
    until = time.monotonic() + budget_s
    cases = {
        name: (value, 1e-4 if "logits" in name else 0)
        for name, value in golden_cases(device, ("4d",) if tiny else ("4d", "3d", "1d")).items()
    }
    write({"golden": {name: value for name, (value, _) in cases.items()}})
    grid, codes, width, heads = (4, 16, 32, 2) if tiny else (8, 256, 128, 2)
    make = DPARConfig(codes, grid, width, heads, 1, 2, 2, 5, 32)
    gate = lively(GPT(GPTConfig(codes, grid, width, heads, 2, 32)), 1).to(device)
    baseline = lively(GPT(GPTConfig(codes, grid, width, heads, 3, 32, num_classes=5)), 2).to(device)
    images = 5 if tiny else 19
    labels, seeds = torch.arange(images) % 5, list(range(images))
    random = torch.randint(codes, (32, grid**2), generator=torch.Generator().manual_seed(0)).to(device)
    median = float(entropies_of(gate, random)[:, 1:].median())
    rows = SampleSettings(cfg_scale=2.0, rule=PatchRule("entropy_rows", grid, median, 4))
    kinds = {
        "gate entropy_model": ("4d", rows),
        "batch 1": ("4d", rows),
        "interval, top-k, top-p": (
            "3d",
            replace(
                rows,
                cfg_schedule="interval",
                cfg_interval=(0.1, 0.7),
                top_k=codes // 2,
                top_p=0.95,
                temperature=0.9,
            ),
        ),
        "gate decoder": ("4d", replace(rows, gate="decoder", rule=replace(rows.rule, threshold=median - 0.3))),
        "static patches, 1d": ("1d", replace(rows, rule=PatchRule("static", grid, static_length=3))),
    }
    for name, (encoding, settings) in list(kinds.items())[: 2 if tiny else None]:
        if time.monotonic() > until:
            cases[f"{name}: not run, out of time"] = (1, 0)
            continue
        model = lively(DPAR(replace(make, position_encoding=encoding)), 3).to(device)
        some, few = (labels, seeds) if name != "batch 1" else (labels[:1], seeds[:1])
        by_model = gate if settings.rule.reads_entropies and settings.gate == "entropy_model" else None

        def sampled(model=model, settings=settings, some=some, few=few, lanes: int | None = None, **how: Any) -> Generated:
            return DPARGenerator(model, gate, settings, **how).generate(some, few, lanes=lanes)

        expected = uncached(model, by_model, some.to(device), few, settings)
        ways = {
            "ragged": sampled(static=False),
            "buckets": sampled(static=True, schedule="buckets"),
            "ahead": sampled(static=True, schedule="ahead"),
            "rounds": sampled(static=True, schedule="rounds"),
            "not captured": sampled(static=True, schedule="buckets", capture=False),
        }
        if len(some) > 1 and by_model is not None:
            ways["rounds, refilled"] = sampled(static=True, schedule="rounds", lanes=len(some) // 2)
        if device.type == "cuda":
            triton_ops = importlib.import_module("dpar_core.generation.triton_ops")
            with patch.object(triton_ops, "FUSED", 512):
                ways["products fused"] = sampled(static=True, schedule="buckets")
        for way, result in ways.items():
            differ = unexplained(result.tokens, expected, few, settings)
            cases[f"{name}, {way}: images that differ from uncached"] = (differ, 0)
        say(f"{name}: {sum(map(len, ways['buckets'].patch_lengths)) / len(some):.1f} patches of {grid**2} tokens")
        write({"last": name})
    settings = SampleSettings(cfg_scale=2.0)
    ragged = GPTGenerator(baseline, settings, static=False).generate(labels, seeds, keep_logits=True)
    static = GPTGenerator(baseline, settings, static=True).generate(labels, seeds)
    cases["LlamaGen, static: images that differ from ragged"] = (unexplained(static.tokens, ragged, seeds), 0)
    wrong = {name: value for name, (value, most) in cases.items() if not value <= most}
    for name, (value, most) in cases.items():
        print(f"  {'ok ' if value <= most else 'BAD'} {name}: {value:.2g} (at most {most:.2g})")
    return {"cases": {name: value for name, (value, _) in cases.items()}, "wrong": wrong}


# Part 2: sampling


@dataclass(frozen=True)
class Images:
    """Tokens that images are made of, and the rule that cuts them into patches of the mean length under one gate.

    tokens: (largest batch, T) int64, those first whose number of patches is nearest to the mean, so that a batch of one
    image has the usual length as well. Sampling computes everything and then takes these.
    """

    tokens: Tensor
    rule: PatchRule


def images_of(gate: GPT, scale: Scale, device: torch.device) -> Images:
    """Return random tokens and the threshold for the mean length."""
    tokens = torch.randint(scale.codes, (max(scale.batches), scale.row**2), generator=torch.Generator().manual_seed(7))
    entropies = torch.cat([entropies_of(gate, part.to(device)) for part in tokens.split(16)]).cpu()
    rule = PatchRule("entropy_rows", scale.row, 0.0, MAX_LENGTH)
    rule = replace(rule, threshold=threshold_for_mean_length(entropies.numpy(), rule, MEAN_LENGTH))
    patches = patch_starts(entropies, rule).sum(1).float()
    return Images(tokens[(patches - patches.mean()).abs().argsort(stable=True)], rule)


def block_bytes(width: int, hidden: int) -> int:
    """Parameters of a block's matrices."""
    return 4 * width**2 + 3 * width * hidden


def image_costs(config: DPARConfig | GPTConfig, gate: GPTConfig | None, patches: float, batch: int) -> tuple[float, float]:
    """Return (FLOPs, bytes) of one guided image with exact caches, in bfloat16.

    Bytes: matrices once per launch of a batch, keys and values of all earlier positions once per row. A launch of the patch
    transformer is needed at a token where any image of the batch begins a patch.
    """
    tokens, width, v = config.tokens, config.width, config.codebook_size
    seen = tokens * (tokens + 1) / 2
    block, kv, head = block_bytes(width, config.hidden), 2 * width, v * width
    if isinstance(config, GPTConfig):
        flops = 2 * gpt_forward_flops(config)
        read = config.layers * (tokens * block / batch + 2 * seen * kv) + tokens * head / batch
        return flops, 2 * read
    c = config
    everything = dpar_forward_flops(c, patches)
    once = everything - dpar_forward_flops(replace(c, encoder_layers=0), patches)
    flops = 2 * (everything - once) + once
    share = patches / tokens
    launches = tokens * (1 - (1 - share) ** batch)
    read = c.encoder_layers * (tokens * (block + 4 * width**2) / batch + seen * kv)
    read += c.patch_layers * (launches * block / batch + 2 * patches * (patches + 1) / 2 * kv)
    read += c.decoder_layers * (tokens * block / batch + 2 * seen * kv) + tokens * head / batch
    if gate is not None:
        flops += gpt_forward_flops(gate)
        gate_block = block_bytes(gate.width, gate.hidden)
        read += gate.layers * (tokens * gate_block / batch + seen * 2 * gate.width) + tokens * v * gate.width / batch
    return flops, 2 * read


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(generator: Any, tokens: Tensor, device: torch.device, batch: int) -> tuple[float, Generated]:
    """Time the sampling of images, a batch at a time."""
    labels, seeds = torch.arange(len(tokens)) % CLASSES, list(range(len(tokens)))
    started_at = synchronized(device)
    generated = generator.generate(labels, seeds, given=tokens, lanes=batch)
    return synchronized(device) - started_at, generated


def sampling(
    device: torch.device,
    tiny: bool,
    budget_s: float,
    write: Write,
    *,
    schedules: tuple[str | None, ...] = (None,),
    sizes: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Part 2. The baseline and DPAR take turns, at the largest batch they follow each other; medians.

    schedules: of the static decoder (None: its own choice). sizes, batches: of the usual ones (none: all).
    """
    scale, until = TINY if tiny else REAL, time.monotonic() + budget_s
    chosen = {name: size for name, size in scale.sizes.items() if name in sizes or not sizes or tiny}
    rows: list[dict[str, Any]] = []
    torch.manual_seed(0)
    with torch.device(device):
        gates = {name: started(GPT(gpt_config(scale, *shape, None))) for name, shape in scale.gates.items()}
    images = {name: images_of(gate, scale, device) for name, gate in gates.items()}
    for size_name, size in chosen.items():
        config = dpar_config(scale, size)
        with torch.device(device):
            dpar = started(DPAR(config))
            baseline = started(GPT(gpt_config(scale, size.width, size.heads, size.layers, CLASSES)))
        for batch in [batch for batch in scale.batches if batch in batches or not batches]:

            def make_baseline(baseline: GPT = baseline, **how: Any) -> GPTGenerator:
                return GPTGenerator(baseline, SampleSettings(cfg_scale=2.0), dtype=scale.dtype, **how)

            makers: dict[str, Callable[..., Any]] = {"LlamaGen": make_baseline}
            tokens = {"LlamaGen": images["XS"].tokens[:batch]}
            # The sampler runs the gate in the precision of stage entropies: fp32 or, in the presets for GPUs, fp16.
            for name, dtype in (("XS", torch.float32), ("XS", torch.float16), ("B", torch.float16)):
                if name not in gates:
                    continue

                def make(name: str = name, dtype: torch.dtype = dtype, dpar: DPAR = dpar, **how: Any) -> DPARGenerator:
                    settings = SampleSettings(cfg_scale=2.0, rule=images[name].rule)
                    return DPARGenerator(dpar, gates[name], settings, dtype=scale.dtype, gate_dtype=dtype, **how)

                for schedule in schedules:
                    precision = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
                    label = f"DPAR, gate {name} {precision}" + (f", {schedule}" if schedule else "")
                    makers[label] = lambda make=make, schedule=schedule, **how: make(**{"schedule": schedule, **how})
                    wanted = torch.arange(batch * (IN_A_ROW if schedule == "rounds" else 1))
                    tokens[label] = images[name].tokens[wanted % len(images[name].tokens)]
            runs: dict[str, Any] = {}
            ready: dict[str, float] = {}
            if time.monotonic() > until:
                say(f"sampling {size_name} batch {batch}: not run, out of time")
                continue
            taken: dict[str, list[float]] = {name: [] for name in makers}
            generated: dict[str, Generated] = {}

            def repeat(
                runs: dict[str, Any] = runs,
                tokens: dict[str, Tensor] = tokens,
                generated: dict[str, Generated] = generated,
                taken: dict[str, list[float]] = taken,
                batch: int = batch,
            ) -> None:
                for _ in range(scale.repeats):
                    for name, generator in runs.items():
                        seconds, generated[name] = seconds_of(generator, tokens[name], device, batch)
                        taken[name].append(seconds)

            alone = batch == scale.batches[-1]  # the caches of all of them do not fit beside each other
            for name, maker in makers.items():
                begin = synchronized(device)
                runs[name] = maker(static=True)
                seconds_of(runs[name], tokens[name], device, batch)
                ready[name] = synchronized(device) - begin
                if alone:
                    repeat()
                    runs.clear()
            if not alone:
                repeat()
            base = batch / statistics.median(taken["LlamaGen"])
            allowed = image_costs(baseline.config, None, 0, batch)
            for name in makers:
                speed = len(tokens[name]) / statistics.median(taken[name])
                patches = sum(map(len, generated[name].patch_lengths)) / len(tokens[name])
                gate_config = gates[name.split(", ")[1].split()[1]].config if patches else None
                costs = image_costs(config if patches else baseline.config, gate_config, patches, batch)
                row = {
                    "size": size_name,
                    "batch": batch,
                    "model": name,
                    "images_per_s": speed,
                    "ratio": speed / base,
                    "flop_ratio": allowed[0] / costs[0],
                    "byte_ratio": allowed[1] / costs[1],
                    "mean_length": config.tokens / patches if patches else None,
                    "seconds": taken[name],
                    "ms_per_token": 1000 * batch / speed / config.tokens,
                    "ready_s": ready[name],
                }
                rows.append(row)
                say(
                    f"{size_name:3} batch {batch:3} {name:19} {row['images_per_s']:8.2f} images/s, ratio {row['ratio']:.2f} "
                    f"(FLOPs {row['flop_ratio']:.2f}, bytes {row['byte_ratio']:.2f}), {row['ms_per_token']:.3f} ms per "
                    f"token, mean length {row['mean_length'] or 0:.2f}, ready in {row['ready_s']:.1f} s"
                )
            write({"rows": rows})
            runs.clear()
            if batch == scale.batches[1] and size is next(iter(scale.sizes.values())):
                for how, options in {"not captured": dict(static=True, capture=False), "ragged": dict(static=False)}.items():
                    for name in list(makers)[:2]:
                        if time.monotonic() > until:
                            continue
                        seconds, _ = seconds_of(makers[name](**options), tokens[name], device, batch)
                        rows.append(
                            {
                                "size": size_name,
                                "batch": batch,
                                "model": f"{name}, {how}",
                                "images_per_s": batch / seconds,
                            }
                        )
                        say(f"{size_name:3} batch {batch:3} {name}, {how}: {batch / seconds:.2f} images/s")
                write({"rows": rows})
        del dpar, baseline, make, make_baseline, makers
    return {"rows": rows}


# Parts 3 and 4 are in files of their own.


def elsewhere(name: str) -> Callable[..., dict[str, Any]]:
    """Return the part that benchmarks/gpu_{name}.py holds under that name; it hands on a row at a time."""

    def part(device: torch.device, tiny: bool, budget_s: float, write: Write, **more: Any) -> dict[str, Any]:
        module, rows = importlib.import_module(f"benchmarks.gpu_{name}"), []

        def keep(row: dict[str, Any]) -> None:
            rows.append(row)
            say(module.line(row))
            write({"rows": rows})

        return getattr(module, name)(device, tiny=tiny, budget_s=budget_s, write=keep, **more)

    return part


# name, part, share of the budget
PARTS = (
    ("correctness", correctness, 0.10),
    ("sampling", sampling, 0.35),
    ("training", elsewhere("training"), 0.38),
    ("data", elsewhere("data"), 0.17),
)


def about(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "command": " ".join(sys.argv)}
    facts["date"] = time.strftime("%Y-%m-%d")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        facts |= {"cuda": torch.version.cuda, "driver": driver()}
        facts["triton"] = importlib.import_module("triton").__version__
    else:
        facts |= {"device": "cpu", "driver": None}
    return facts


def driver() -> str | None:
    """Return the version of NVIDIA's driver, None where it cannot be read."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), None)


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the sampling table in Markdown."""
    lines = [
        f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, {facts['date']}",
        "",
        "| size | batch | model | images/s | ratio | FLOPs allow | bytes allow | mean length |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["size"], str(row["batch"]), row["model"], f"{row['images_per_s']:.2f}"]
        cells += [f"{row[key]:.2f}" if row.get(key) else "" for key in ("ratio", "flop_ratio", "byte_ratio", "mean_length")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--parts", default=",".join(name for name, _, _ in PARTS))
    parser.add_argument("--schedules", action="store_true", help="sample with each way to handle rows that begin no patch")
    parser.add_argument("--sizes", default="", help="sample and train these sizes alone, as B,XL")
    parser.add_argument("--batches", default="", help="sample these batches alone, as 64,256")
    parser.add_argument("--strategy", choices=get_args(Strategy), default="ddp", help="fsdp: train sharded, on this one GPU")
    parser.add_argument("--fused", type=int, default=0, help="rows up to which norm and silu are part of the products")
    parser.add_argument("--budget", type=float, default=440, help="seconds for all parts; a part ends what it has begun")
    parser.add_argument("--out", type=Path, help="file for what is found, rewritten as it comes")
    options = parser.parse_args()
    wanted = options.parts.split(",")
    unknown = set(wanted) - {name for name, _, _ in PARTS}
    if unknown:
        parser.error(f"--parts knows {', '.join(name for name, _, _ in PARTS)}; got {', '.join(sorted(unknown))}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device: run with --device cpu --tiny to try the script without one")
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    result: dict[str, Any] = {"about": {**about(device), "fused_rows": options.fused}}
    sizes = tuple(options.sizes.split(",")) if options.sizes else ()
    if not set(sizes) <= REAL.sizes.keys():
        parser.error(f"--sizes knows {', '.join(REAL.sizes)}; got {options.sizes}")
    if options.fused:
        importlib.import_module("dpar_core.generation.triton_ops").FUSED = options.fused
    say(json.dumps(result["about"]))
    shares = sum(share for name, _, share in PARTS if name in wanted)
    failed = []
    for name, part, share in PARTS:
        if name not in wanted:
            continue

        def write(found: dict[str, Any], name: str = name) -> None:
            result[name] = found
            if options.out:
                options.out.write_text(json.dumps(result))

        say(f"part {name}")
        more: dict[str, Any] = {"sizes": sizes} if name in ("sampling", "training") else {}
        if name == "sampling":
            more["schedules"] = get_args(Schedule) if options.schedules else (None,)
            more["batches"] = tuple(int(batch) for batch in options.batches.split(",")) if options.batches else ()
        if name == "training":
            more["strategy"] = options.strategy
        try:
            write(part(device, options.tiny, options.budget * share / shares, write, **more))
        except Exception as error:  # the other parts are worth running; the failure is reported and in the exit status
            traceback.print_exc()
            failed.append(name)
            write({**result.get(name, {}), "error": f"{type(error).__name__}: {error}"})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if result.get("sampling", {}).get("rows"):
        print(table(result["sampling"]["rows"], result["about"]))
    wrong = result.get("correctness", {}).get("wrong")
    if wrong:
        failed.append(f"correctness ({len(wrong)} cases)")
    if failed:
        print(f"failed: {', '.join(failed)}")
    print("RESULT " + json.dumps(result), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
