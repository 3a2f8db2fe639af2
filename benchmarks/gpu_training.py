"""Training on a GPU: images/s, share of the peak and memory of DPAR and its LlamaGen baseline, and packed attention.

    python benchmarks/gpu.py --parts training [--device cuda] [--budget 100] [--tiny] [--sizes B] [--strategy fsdp]

Part 3 of benchmarks/gpu.py, which runs it. A step is forward, loss, backward, clipping and
AdamW in bf16 on random tokens (16 x 16 of 16,384 codes) with patch plans of mean length 1.81, as benchmarks/train_step.py
makes them. The batch is the largest that memory allows: the estimate of dpar_core.models.memory names one, an uncompiled
step confirms it or the next smaller ones, and the compiled model takes the same. Rows come in order of value; when the
budget is used up the rest is left out and named. `--strategy fsdp` shards over this one process: what gathering and
scattering cost beside ddp, which is the model itself here. `--tiny` runs all of it on a small model, so that a CPU can try
every line.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dpar_core.choices import Strategy
from dpar_core.models import flops, loss
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig, next_token_loss
from dpar_core.models.layers import PackedCausal, has_ragged_attention
from dpar_core.models.memory import RUNTIME, TRAINING_SHARE, training_memory
from dpar_core.models.sizes import MODEL_SIZES, ModelSize
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.rule import PatchRule, lengths_from_starts, patch_starts_numpy, threshold_for_mean_length
from dpar_core.training.meters import peak_flops
from dpar_core.training.optim import OptimSettings, adamw, clip_gradients
from dpar_core.training.parallel import Ranks, compile_blocks, spread

Row = dict[str, Any]
Write = Callable[[Row], None]

CLASSES, MEAN = 1000, 1.81  # classes; tokens per patch
MOST_IMAGES = 128  # per step: past it nothing gets faster, and steps get long
MULTIPLE = 8  # of images per step
ROUNDS = 4  # batches that steps take in turns
TIMED_SECONDS, TIMED_STEPS = 2.0, 12
TINY_STEPS = 2
TINY = ModelSize(32, 2, 1, 2, 1)
OPTIM = OptimSettings(lr=1e-4)


class Setup:
    """What the rows of a part share. codes, row_width: V and G; dtype: of matrix products."""

    def __init__(self, device: torch.device, *, tiny: bool, strategy: Strategy = "ddp") -> None:
        self.device, self.tiny, self.strategy = device, tiny, strategy
        self.codes, self.row_width = (16, 4) if tiny else (16384, 16)
        self.bf16 = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.peak = peak_flops(device, bf16=self.bf16)
        self.memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1e9

    @property
    def tokens(self) -> int:
        return self.row_width**2

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give up memory that nothing uses, and count its largest use from here on."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> float:
        """Return the most memory that tensors took since `free`; 0 on a CPU."""
        return float(torch.cuda.max_memory_allocated(self.device)) if self.device.type == "cuda" else 0.0

    def seconds_of(self, run: Callable[[], object], *, repeats: int = 5) -> float:
        """Return the mean seconds of a call, after one that warms up."""
        run()
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        self.wait()
        return (time.perf_counter() - started) / repeats

    def config(self, family: str, size: ModelSize) -> DPARConfig | GPTConfig:
        """Return the config of a DPAR or of its baseline."""
        shape: dict[str, Any] = {
            "codebook_size": self.codes,
            "row_width": self.row_width,
            "width": size.width,
            "heads": size.heads,
            "num_classes": CLASSES,
            "dropout": 0.1,
            "class_dropout": 0.1,
            "ffn_multiple": 32 if self.tiny else 256,
        }
        if family == "llamagen":
            return GPTConfig(**shape, layers=size.layers)
        return DPARConfig(
            **shape, encoder_layers=size.encoder_layers, patch_layers=size.patch_layers, decoder_layers=size.decoder_layers
        )

    def lengths(self, images: int) -> list[list[np.ndarray]]:
        """Return the patch lengths of a batch for every round."""
        rng, count = np.random.default_rng(2), max(ROUNDS * images, 256)
        # An image's entropies share an offset as wide as their noise, see benchmarks/train_step.py.
        entropies = (rng.normal(size=(count, self.tokens)) + rng.normal(size=(count, 1))).astype(np.float32)
        rule = PatchRule("entropy_rows", self.row_width, 0.0, 4)
        threshold = threshold_for_mean_length(entropies, rule, MEAN)
        starts = patch_starts_numpy(entropies, replace(rule, threshold=float(threshold)))
        return [lengths_from_starts(starts[n * images : (n + 1) * images]) for n in range(ROUNDS)]

    def batches(self, images: int) -> list[tuple[Tensor, Tensor, PatchLayout]]:
        """Return tokens, labels and layout for every round."""
        rng = np.random.default_rng(1)
        return [
            (
                torch.from_numpy(rng.integers(0, self.codes, (images, self.tokens))).to(self.device),
                torch.from_numpy(rng.integers(0, CLASSES, images)).to(self.device),
                PatchLayout.from_lengths(lengths, row_width=self.row_width).to(self.device),
            )
            for lengths in self.lengths(images)
        ]


class Trainee:
    """A model in training on random batches."""

    def __init__(self, setup: Setup, config: DPARConfig | GPTConfig, images: int) -> None:
        self.setup, self.config, self.images = setup, config, images
        torch.manual_seed(0)
        with setup.device:
            model: nn.Module = DPAR(config) if isinstance(config, DPARConfig) else GPT(config)
        self.model = spread(model.to(setup.device).train(), setup.strategy, Ranks(device=setup.device))
        self.optimizer = adamw(self.model.named_parameters(), OPTIM)
        self.parameters = list(self.model.parameters())
        self.take(images)

    def take(self, images: int) -> None:
        """Train on batches of another size from now on."""
        self.images, self.steps = images, 0
        self.rounds = self.setup.batches(images)
        self.patches = float(np.mean([layout.patches / images for *_, layout in self.rounds]))

    def loss(self) -> Tensor:
        """Return the loss of the next batch."""
        tokens, labels, layout = self.rounds[self.steps % ROUNDS]
        with torch.autocast(self.setup.device.type, torch.bfloat16, enabled=self.setup.bf16):
            if isinstance(self.config, DPARConfig):
                value: Tensor = self.model(tokens, labels, layout, targets=tokens)
            else:
                value = next_token_loss(self.model, tokens, labels)
        return value

    def update(self) -> None:
        """Clip the gradients and let AdamW move the weights."""
        clip_gradients(self.parameters, OPTIM.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def step(self) -> None:
        """Take one step; nothing waits for the device."""
        self.loss().backward()
        self.update()

    def timed(self) -> float:
        """Return the mean seconds of a step, without a wait between steps, after two that warm up."""
        for _ in range(2):
            self.step()
        self.setup.wait()
        started, count = time.perf_counter(), 0
        most = TINY_STEPS if self.setup.tiny else TIMED_STEPS
        while count < 2 or (count < most and time.perf_counter() - started < TIMED_SECONDS):
            self.step()
            count += 1
            if count % 2 == 0:
                self.setup.wait()  # or the host would queue steps for ever
        self.setup.wait()
        return (time.perf_counter() - started) / count

    def shares(self) -> Row:
        """Return the milliseconds of each part of one step, with the device waited for between them."""
        marks = [time.perf_counter()]

        def mark() -> None:
            self.setup.wait()
            marks.append(time.perf_counter())

        value = self.loss()
        mark()
        value.backward()
        mark()
        self.update()
        mark()
        return {
            name: 1e3 * (after - before)
            for name, before, after in zip(("forward_ms", "backward_ms", "update_ms"), marks, marks[1:])
        }

    def forward_flops(self) -> float:
        """Return FLOPs of a forward pass of one image."""
        if isinstance(self.config, DPARConfig):
            return flops.dpar_forward_flops(self.config, self.patches)
        return flops.gpt_forward_flops(self.config)


@contextmanager
def _out_of_memory() -> Iterator[list[str]]:
    """Catch a device's want of memory: the list is then not empty."""
    caught: list[str] = []
    try:
        yield caught
    except torch.OutOfMemoryError as error:
        caught.append(str(error).splitlines()[0])


def largest_batch(setup: Setup, config: DPARConfig | GPTConfig, *, patches: float | None) -> tuple[Trainee, Row]:
    """Return a model whose step fits with the largest batch, and what was expected and found of its memory."""
    estimate = training_memory(config, patches, bf16=setup.bf16)
    most = 8 if setup.tiny else MOST_IMAGES
    images = max(min(estimate.largest_batch(setup.memory), most) // MULTIPLE * MULTIPLE, MULTIPLE)
    tried: list[int] = []
    confirmed = 0
    trainee = Trainee(setup, config, images)
    while True:
        setup.free()
        tried.append(images)
        with _out_of_memory() as caught:
            trainee.step()
            trainee.step()  # the second has AdamW's moments from its start
            setup.wait()
        if caught:
            trainee.optimizer.zero_grad(set_to_none=True)
            if images <= MULTIPLE:
                raise torch.OutOfMemoryError(f"not even {MULTIPLE} images fit: {caught[0]}")
            images = confirmed or max(images * 3 // 4 // MULTIPLE * MULTIPLE, MULTIPLE)
            trainee.take(images)
            continue
        peak = setup.peak_bytes()
        # Held against the estimate: what one image took, were the rest as expected.
        measured = (peak - estimate.total(0) + RUNTIME) / images
        allowed = (TRAINING_SHARE * setup.memory - estimate.total(0)) / max(measured, 1.0)
        larger = int(min(allowed, most)) // MULTIPLE * MULTIPLE
        if setup.device.type == "cuda" and len(tried) == 1 and larger > images:
            confirmed, images = images, larger
            trainee.take(images)
            continue
        found = {
            "images": images,
            "tried": tried,
            "memory_gb": peak / 1e9,
            "expected_gb": estimate.total(images) / 1e9,
            "activations_mb_per_image": measured / 1e6,
            "expected_mb_per_image": estimate.activations / 1e6,
        }
        return trainee, found


def train_row(setup: Setup, trainee: Trainee, row: Row) -> Row:
    """Time a model and return its row, begun with what is known already."""
    seconds = trainee.timed()
    per_image = flops.training_flops(trainee.forward_flops())
    return {
        **row,
        "images": trainee.images,
        "step_s": seconds,
        "images_per_s": trainee.images / seconds,
        "mfu": per_image * trainee.images / seconds / setup.peak,
        "gflops_per_image": per_image / 1e9,
        "patches_per_image": trainee.patches,
        **trainee.shares(),
    }


def kernels_of(setup: Setup, trainee: Trainee, *, most: int = 16) -> Row:
    """Return which kernels a step runs longest, and how long the device works in all, in milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if setup.device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        trainee.step()
        setup.wait()
    on_device = setup.device.type == "cuda"

    def spent(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total)

    events = sorted(recorded.key_averages(), key=spent, reverse=True)
    return {
        "busy_ms": sum(map(spent, events)) / 1e3,
        "launches": sum(event.count for event in events),
        "kernels": [
            {"name": event.key[:90], "ms": round(spent(event) / 1e3, 3), "count": event.count} for event in events[:most]
        ],
    }


def attention_rows(setup: Setup, size: ModelSize, images: int) -> Row:
    """Time the patch transformer's attention, forward and backward: packed, padded, and each image alone."""
    lengths = setup.lengths(images)[0]
    layout = PatchLayout.from_lengths(lengths, row_width=setup.row_width).to(setup.device)
    packed = PackedCausal(layout.offsets, rows=layout.patches, longest=layout.most_patches, limit=layout.tokens)
    torch.manual_seed(0)
    shape = (layout.patches, size.heads, size.width // size.heads)
    q, k, v = (torch.randn(shape, device=setup.device, dtype=setup.dtype, requires_grad=True) for _ in range(3))
    out = torch.randn(shape, device=setup.device, dtype=setup.dtype)
    ways: dict[str, Callable[..., Tensor]] = {"padded": packed.padded}
    if has_ragged_attention(q):
        ways["packed"] = packed.ragged
    else:
        packed.counts = layout.offsets.diff().tolist()
        ways["alone"] = packed.alone
    found: Row = {"images": images, "patches": layout.patches, "most_patches": layout.most_patches}
    results = {}
    for name, attend in ways.items():

        def both(attend: Callable[..., Tensor] = attend) -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(q, k, v), (q, k, v), out)

        found[f"{name}_ms"] = 1e3 * setup.seconds_of(both)
        results[name] = both()
    first, second = results.values()
    found["largest_difference"] = max(float((a - b).abs().max()) for a, b in zip(first, second))
    return found


def loss_rows(setup: Setup, size: ModelSize, images: int) -> list[Row]:
    """Time the output layer with its loss, forward and backward, all logits at once and in blocks of several sizes."""
    rows = images * setup.tokens
    torch.manual_seed(0)
    x = torch.randn(rows, size.width, device=setup.device, requires_grad=True)
    weight = (0.02 * torch.randn(setup.codes, size.width, device=setup.device)).requires_grad_()
    targets = torch.randint(setup.codes, (rows,), device=setup.device)

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    ways: list[tuple[str, int | None]] = [("all at once", None)]
    ways += [
        (f"{positions} positions", positions * setup.codes) for positions in ((16,) if setup.tiny else (1024, 2048, 8192))
    ]
    before, found = loss.LOGITS_AT_ONCE, []
    try:
        for name, logits in ways:
            loss.LOGITS_AT_ONCE = logits or before

            def both(name: str = name) -> tuple[Tensor, ...]:
                with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.bf16):
                    value = plain() if name == "all at once" else loss.output_loss(x, weight, targets)
                return torch.autograd.grad(value, (x, weight))

            setup.free()
            held = setup.peak_bytes()
            seconds = setup.seconds_of(both, repeats=3)
            found.append({"loss": name, "ms": 1e3 * seconds, "extra_gb": (setup.peak_bytes() - held) / 1e9})
    finally:
        loss.LOGITS_AT_ONCE = before
    return found


def training(
    device: torch.device | str,
    *,
    tiny: bool,
    budget_s: float,
    write: Write,
    sizes: Sequence[str] = (),
    strategy: Strategy = "ddp",
) -> Row:
    """Measure training and return all rows; every row is also handed to `write` as soon as it is there.

    tiny: a small model, to try the code. budget_s: seconds after which no further row is begun. sizes: XL, B or both
    (none given). strategy: ddp is the model itself on one process, fsdp shards it all the same.
    """
    if strategy == "fsdp" and not dist.is_initialized():
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    setup, began = Setup(torch.device(device), tiny=tiny, strategy=strategy), time.perf_counter()
    chosen = {"tiny": TINY} if tiny else {name: MODEL_SIZES[name] for name in ("XL", "B") if name in sizes or not sizes}
    result: Row = {"rows": [], "ratios": [], "left_out": [], "peak_tflops": setup.peak / 1e12, "strategy": strategy}

    def late(name: str, needed: float) -> bool:
        if time.perf_counter() - began + needed <= budget_s:
            return False
        result["left_out"].append(name)
        return True

    def keep(where: str, row: Row) -> None:
        result.setdefault(where, []).append(row)
        write(row)

    for size_name, size in chosen.items():
        for family in ("llamagen", "dpar"):
            name = f"{family}-{size_name}"
            if late(name, 12.0 if not tiny else 0.0):
                continue
            config = setup.config(family, size)
            patches = setup.tokens / MEAN if family == "dpar" else None
            with _out_of_memory() as caught:
                trainee, found = largest_batch(setup, config, patches=patches)
                keep("rows", train_row(setup, trainee, {"model": family, "size": size_name, "compiled": False, **found}))
            if caught:
                keep("rows", {"model": family, "size": size_name, "failed": caught[0]})
                continue
            if not late(f"{name} compiled", 30.0 if not tiny else 0.0):
                started = time.perf_counter()
                compile_blocks(trainee.model, backend="eager" if tiny else "inductor")
                setup.free()
                trainee.step()
                setup.wait()
                row: Row = {"model": family, "size": size_name, "compiled": True}
                row["compile_s"] = time.perf_counter() - started
                row = train_row(setup, trainee, row)
                row["memory_gb"] = setup.peak_bytes() / 1e9
                if size_name in ("XL", "tiny"):
                    row |= kernels_of(setup, trainee)
                keep("rows", row)
            del trainee
            setup.free()
            torch._dynamo.reset()
        result["ratios"] += ratios([row for row in result["rows"] if row["size"] == size_name], write)
        if not late(f"attention {size_name}", 3.0 if not tiny else 0.0):
            keep("attention", {"size": size_name, **attention_rows(setup, size, 4 if tiny else 64)})
            setup.free()
        if not late(f"loss {size_name}", 3.0 if not tiny else 0.0):
            for row in loss_rows(setup, size, 4 if tiny else 64):
                keep("loss", {"size": size_name, **row})
            setup.free()
    result["seconds"] = time.perf_counter() - began
    return result


def ratios(rows: list[Row], write: Write) -> list[Row]:
    """Return DPAR's speed over its baseline's, beside what FLOPs promise, for each pair of rows."""
    found = []
    for compiled in (False, True):
        pair = {row["model"]: row for row in rows if row.get("compiled") == compiled}
        if len(pair) < 2:
            continue
        dpar, baseline = pair["dpar"], pair["llamagen"]
        ratio = dpar["images_per_s"] / baseline["images_per_s"]
        promised = baseline["gflops_per_image"] / dpar["gflops_per_image"]
        row = {
            "size": dpar["size"],
            "compiled": compiled,
            "ratio": ratio,
            "promised": promised,
            "efficiency": ratio / promised,
        }
        write(row)
        found.append(row)
    return found


def line(row: Row) -> str:
    """Lay a row out for reading."""
    if "mfu" in row:
        how = "compiled" if row["compiled"] else "eager"
        return (
            f"{row['model']:>9}-{row['size']:<4} {how:>8}  batch {row['images']:>3}  {row['images_per_s']:8.1f} images/s  "
            f"MFU {row['mfu']:5.1%}  {row.get('memory_gb', 0):5.1f} GB  forward {row['forward_ms']:.0f}, backward "
            f"{row['backward_ms']:.0f}, update {row['update_ms']:.0f} ms"
        )
    if "efficiency" in row:
        how = "compiled" if row["compiled"] else "eager"
        return (
            f"DPAR over LlamaGen, {row['size']}, {how}: {row['ratio']:.3f}, FLOPs promise {row['promised']:.3f}, "
            f"efficiency {row['efficiency']:.3f}"
        )
    return ", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
