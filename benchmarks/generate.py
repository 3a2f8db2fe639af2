"""How fast DPAR samples images against its LlamaGen baseline, both with exact caches, gate included, VQ decoding excluded.

    python benchmarks/generate.py [--parts cached,ratio,parts,schedules] [--sizes B,XL/3] [--gates B,XS,decoder]
        [--batches 32,1] [--repeats 3]

cached: against the whole network on the whole prefix. ratio: DPAR and baseline, every size, gate and batch. parts: where the
time of one image goes. schedules: when the patch transformer steps. On a GPU: `--device cuda --precision bf16 --parts ratio
--sizes L,XL --batches 1,64,256`.

Random weights (models of one shape cost the same whatever they know), 256 tokens of 16,384 codes, guidance 2. Boundaries
follow a table of random entropies cut at a mean length of 1.81, so that all gates see the same mix of lengths; the gate
itself is computed and paid for. DPAR and baseline take turns, medians are shown. FLOPs are counted as in models/flops.py,
with everything class-independent counted once and the rest twice. On a busy machine: `--threads 1 --clock cpu` counts the
process's own CPU seconds instead of the wall's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import dpar_core.generation.lanes as lanes_module
from dpar_core.generation import kv_cache, sampling, stepping
from dpar_core.generation.generate import DPARGenerator, Generated, GPTGenerator
from dpar_core.generation.sampling import SampleSettings, guide, sample_tokens, uniforms
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.flops import block_flops, dpar_forward_flops, gpt_forward_flops
from dpar_core.models.gpt import GPT, GPTConfig, next_token_entropies
from dpar_core.models.sizes import GATE_SIZES, MODEL_SIZES, ModelSize
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.rule import (
    BoundaryState,
    PatchRule,
    lengths_from_starts,
    patch_starts,
    threshold_for_mean_length,
)

CODES, ROW, CLASSES, MEAN, MAX = 16384, 16, 1000, 1.81, 4
TOKENS = ROW * ROW
SIZES = {**MODEL_SIZES, "384": ModelSize(384, 6, 1, 5, 2), "XL/3": ModelSize(1280, 20, 1, 9, 2)}
RECOMMENDED = "XS"
clock = time.perf_counter
begun = time.monotonic()


def say(words: str) -> None:
    """Print a line of progress beside the results."""
    print(f"[{time.monotonic() - begun:5.0f} s] {words}", file=sys.stderr, flush=True)


def random_model(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights as at the start of training, and an output layer that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.output.weight, std=2 * model.config.width**-0.5, generator=generator)
    return model.to(torch.get_default_dtype()).eval().requires_grad_(False)


def make(size: str) -> tuple[DPAR, GPT]:
    torch.manual_seed(0)
    shape = SIZES[size]
    dpar = DPARConfig(CODES, ROW, *shape, CLASSES)
    baseline = GPTConfig(CODES, ROW, shape.width, shape.heads, shape.layers, num_classes=CLASSES)
    return random_model(DPAR(dpar), 1), random_model(GPT(baseline), 2)


def make_gate(name: str) -> GPT:
    return random_model(GPT(GPTConfig(CODES, ROW, *GATE_SIZES[name])), 3)


class Script:
    """Random entropies that stand in for those of a trained gate: a table, and the threshold for the mean length."""

    def __init__(self, images: int) -> None:
        self.table = torch.from_numpy(np.random.default_rng(5).random((images, TOKENS)).astype(np.float32) * 9)
        rule = PatchRule("entropy_rows", ROW, 5.0, MAX)
        self.rule = replace(rule, threshold=threshold_for_mean_length(self.table.numpy(), rule, MEAN))

    def install(self) -> None:
        """Make boundaries follow the table. Where the gate was not asked (nan) it stays so."""
        table = self.table

        class Scripted(BoundaryState):
            def step(self, position, entropies, *, rows=None):
                entropies = torch.where(entropies.isnan(), entropies, table.to(entropies.device)[rows, position])
                return super().step(position, entropies, rows=rows)

        lanes_module.BoundaryState = Scripted


@dataclass(frozen=True)
class Case:
    size: str
    gate: str  # a key of GATE_SIZES, or "decoder"
    batch: int


def timed(work: Callable, *arguments) -> tuple[float, Generated]:
    started = clock()
    result = work(*arguments)
    return clock() - started, result


def flop_ratio(dpar: DPAR, baseline: GPT, gate: GPT | None, sampled: Generated) -> float:
    """Baseline's FLOPs over DPAR's for one guided image, with perfect caches; what the gate costs is in it."""
    images = len(sampled.tokens)
    patches = sum(map(len, sampled.patch_lengths)) / images
    c = dpar.config
    everything = dpar_forward_flops(c, patches)
    encoder = everything - dpar_forward_flops(replace(c, encoder_layers=0), patches)
    once = encoder + (gpt_forward_flops(gate.config) if gate else 0)
    if gate is None:  # a token that the decoder's entropy sends to a new patch is decoded once more, conditionally
        starts = [np.concatenate([[0], np.cumsum(one[:-1], dtype=int)]) for one in sampled.patch_lengths]
        again = sum((~sampled.entropies[i, torch.from_numpy(s)].isnan()).sum().item() for i, s in enumerate(starts)) / images
        position = c.decoder_layers * (block_flops(c.width, c.hidden) + 4 * TOKENS * c.width) + 2 * c.codebook_size * c.width
        once += again * position
    return 2 * gpt_forward_flops(baseline.config) / (once + 2 * (everything - encoder))


def settings(script: Script, gate: str) -> SampleSettings:
    return SampleSettings(cfg_scale=2.0, rule=script.rule, gate="decoder" if gate == "decoder" else "entropy_model")


def ratios(cases: list[Case], repeats: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Time every case beside the baseline, turn by turn."""
    rows = []
    for size, batch in dict.fromkeys((case.size, case.batch) for case in cases):
        dpar, baseline = (model.to(device) for model in make(size))
        script = Script(batch)
        script.install()
        labels, seeds = torch.arange(batch), list(range(batch))
        gates = [case.gate for case in cases if (case.size, case.batch) == (size, batch)]
        models = {name: None if name == "decoder" else make_gate(name).to(device) for name in gates}
        runs = {name: DPARGenerator(dpar, models[name], settings(script, name), dtype=dtype) for name in gates}
        baseline = GPTGenerator(baseline, SampleSettings(cfg_scale=2.0), dtype=dtype)
        caches = max(run.cache_bytes(batch) for run in [baseline, *runs.values()])
        say(f"{size}, batch {batch}: caches of up to {caches / 2**30:.2f} GiB; warm-up")
        seconds, sampled = defaultdict(list), {}
        warm = min(batch, 2)
        for run in [baseline, *runs.values()]:  # warm-up: kernels are made, pages touched
            run.generate(labels[:warm], seeds[:warm])
        for repeat in range(repeats):
            seconds["baseline"].append(timed(baseline.generate, labels, seeds)[0])
            say(f"{size}, batch {batch}, repeat {repeat + 1} of {repeats}: baseline {seconds['baseline'][-1]:.1f} s")
            for name, run in runs.items():
                taken, sampled[name] = timed(run.generate, labels, seeds)
                seconds[name].append(taken)
                say(f"{size}, batch {batch}, repeat {repeat + 1} of {repeats}: gate {name} {taken:.1f} s")
        for name in gates:
            mine, other = (statistics.median(seconds[key]) for key in (name, "baseline"))
            allowed = flop_ratio(dpar, baseline, models[name], sampled[name])
            ratio = other / mine
            patches = sum(map(len, sampled[name].patch_lengths)) / batch
            rows.append(
                {
                    "size": size,
                    "batch": batch,
                    "gate": name,
                    "dpar_images_per_s": batch / mine,
                    "llamagen_images_per_s": batch / other,
                    "ratio": ratio,
                    "flop_ratio": allowed,
                    "efficiency": ratio / allowed,
                    "mean_length": TOKENS / patches,
                    "spread": [round(x, 2) for x in seconds[name]],
                    "baseline_spread": [round(x, 2) for x in seconds["baseline"]],
                }
            )
            print(
                f"{size:5} batch {batch:3} gate {name:8} {batch / mine:8.4f} images/s, baseline {batch / other:8.4f}, "
                f"ratio {ratio:.3f} of {allowed:.3f} ({100 * ratio / allowed:.0f} %), {rows[-1]['spread']} "
                f"{rows[-1]['baseline_spread']}",
                flush=True,
            )
    return rows


@torch.inference_mode()
def uncached(dpar: DPAR, gate: GPT, labels: torch.Tensor, script: Script, tokens: int) -> None:
    """The published way: entropy model and network on the whole prefix for every token."""
    sampled = torch.zeros(len(labels), 0, dtype=torch.int64)
    numbers = uniforms(list(range(len(labels))), TOKENS)
    options = SampleSettings(cfg_scale=2.0)
    both = torch.cat([labels, torch.full_like(labels, CLASSES)])
    for t in range(tokens):
        if t:
            next_token_entropies(gate(sampled)[:, -1])
        lengths = lengths_from_starts(patch_starts(script.table[: len(labels), : t + 1], script.rule).numpy())
        layout = PatchLayout.from_lengths([*lengths, *lengths], row_width=ROW)
        cond, uncond = dpar(sampled.repeat(2, 1), both, layout)[:, -1].chunk(2)
        new = sample_tokens(guide(cond, uncond, torch.full((len(labels),), 2.0)), numbers[:, t], options)
        sampled = torch.cat([sampled, new[:, None]], dim=1)


def cached_speed(repeats: int, *, batch: int = 4) -> dict:
    """Cached against uncached generation at width 384, 1 + 5 + 2 layers, gate S."""
    dpar, _ = make("384")
    gate, script = make_gate("S"), Script(batch)
    script.install()
    labels = torch.arange(batch)
    run = DPARGenerator(dpar, gate, settings(script, "S"))
    run.generate(labels[:1], [0])
    say("cached and uncached, width 384")
    fast = statistics.median(timed(run.generate, labels, list(range(batch)))[0] for _ in range(repeats))
    slow = timed(uncached, dpar, gate, labels, script, TOKENS)[0]
    row = {"cached_images_per_s": batch / fast, "uncached_images_per_s": batch / slow, "speedup": slow / fast}
    print(f"width 384, 1+5+2, batch {batch}: cached {batch / fast:.3f}, uncached {batch / slow:.4f}: {slow / fast:.1f} x")
    return row


class Stopwatch:
    """Exclusive seconds of each part of a run, by wrapping the functions that do it; the gate is one whole."""

    PARTS = (
        ("decoder", lanes_module.Lanes, "decode"),
        ("encoder", lanes_module.Lanes, "encode"),
        ("patch transformer", lanes_module.Lanes, "patch_launch"),
        ("sampling", sampling.TokenSampler, "__call__"),
        ("output layer", stepping.Head, "__call__"),
        ("gate", stepping.GPTStepper, "__call__"),
        ("gate", lanes_module.Lanes, "probe_launch"),
        *(("scheduling", lanes_module.Lanes, name) for name in ("settle", "refill", "ready", "waiting")),
        ("scheduling", kv_cache.KVCache, "plan"),
    )
    KINDS = (
        ("matrices", stepping.Matrix, "__call__"),
        ("attention", kv_cache.KVCache, "attend"),
        ("cache writes", kv_cache.KVCache, "write"),
        ("cache growth", kv_cache.KVCache, "_grow"),
        ("step plans", kv_cache.KVCache, "plan"),
    )

    def __init__(self, parts, *, whole: str = "") -> None:
        self.parts, self.whole, self.seconds = parts, whole, defaultdict(float)
        self.inner, self.names, self.originals = [], [], []

    def __enter__(self) -> Stopwatch:
        for name, owner, method in self.parts:
            self.originals.append((owner, method, getattr(owner, method)))
            setattr(owner, method, self._wrapped(name, getattr(owner, method)))
        return self

    def __exit__(self, *exc) -> None:
        for owner, method, original in self.originals:
            setattr(owner, method, original)

    def _wrapped(self, name: str, function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            if self.whole in self.names:
                return function(*args, **kwargs)
            started = clock()
            self.inner.append(0.0)
            self.names.append(name)
            result = function(*args, **kwargs)
            self.names.pop()
            whole = clock() - started
            self.seconds[name] += whole - self.inner.pop()
            if self.inner:
                self.inner[-1] += whole
            return result

        return wrapped


def parts(size: str, gate: str, batch: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Where the seconds of one image go, by part and by kind of work."""
    dpar, baseline = (model.to(device) for model in make(size))
    script = Script(batch)
    script.install()
    labels, seeds = torch.arange(batch), list(range(batch))
    model = None if gate == "decoder" else make_gate(gate).to(device)
    run = DPARGenerator(dpar, model, settings(script, gate), dtype=dtype)
    rows = []
    for name, generator in (("dpar", run), ("baseline", GPTGenerator(baseline, SampleSettings(cfg_scale=2.0), dtype=dtype))):
        generator.generate(labels[:1], seeds[:1])
        for by, watched in (("part", Stopwatch.PARTS), ("kind", Stopwatch.KINDS)):
            with Stopwatch(watched, whole="gate" if name == "dpar" else "") as watch:
                total, _ = timed(generator.generate, labels, seeds)
            shares = {k: v / total for k, v in sorted(watch.seconds.items(), key=lambda item: -item[1])}
            if name == "baseline" and "gate" in shares:
                shares["layers"] = shares.pop("gate")
            shares["rest"] = 1 - sum(shares.values())
            rows.append(
                {
                    "model": name,
                    "size": size,
                    "gate": gate,
                    "batch": batch,
                    "by": by,
                    "seconds_per_image": total / batch,
                    "shares": shares,
                }
            )
            text = ", ".join(f"{key} {100 * share:.1f} %" for key, share in shares.items())
            print(f"{name} {size} gate {gate} batch {batch}, {total / batch:.3f} s per image, by {by}: {text}", flush=True)
    return rows


def schedules(
    size: str, gate: str, batch: int, images: int, repeats: int, dtype: torch.dtype, device: torch.device
) -> list[dict]:
    """Compaction at every token, lanes that run ahead, and lanes that are refilled when done.

    With compaction at every token all lanes of a batch end together, so there is nothing to refill.
    """
    dpar = make(size)[0].to(device)
    script = Script(images)
    script.install()
    model = make_gate(gate).to(device)
    labels, seeds = torch.arange(images) % CLASSES, list(range(images))
    plans = {
        "a: patch transformer after every token launch": (1, False),
        "b: after every second token launch": (2, False),
        "b: only when every lane waits": (10**6, False),
        "c: after every second token launch, done lanes refilled": (2, True),
        "c: only when every lane waits, done lanes refilled": (10**6, True),
    }
    rows, seconds = [], defaultdict(list)
    for _ in range(repeats):
        for name, (patience, refill) in plans.items():
            run = DPARGenerator(dpar, model, settings(script, gate), dtype=dtype, patience=patience)

            def work(run=run, refill=refill):
                if refill:
                    return run.generate(labels, seeds, lanes=batch)
                for first in range(0, images, batch):
                    run.generate(labels[first : first + batch], seeds[first : first + batch])

            seconds[name].append(timed(work)[0])
            say(f"{size}, batch {batch}, {name}: {seconds[name][-1]:.1f} s")
    for name, taken in seconds.items():
        rows.append({"schedule": name, "size": size, "batch": batch, "images_per_s": images / statistics.median(taken)})
        print(
            f"{size} batch {batch}, {name}: {rows[-1]['images_per_s']:.4f} images/s {[round(t, 1) for t in taken]}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="cached,ratio,parts,schedules")
    parser.add_argument("--sizes", default="B,XL/3", help="384, B, XL/3, L or XL")
    parser.add_argument("--gates", default="B,XS,decoder", help="B, S, XS or decoder")
    parser.add_argument("--batches", default="32,1", help="parts takes the first")
    parser.add_argument("--schedule", default="8,24", help="lanes and images of schedules")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also append the RESULT line to this file")
    options = parser.parse_args()
    global clock
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    if options.device == "cuda":

        def clock() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    device, wanted = torch.device(options.device), options.parts.split(",")
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"torch {torch.__version__}, {hardware}, {torch.get_num_threads()} threads, {options.precision}, clock "
        f"{options.clock}, {options.repeats} repeats, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    result: dict = {"precision": options.precision, "clock": options.clock, "threads": torch.get_num_threads()}
    sizes, gates = options.sizes.split(","), options.gates.split(",")
    batches = [int(batch) for batch in options.batches.split(",")]
    known = {"--parts": ["cached", "ratio", "parts", "schedules"], "--sizes": SIZES, "--gates": [*GATE_SIZES, "decoder"]}
    for name, values in zip(known, (wanted, sizes, gates)):
        if not set(values) <= set(known[name]):
            parser.error(f"{name} knows {', '.join(known[name])}; got {','.join(values)}")
    if "cached" in wanted:
        result["cached"] = cached_speed(options.repeats)
    if "ratio" in wanted:
        cases = [Case(size, gate, batch) for batch in batches for size in sizes for gate in gates]
        result["cases"] = ratios(cases, options.repeats, dtype, device)
        best = [r for r in result["cases"] if (r["size"], r["gate"]) == (sizes[0], RECOMMENDED)] or result["cases"]
        result.update({k: v for k, v in best[0].items() if not k.endswith("spread")})
    if "parts" in wanted:
        result["parts"] = [row for size in sizes for row in parts(size, RECOMMENDED, batches[0], dtype, device)]
    if "schedules" in wanted:
        result["schedules"] = schedules(
            sizes[0], RECOMMENDED, *map(int, options.schedule.split(",")), options.repeats, dtype, device
        )
    line = "RESULT " + json.dumps(result)
    if options.out:
        with open(options.out, "a") as stream:
            stream.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
