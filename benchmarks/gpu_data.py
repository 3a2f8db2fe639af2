"""Tokens and entropies on a GPU: views/s of the VQ-16 tokenizer by precision, and of entropy models.

    python benchmarks/gpu.py --parts data [--device cuda] [--budget 50] [--tiny]

Part 4 of benchmarks/gpu.py, which runs it. The tokenizer has VQ-16's shape with random weights, its
residual branches switched on, and a codebook made of the latents of other images, so that codes lie as close together as
those of a trained one: the share of codes that a precision changes is an indication, the stage measures the real one. Images
are random at several scales. Decoding is what sampling ends with. Entropy models are random as well; `flips` is the share of
tokens whose entropy changes sides of a threshold that half of them exceed. `--tiny` runs all of it on small networks.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar_core.choices import EncodePrecision
from dpar_core.float32 import tensor_float32, whole_float32
from dpar_core.models.gpt import GPT, GPTConfig, entropies_of
from dpar_core.models.sizes import GATE_SIZES
from dpar_core.models.vq import VQ, VQConfig, encode_at, most_images, to_uint8

Row = dict[str, Any]
Write = Callable[[Row], None]

VQ16 = VQConfig(16384, 8, 128, (1, 1, 2, 2, 4), 256)
TINY = VQConfig(16, 4, 8, (1, 2), 8, residual_blocks=1, norm_groups=4)
VIEWS = 160  # views per call, as the presets have at 256 pixels
DECODED = 16  # images per call, as sampling decodes them
GATE_VIEWS = (64, 256)


def awake(model: VQ) -> VQ:
    """Give residual branches weights: they begin at zero, and the network would be nearly linear."""
    for name, module in model.named_modules():
        if name.endswith(("conv2", "proj_out")) and isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
    return model


def pictures(count: int, size: int, device: torch.device, *, seed: int) -> Tensor:
    """Return random images with structure at several scales: (count, 3, size, size) float32 in [-1, 1]."""
    random = torch.Generator(device).manual_seed(seed)
    whole = torch.zeros(count, 3, size, size, device=device)
    for side in (2, 4, 8, 16, 32, 64):
        if side <= size:
            noise = torch.randn(count, 3, side, side, device=device, generator=random)
            whole += F.interpolate(noise, size=(size, size), mode="bilinear") / side**0.5
    return whole.clamp(-1, 1)


class Setup:
    """What rows share: the device, the tokenizer and how calls are timed."""

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.config, self.size = (TINY, 8) if tiny else (VQ16, 256)
        self.views = 4 if tiny else VIEWS
        torch.manual_seed(0)
        self.vq = awake(VQ(self.config)).to(device).eval().requires_grad_(False)
        found: list[Tensor] = []
        with torch.inference_mode(), whole_float32:
            for seed in range(100, 200):
                found.append(self.vq.latents(pictures(min(self.views, 32), self.size, device, seed=seed)).flatten(2))
                if sum(part.shape[0] * part.shape[2] for part in found) >= self.config.codebook_size:
                    break
        latents = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in found])
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0)).to(device)
        self.vq.quantize.embedding.weight.data = latents[order[: self.config.codebook_size]].clone()

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_of(self, run: Callable[[], object], *, seconds: float = 1.0, most: int = 20) -> float:
        """Return the mean seconds of a call, after one that warms up."""
        run()
        self.wait()
        started, count = time.perf_counter(), 0
        while count < 1 or (count < most and time.perf_counter() - started < seconds and not self.tiny):
            run()
            self.wait()
            count += 1
        return (time.perf_counter() - started) / count

    def free(self) -> None:
        """Count the largest use of memory from here on."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory_gb(self) -> float:
        """Return the most memory since `free`, in 10^9 bytes; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0


def laid_out(model: VQ, images: Tensor, *, channels_last: bool) -> tuple[VQ, Tensor]:
    """Return the network and its images in a memory layout."""
    if not channels_last:
        return model, images
    form: Any = {"memory_format": torch.channels_last}
    return copy.deepcopy(model).to(**form), images.contiguous(**form)


def encode_row(
    setup: Setup, precision: EncodePrecision, *, channels_last: bool, expected: Tensor, compiled: bool = False
) -> Row:
    """Time encoding and count the codes that differ from `expected`."""
    model, images = laid_out(setup.vq, pictures(setup.views, setup.size, setup.device, seed=1), channels_last=channels_last)
    if compiled:
        model = copy.deepcopy(model)
        model.encoder.forward = torch.compile(model.encoder.forward, backend="eager" if setup.tiny else "inductor")  # type: ignore[method-assign]
    setup.free()
    seconds = setup.seconds_of(lambda: encode_at(model, images, precision))
    codes = encode_at(model, images, precision)
    return {
        "part": "tokenizer",
        "precision": precision,
        "channels_last": channels_last,
        "compiled": compiled,
        "views": setup.views,
        "views_per_s": setup.views / seconds,
        "memory_gb": setup.memory_gb(),
        "codes_that_differ": float((codes != expected).float().mean()),
        "codes_in_use": len(codes.unique()),
    }


def decode_row(setup: Setup, precision: EncodePrecision, *, channels_last: bool, expected: Tensor) -> Row:
    """Time decoding and say how far bytes are from `expected`."""
    count, side = DECODED, setup.size // setup.config.downsample
    codes = torch.randint(setup.config.codebook_size, (count, side, side), generator=torch.Generator().manual_seed(3))
    codes = codes.to(setup.device)
    model, _ = laid_out(setup.vq, expected, channels_last=channels_last)

    @torch.inference_mode()
    def decode() -> Tensor:
        with tensor_float32 if precision == "tf32" else whole_float32:
            with torch.autocast(setup.device.type, torch.bfloat16, enabled=precision == "bf16"):
                return to_uint8(model.decode(codes))

    seconds, images = setup.seconds_of(decode), decode()
    if not expected.numel():
        expected.set_(images)
    difference = (images.int() - expected.int()).abs()
    return {
        "part": "decoder",
        "precision": precision,
        "channels_last": channels_last,
        "images": count,
        "images_per_s": count / seconds,
        "largest_difference": int(difference.max()),
        "bytes_that_differ": float((difference > 0).float().mean()),
    }


def gate_row(setup: Setup, name: str, precision: str, views: int, expected: dict[tuple[str, int], Tensor]) -> Row:
    """Time the entropies of one entropy model and compare them with those of float32."""
    size = GATE_SIZES[name]
    codes, row = (16, 4) if setup.tiny else (16384, 16)
    torch.manual_seed(0)
    with setup.device:
        shape = GPTConfig(codes, row, 32, 2, 1, 32) if setup.tiny else GPTConfig(codes, row, *size)
        model = GPT(shape).eval().requires_grad_(False)
        nn.init.normal_(model.output.weight, std=2.0 / shape.width**0.5)  # entropies that differ from ln V
    tokens = torch.randint(codes, (views, row * row), generator=torch.Generator().manual_seed(1)).to(setup.device)

    def entropies() -> Tensor:
        with tensor_float32 if precision == "tf32" else whole_float32:
            return entropies_of(model, tokens, "fp32" if precision == "tf32" else precision)[:, 1:]

    setup.free()
    seconds, found = setup.seconds_of(entropies), entropies()
    whole = expected.setdefault((name, views), found)
    threshold = whole.median()
    return {
        "part": "entropies",
        "gate": name,
        "precision": precision,
        "views": views,
        "views_per_s": views / seconds,
        "memory_gb": setup.memory_gb(),
        "largest_difference_nats": float((found - whole).abs().max()),
        "spread_nats": float(whole.std()),
        "flips": float(((found > threshold) != (whole > threshold)).float().mean()),
    }


def data(device: torch.device | str, *, tiny: bool, budget_s: float, write: Write) -> Row:
    """Measure tokenizing, decoding and entropies and return all rows; each is also handed to `write` when it is there.

    tiny: small networks, to try the code. budget_s: seconds after which no further row is begun.
    """
    began = time.perf_counter()
    setup = Setup(torch.device(device), tiny=tiny)
    result: Row = {"rows": [], "left_out": [], "most_views_at_384": most_images(VQ16, 384)}
    on_gpu = setup.device.type == "cuda"
    # A CPU has no TF32, and one without bfloat16 emulates it: it is tried there, not measured.
    precisions: list[EncodePrecision] = list(get_args(EncodePrecision))
    expected = encode_at(setup.vq, pictures(setup.views, setup.size, setup.device, seed=1), "fp32")
    pixels = torch.empty(0, dtype=torch.uint8, device=setup.device)
    entropies: dict[tuple[str, int], Tensor] = {}
    work: list[tuple[str, Callable[[], Row]]] = []
    for channels_last in (False, True):
        for precision in precisions:
            options: dict[str, Any] = {"channels_last": channels_last, "expected": expected}
            work.append((f"tokenizer {precision}", lambda p=precision, o=options: encode_row(setup, p, **o)))
    for name in ("B", "XS"):
        for views in GATE_VIEWS[: 1 if tiny or name == "XS" else 2]:
            for precision in ("fp32", "fp16", "tf32", "bf16"):
                work.append(
                    (
                        f"entropies {name} {precision}",
                        lambda n=name, p=precision, v=4 if tiny else views: gate_row(setup, n, p, v, entropies),
                    )
                )
    for channels_last in (False, True):
        for precision in precisions:
            options = {"channels_last": channels_last, "expected": pixels}
            work.append((f"decoder {precision}", lambda p=precision, o=options: decode_row(setup, p, **o)))
    compiled = {"channels_last": True, "expected": expected, "compiled": True}
    work.append(("tokenizer tf32 compiled", lambda: encode_row(setup, "tf32", **compiled)))
    for name, measure in work:
        if time.perf_counter() - began > budget_s - (25.0 if "compiled" in name and on_gpu else 0.0):
            result["left_out"].append(name)
            continue
        try:
            row = measure()
        except torch.OutOfMemoryError as error:
            row = {"part": name, "failed": str(error).splitlines()[0]}
        result["rows"].append(row)
        write(row)
        setup.free()
    result["seconds"] = time.perf_counter() - began
    return result


def line(row: Row) -> str:
    """Lay a row out for reading."""
    return ", ".join(f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
