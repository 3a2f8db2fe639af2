"""What a training step of DPAR and of its LlamaGen baseline makes a GPU do, counted on any CPU, part by part.

    python benchmarks/train_count.py [--size XL B] [--batch 128] [--kernels 8]

The networks, loss, clipping and AdamW of this project run on tensors that have shapes alone, in bfloat16 as on CUDA:
FlashAttention for whole and for packed rows, RMSNorm as one kernel, no spare rows. Every kernel of the forward and of the
backward pass is recorded with its operations and with the bytes that it reads and writes, and put to the part of the model
that it belongs to.

A kernel is taken to last as long as its operations at PRODUCTS (ATTENTION, PACKED) FLOP/s or its bytes at BYTES per
second, whichever is longer, and LAUNCH at the least. Compiled blocks, pooling and copying are taken to run the same products
and attention, and to move FUSED bytes between them. These are estimates for an H100 or H200, to be held against what
benchmarks/gpu.py measures there; a step whose host cannot launch kernels this fast takes longer.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_training import OPTIM, TINY, Setup
from dpar_core.models import dpar as dpar_module
from dpar_core.models import layers
from dpar_core.models.dpar import DPAR, DPARConfig, Slots
from dpar_core.models.gpt import GPT, GPTConfig, next_token_loss
from dpar_core.models.sizes import MODEL_SIZES
from dpar_core.patches.layout import PatchLayout
from dpar_core.training.optim import adamw, clip_gradients

# FLOP/s of products: as they must be for the compiled step of LlamaGen-XL to come out as measured on an H200 (docs/gpu.md);
# of attention over whole rows; of packed attention, measured there. Bytes per second.
PRODUCTS, ATTENTION, PACKED, BYTES = 560e12, 350e12, 50e12, 4.0e12
LAUNCH = 2.5e-6  # seconds of the smallest kernel
# What compiled code moves between products and attention, forward and backward, by the count of torch 2.13's Inductor with
# concatenations as on a GPU: bytes per row and width, kernels per layer. Weights are cast as in eager execution.
FUSED = {"blocks": (152.0, 32), "pooling": (201.0, 40), "copying": (44.0, 12)}
SORTED = 10  # kernels of torch's backward pass of an embedding, which sorts the indices
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # the host waits for their result


@dataclass
class Tally:
    """What a part or a kind of kernel adds up to. flops: multiplications and additions; seconds: by the model above."""

    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def include(self, other: Tally) -> None:
        self.kernels, self.flops = self.kernels + other.kernels, self.flops + other.flops
        self.bytes, self.seconds = self.bytes + other.bytes, self.seconds + other.seconds

    def add(self, kernels: int, operations: float, moved: float, speed: float) -> None:
        self.kernels += kernels
        self.flops += operations
        self.bytes += moved
        self.seconds += max(operations / speed, moved / BYTES, kernels * LAUNCH)


def size_of(x: Tensor) -> float:
    """Return the bytes that a tensor occupies; repeated entries of an expanded one count once."""
    return float(math.prod(n for n, step in zip(x.shape, x.stride()) if step) * x.element_size())


def operations_of(name: str, args: Any, out: Any) -> float:
    """Return the operations of a product or of causal attention, whose upper half is not computed; else 0."""
    if name in ("mm", "bmm", "addmm"):
        left = args[1] if name == "addmm" else args[0]
        return 2.0 * out.numel() * left.shape[-1]
    if "scaled_dot_product" in name:
        q = args[1] if "backward" in name else args[0]  # (B, H, n, hd)
        return (5 if "backward" in name else 2) * float(q.numel()) * q.shape[2]
    return 0.0


class Kernels(TorchDispatchMode):
    """Records what runs, by part and by kind of kernel. counts: rows of each image in packed attention."""

    def __init__(self, counts: np.ndarray | None = None) -> None:
        super().__init__()
        self.part, self.waits = "layout", 0
        self.began: list[tuple[int, str]] = []  # where parts begin in autograd's numbering of what runs forward
        self.parts: dict[str, Tally] = defaultdict(Tally)
        self.kinds: dict[tuple[str, str], Tally] = defaultdict(Tally)
        self.squares = 0.0 if counts is None else float((counts.astype(np.float64) ** 2).sum())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.waits += name in READS
        if func.namespace == "prim" or func.is_view or name.startswith(("empty", "new_empty")) or name == "detach":
            return out
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if (not read and not written) or name in ("_unsafe_view", "lift_fresh", "alias", "expand", "_reshape_alias"):
            return out
        self.record(name, args, read, written, out)
        return out

    def record(self, name: str, args: Any, read: list[Tensor], written: list[Tensor], out: Any) -> None:
        kernels, operations = 1, operations_of(name, args, out)
        moved = sum(map(size_of, written)) + sum(map(size_of, read))
        if name in ("embedding", "index_select", "index"):
            moved = 2 * size_of(out) + sum(size_of(x) for x in read[1:])  # rows of the table that are read
        elif name == "embedding_dense_backward":
            kernels = SORTED
            moved += size_of(out) + 8 * size_of(read[1])
        elif name in ("zeros", "full", "zeros_like", "ones_like", "full_like", "fill_", "zero_", "new_zeros", "new_full"):
            moved = sum(map(size_of, written)) or size_of(read[0])
        elif name == "gather":
            moved = 3 * size_of(out)
        elif name in ("index_copy", "scatter_add_", "scatter_", "index_add"):
            moved = 2 * sum(map(size_of, read[1:])) + (2 * size_of(read[0]) if not name.endswith("_") else 0)
        elif name == "_fused_adamw_":
            sizes = [size_of(x) for x in args[0]]
            kernels, moved = 1 + len(sizes) // 100, 7 * sum(sizes)
        elif name.startswith("_foreach"):
            tensors = args[0]
            kernels = 1 + len(tensors) // 100
            moved = sum(map(size_of, tensors)) * (2 if name.endswith("_") else 1)
        elif "varlen_attn" in name:
            width = args[1 if "backward" in name else 0].shape[-2:].numel()
            operations = (5 if "backward" in name else 2) * self.squares * width
        elif name.endswith("_") and read:
            moved = size_of(read[0]) + sum(map(size_of, read))
        if "attention" in name or "varlen" in name:
            kernels = 3 if "backward" in name else 1
        attention = "attention" in name or "varlen" in name
        speed = PACKED if "varlen" in name else ATTENTION if attention else PRODUCTS
        kind = "attention" if attention else "products" if operations else name
        part = self.part_now()
        for tally in (self.parts[part], self.kinds[part, kind]):
            tally.add(kernels, operations, moved, speed)

    def enter(self, part: str) -> None:
        """Begin a part of the forward pass; what runs for it in the backward pass will be put to it as well."""
        self.part = part
        self.began.append((torch.autograd._get_sequence_nr(), part))

    def part_now(self) -> str:
        """Return the part that a kernel belongs to."""
        node = torch._C._current_autograd_node()
        if node is None or not self.began:
            return self.part
        place = bisect.bisect_right(self.began, node._sequence_nr(), key=lambda entry: entry[0])
        return self.began[max(place - 1, 0)][1]

    def inside(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs as this part, after which the part before goes on."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.part
            self.enter(part)
            result = call(*args, **kwargs)
            self.enter(before)
            return result

        return run


@torch.library.custom_op("benchmark::rms_norm", mutates_args=())
def one_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for torch's RMSNorm on CUDA, which is one kernel: the normed rows and what the backward pass needs."""
    raise NotImplementedError


@torch.library.custom_op("benchmark::rms_norm_backward", mutates_args=())
def one_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for its backward pass."""
    raise NotImplementedError


one_norm.register_fake(lambda x, weight: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)))
one_norm_backward.register_fake(lambda grad, x, rstd, weight: (torch.empty_like(x), torch.empty_like(weight)))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _norm_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, rstd = ctx.saved_tensors
    grads: tuple[Tensor, Tensor] = torch.ops.benchmark.rms_norm_backward(grad, x, rstd, weight)
    return grads


one_norm.register_autograd(_norm_backward, setup_context=_keep)


def norm(module: layers.RMSNorm, x: Tensor) -> Tensor:
    """Do what RMSNorm does on CUDA: one kernel where x has the weight's dtype, else float32 inside."""
    if x.dtype == module.weight.dtype:
        result: Tensor = one_norm(x, module.weight)[0]
        return result
    return one_norm(x.float(), torch.ones_like(module.weight))[0].type_as(x) * module.weight


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Do what causal attention over whole rows does on CUDA."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return out


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """Do what dropout does on CUDA: one kernel, or none."""
    return torch.native_dropout(x, share, True)[0] if training and share else x


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Take the ways through the models that CUDA takes in bfloat16."""
    kernel = layers._ragged_kernel()

    def packed(self: layers.PackedCausal, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kernel = kernel
        return self.ragged(q, k, v)

    def positions(self: layers.PackedCausal, offsets: Tensor, *, rows: int, longest: int, limit: int | None = None) -> None:
        self.offsets, self.rows, self.longest, self.limit = offsets, rows, longest, limit or longest
        self.bounds = offsets.to(torch.int32)

    with ExitStack() as stack:
        for where, name, new in (
            (layers, "causal_attention", attention),
            (layers.RMSNorm, "forward", norm),
            (layers.PackedCausal, "__call__", packed),
            (layers.PackedCausal, "__init__", positions),
            (dpar_module, "spare_rows", lambda rows, device: 0),
            (dpar_module, "copy_slots", lambda layout: Slots.of(layout, torch.arange(layout.patches))),
            (F, "dropout", dropout),
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
        ):
            stack.enter_context(patch.object(where, name, new))
        yield


def name_parts(model: DPAR | GPT, kernels: Kernels) -> None:
    """Let everything that a model runs forward be put to a part of it."""

    def put(module: Any, part: str, method: str = "forward") -> None:
        setattr(module, method, kernels.inside(part, getattr(module, method)))

    put(model.tok_embeddings, "embeddings")
    put(model.cls_embedding, "embeddings")
    stacks = {"layers": "blocks"}
    if isinstance(model, DPAR):
        stacks = {"local_encoder.layers": "encoder", "layers": "patch transformer", "local_decoder.layers": "decoder"}
        for method, part in (("encode", "pooling"), ("transform_patches", "packing"), ("decode", "copying")):
            put(model, part, method)
    for path, part in stacks.items():
        for block in model.get_submodule(path):
            put(block, part)
    model.norm.register_forward_pre_hook(lambda *_: kernels.enter("output and loss"))


def count(setup: Setup, config: DPARConfig | GPTConfig, images: int) -> Kernels:
    """Take one training step of a model on shapes alone, and return what ran."""
    lengths = setup.lengths(images)[0]
    counts = np.array([len(one) for one in lengths])
    layout = PatchLayout.from_lengths(lengths, row_width=setup.row_width)
    kernels = Kernels(counts)
    with FakeTensorMode() as shapes, as_on_cuda():
        model = (DPAR(config) if isinstance(config, DPARConfig) else GPT(config)).train()
        tokens = torch.zeros(images, setup.tokens, dtype=torch.int64)
        labels = torch.zeros(images, dtype=torch.int64)
        layout = layout.each(shapes.from_tensor)
        optimizer = adamw(model.named_parameters(), OPTIM)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # so that its moments exist
        optimizer.zero_grad(set_to_none=True)
        name_parts(model, kernels)
        with kernels:
            kernels.enter("embeddings")
            with torch.autocast("cpu", torch.bfloat16):
                if isinstance(model, DPAR):
                    value = model(tokens, labels, layout, targets=tokens)
                else:
                    value = next_token_loss(model, tokens, labels)
            value.backward()
            kernels.part = "clipping"
            clip_gradients(list(model.parameters()), OPTIM.clip_norm)
            kernels.part = "AdamW"
            optimizer.step()
    return kernels


def compiled(kernels: Kernels, setup: Setup, config: DPARConfig | GPTConfig, images: int) -> dict[str, Tally]:
    """Return the parts of a step with the blocks, pooling and copying compiled."""
    patches, width = float(sum(map(len, setup.lengths(images)[0]))), config.width
    block, tokens = 4 * width**2 + 3 * width * config.hidden, images * setup.tokens
    layers_of: dict[str, tuple[str, int, float, int]] = {"blocks": ("blocks", config.layers, tokens, block)}
    if isinstance(config, DPARConfig):
        layers_of = {
            "encoder": ("blocks", config.encoder_layers, tokens - images, block),
            "patch transformer": ("blocks", config.patch_layers, patches, block),
            "decoder": ("blocks", config.decoder_layers, tokens, block),
            "pooling": ("pooling", config.encoder_layers, patches, 4 * width**2),
            "copying": ("copying", config.decoder_layers, patches, width**2),
        }
    found = {}
    for part, tally in kernels.parts.items():
        if part not in layers_of:
            found[part] = tally
            continue
        kind, count, rows, weights = layers_of[part]
        per_row, launches = FUSED[kind]
        found[part] = Tally()
        found[part].add(launches * count, 0.0, count * (per_row * width * rows + 12.0 * weights), PRODUCTS)
        for kept in ("products", "attention"):
            found[part].include(kernels.kinds.get((part, kept), Tally()))
    return found


def lines(title: str, kernels: Kernels, fused: dict[str, Tally], most: int) -> Iterator[str]:
    """Yield the tables of a step, eager and compiled."""
    yield f"{title}: {kernels.waits} values read by the host"
    yield f"  {'':34} {'kernels':>8} {'TFLOP':>8} {'GB':>8} {'ms':>8}"

    def row(name: str, tally: Tally) -> str:
        return f"  {name:34} {tally.kernels:8} {tally.flops / 1e12:8.2f} {tally.bytes / 1e9:8.2f} {tally.seconds * 1e3:8.2f}"

    for part, tally in kernels.parts.items():
        yield row(part, tally)
        kinds = sorted(((k, t) for (p, k), t in kernels.kinds.items() if p == part), key=lambda item: -item[1].seconds)
        for kind, one in kinds[:most]:
            yield row(f"    {kind}", one)
    yield row("all, eager", whole(kernels.parts))
    for part, tally in fused.items():
        yield row(f"{part}, compiled", tally)
    yield row("all, compiled", whole(fused))


def whole(parts: dict[str, Tally]) -> Tally:
    """Return the sum of all parts."""
    total = Tally()
    for tally in parts.values():
        total.include(tally)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *MODEL_SIZES], nargs="+", default=["XL", "B"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--kernels", type=int, default=0, help="kinds of kernels to show per part")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.size:
        setup = Setup(torch.device("cpu"), tiny=name == "tiny")
        size = TINY if name == "tiny" else MODEL_SIZES[name]
        for family in ("llamagen", "dpar"):
            config = setup.config(family, size)
            kernels = count(setup, config, options.batch)
            fused = compiled(kernels, setup, config, options.batch)
            print("\n".join(lines(f"{family}-{name}, {options.batch} images", kernels, fused, options.kernels)), flush=True)
            for how, parts in (("eager", kernels.parts), ("compiled", fused)):
                found[f"{family}-{name}, {how}"] = {part: vars(tally) for part, tally in parts.items()}
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
