"""Training on a GPU: images/s, share of the peak and memory of DPAR and its LlamaGen baseline, and packed attention.

    python benchmarks/gpu.py --parts training [--device cuda] [--budget 100] [--tiny] [--sizes B] [--strategy fsdp]

Part 3 of benchmarks/gpu.py, which runs it. A step is forward, loss, backward, clipping and
AdamW in bf16 on random tokens (16 x 16 of 16,384 codes) with patch plans of mean length 1.81, as benchmarks/train_step.py
makes them. The batch is the largest that memory allows: the estimate of dpar_core.models.memory names one, an uncompiled
step confirms it or the next smaller ones. Rows come in order of value, compiled models first; when the budget is used up
the rest is left out and named. Of compiled models, and of B, a step is profiled by part: kernels, busy and idle time, the
longest kernels, how long the host took to launch them and how often it waited. benchmarks/train_count.py says what to
expect. `--strategy fsdp` shards over this one process: what gathering and scattering cost beside ddp, which is the model
itself here. `--tiny` runs all of it on a small model, so that a CPU can try every line.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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


MARK = "part of a step begins"


class Parts:
    """Marks where the parts of a training step begin on the device, so that a profile can be cut into them.

    Part P of the forward pass begins before the modules that `watched` gives to P. Its backward pass ends when the gradient
    of what these modules read is there; the part that ran before P is next. `begun` names the part that each mark begins.
    """

    def __init__(self, trainee: Trainee) -> None:
        self.setup, self.begun, self.part = trainee.setup, list[str](), ""
        self.hooks = [
            module.register_forward_pre_hook(partial(self._forward, part)) for module, part in watched(trainee.model)
        ]
        self.model: Any = trainee.model
        if hasattr(self.model, "transform_patches"):
            transform = self.model.transform_patches

            def packing(*read: Any) -> Tensor:
                self._forward("packing", self.model, read)
                found: Tensor = transform(*read)
                return found

            self.model.transform_patches = packing

    def begin(self, part: str) -> None:
        """Begin a part: a kernel that nothing else launches, or a range in a CPU's profile, marks the place."""
        if part == (self.begun[-1] if self.begun else ""):
            return
        self.begun.append(part)
        if self.setup.device.type == "cuda":
            torch.cuda._sleep(1)
        else:
            with torch.profiler.record_function(MARK):
                pass

    def _forward(self, part: str, _: nn.Module, read: tuple[Any, ...]) -> None:
        before, self.part = self.part, part
        if part == before:
            return
        self.begin(part)
        states = next((x for x in read if isinstance(x, Tensor) and x.requires_grad), None)
        if before and states is not None:
            states.register_hook(lambda _: self.begin(f"{before}, backward"))

    def step(self, trainee: Trainee) -> None:
        """Take a training step with its parts marked."""
        self.begun.clear()
        self.part = "embeddings"
        self.begin(self.part)
        value = trainee.loss()
        self.begin(f"{self.part}, backward")
        value.backward()
        self.begin("clipping and AdamW")
        trainee.update()
        self.begin("end")

    def remove(self) -> None:
        """Mark no steps any longer."""
        for hook in self.hooks:
            hook.remove()
        vars(self.model).pop("transform_patches", None)


def watched(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules before which a part of a model begins."""
    stacks = {"layers": "blocks"}
    if hasattr(model, "local_encoder"):
        stacks = {
            "local_encoder.layers": "encoder",
            "local_encoder.cross_attn_layers": "pooling",
            "layers": "patch transformer",
            "local_decoder.cross_attn_layers": "copying",
            "local_decoder.layers": "decoder",
        }
    for path, part in stacks.items():
        yield from ((module, part) for module in model.get_submodule(path).children())
    yield model.get_submodule("norm"), "output and loss"


def recorded(setup: Setup, call: Callable[[], object]) -> list[tuple[float, float, str]]:
    """Return begin and end, in microseconds, and name of every kernel (on a CPU: operation) of a call, in order."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    on_cuda = setup.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as found:
        call()
        setup.wait()
    events = [
        event
        for event in found.events()
        if (event.device_type == DeviceType.CUDA if on_cuda else not event.cpu_children) and event.name != "[memory]"
    ]
    return sorted((event.time_range.start, event.time_range.end, event.name) for event in events)


def device_ms(setup: Setup, call: Callable[[], object]) -> float:
    """Return for how long a call keeps the device busy, after one that warms up, whatever the host takes to launch it."""
    call()
    return sum(end - begin for begin, end, _ in recorded(setup, call)) / 1e3


def profile_row(setup: Setup, trainee: Trainee, *, most: int = 6) -> Row:
    """Return where the time of a step goes: per part kernels, busy and idle time of the device, and its longest kernels.

    host_ms: until all kernels are launched; near the whole step the device waits for the host.
    host_waits: operations for which the host waits, by torch's count on CUDA.
    """
    parts = Parts(trainee)
    parts.step(trainee)  # compiled code may look at hooks
    setup.wait()
    with host_waits(setup) as waits:
        began = time.perf_counter()
        parts.step(trainee)
        host_ms = 1e3 * (time.perf_counter() - began)
        setup.wait()
    kernels = recorded(setup, lambda: parts.step(trainee))
    parts.remove()
    names, found, longest = iter(parts.begun), dict[str, Row](), dict[str, dict[str, Row]]()
    part, last = "", 0.0
    for begin, end, name in kernels:
        if name == MARK or "spin_kernel" in name:
            part, last = next(names), max(last, end)
        elif part and part != "end":
            row = found.setdefault(part, {"kernels": 0, "busy_ms": 0.0, "idle_ms": 0.0})
            row["kernels"] += 1
            row["busy_ms"] += (end - begin) / 1e3
            row["idle_ms"] += max(begin - last, 0.0) / 1e3
            kind = longest.setdefault(part, {}).setdefault(name[:90], {"ms": 0.0, "count": 0})
            kind["ms"], kind["count"] = kind["ms"] + (end - begin) / 1e3, kind["count"] + 1
            last = max(last, end)
    if left := list(names):
        raise RuntimeError(f"of {len(parts.begun)} marks in the step the profile holds {len(parts.begun) - len(left)}")
    for part, row in found.items():
        kinds = sorted(longest[part].items(), key=lambda item: -item[1]["ms"])[:most]
        row["longest"] = [{"name": name, **kind} for name, kind in kinds]
    return {
        "busy_ms": sum(row["busy_ms"] for row in found.values()),
        "idle_ms": sum(row["idle_ms"] for row in found.values()),
        "launches": sum(row["kernels"] for row in found.values()),
        "host_ms": host_ms,
        "host_waits": len(waits),
        "parts": found,
    }


@contextmanager
def host_waits(setup: Setup) -> Iterator[list[Any]]:
    """Collect a warning for every operation that makes the host wait for the device; torch knows them on CUDA alone."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if setup.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        waits: list[Any] = []
        try:
            yield waits
        finally:
            if setup.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            waits += [one for one in caught if "synchronizing CUDA operation" in str(one.message)]


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

        found[f"{name}_ms"] = device_ms(setup, both)
        results[name] = both()
    if "packed" in results:  # what an own call of cuDNN would give, which torch's variable-length attention does not use
        try:
            found["cudnn_ms"] = device_ms(setup, lambda: cudnn_packed(packed, q, k, v, out))
            results["cudnn"] = cudnn_packed(packed, q, k, v, out)
        except (RuntimeError, AttributeError) as error:  # of this build, or of a torch without the operator
            found["cudnn_failed"] = str(error).splitlines()[0]
    first, *others = results.values()
    found["largest_difference"] = max(float((a - b).abs().max()) for other in others for a, b in zip(first, other))
    return found


@torch.no_grad()
def cudnn_packed(packed: PackedCausal, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Run packed causal attention and its backward pass by cuDNN; return the gradients of q, k and v."""
    bounds, limit = packed.bounds, packed.limit
    out, lse, *_, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
        q, k, v, None, bounds, bounds, limit, limit, True, 0.0, True
    )
    grads: tuple[Tensor, ...] = torch.ops.aten._cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, torch.empty(0, device=q.device), bounds, bounds, limit, limit, 0.0, True
    )
    return grads


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

    def measure(size_name: str, family: str, *, compiled: bool) -> None:
        model = f"{family}-{size_name}, {'compiled' if compiled else 'eager'}"
        if late(model, 0.0 if tiny else 35.0 if compiled else 12.0):
            return
        config = setup.config(family, chosen[size_name])
        row: Row = {"model": family, "size": size_name, "compiled": compiled}
        with _out_of_memory() as caught:
            trainee, found = largest_batch(setup, config, patches=setup.tokens / MEAN if family == "dpar" else None)
            if compiled:
                started = time.perf_counter()
                compile_blocks(trainee.model, backend="eager" if tiny else "inductor")
                setup.free()
                trainee.step()
                setup.wait()
                found["compile_s"] = time.perf_counter() - started
            row = train_row(setup, trainee, {**row, **found})
            if compiled:
                row["memory_gb"] = setup.peak_bytes() / 1e9
            keep("rows", row)
            if compiled or size_name == "B":
                keep(
                    "profiles",
                    {**{name: row[name] for name in ("model", "size", "compiled")}, **profile_row(setup, trainee)},
                )
            del trainee
        if caught:
            keep("rows", {**row, "failed": caught[0]})
        setup.free()
        torch._dynamo.reset()

    # In order of value: compiled models, as the presets train them; then eager ones; then their parts.
    for compiled in (True, False):
        for size_name in chosen:
            for family in ("llamagen", "dpar"):
                measure(size_name, family, compiled=compiled)
            result["ratios"] += ratios(result["rows"], size_name, write, compiled=compiled)
    for size_name, size in chosen.items():
        if not late(f"attention {size_name}", 3.0 if not tiny else 0.0):
            keep("attention", {"size": size_name, **attention_rows(setup, size, 4 if tiny else 128)})
            setup.free()
        if not late(f"loss {size_name}", 3.0 if not tiny else 0.0):
            for row in loss_rows(setup, size, 4 if tiny else 64):
                keep("loss", {"size": size_name, **row})
            setup.free()
    result["seconds"] = time.perf_counter() - began
    return result


def ratios(rows: list[Row], size: str, write: Write, *, compiled: bool) -> list[Row]:
    """Return DPAR's speed over its baseline's, beside what FLOPs promise; empty where one of them is missing."""
    pair = {row["model"]: row for row in rows if row["size"] == size and row["compiled"] == compiled and "mfu" in row}
    if len(pair) < 2:
        return []
    dpar, baseline = pair["dpar"], pair["llamagen"]
    ratio = dpar["images_per_s"] / baseline["images_per_s"]
    promised = baseline["gflops_per_image"] / dpar["gflops_per_image"]
    row = {"size": size, "compiled": compiled, "ratio": ratio, "promised": promised, "efficiency": ratio / promised}
    write(row)
    return [row]


def line(row: Row) -> str:
    """Lay a row out for reading."""
    if "mfu" in row:
        how = "compiled" if row["compiled"] else "eager"
        return (
            f"{row['model']:>9}-{row['size']:<4} {how:>8}  batch {row['images']:>3}  {row['images_per_s']:8.1f} images/s  "
            f"MFU {row['mfu']:5.1%}  {row.get('memory_gb', 0):5.1f} GB  forward {row['forward_ms']:.0f}, backward "
            f"{row['backward_ms']:.0f}, update {row['update_ms']:.0f} ms"
        )
    if "parts" in row:
        how = "compiled" if row["compiled"] else "eager"
        head = (
            f"{row['model']}-{row['size']} {how}: busy {row['busy_ms']:.1f} ms, idle {row['idle_ms']:.1f}, "
            f"{row['launches']} kernels launched in {row['host_ms']:.1f}, the host waited {row['host_waits']} times"
        )
        parts = [
            f"    {name:32} {one['kernels']:5} kernels  busy {one['busy_ms']:8.2f} ms  idle {one['idle_ms']:6.2f}  "
            + ", ".join(f"{kind['ms']:.1f} {kind['name'][:40]}" for kind in one["longest"][:2])
            for name, one in row["parts"].items()
        ]
        return "\n".join([head, *parts])
    if "efficiency" in row:
        how = "compiled" if row["compiled"] else "eager"
        return (
            f"DPAR over LlamaGen, {row['size']}, {how}: {row['ratio']:.3f}, FLOPs promise {row['promised']:.3f}, "
            f"efficiency {row['efficiency']:.3f}"
        )
    return ", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
