"""Generation on a device that is not the CPU, made of CPU memory: run as a script, prints what came out as JSON.

A GPU refuses tensors of two devices in one operation, is waited for whenever a value is read or memory of the host is
copied to it, and runs a kernel for every operation that is more than a view. This device refuses the same and counts the
readings, copies and kernels, so what is wrong there is found without a GPU. It is registered with torch for the whole
process: tests run this file as a process of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dpar_core.generation import static
from dpar_core.generation.generate import DPARGenerator, GPTGenerator
from dpar_core.generation.sampling import SampleSettings
from dpar_core.generation.static import Static, StaticDPAR
from dpar_core.patches.rule import PatchRule
from tests.helpers.generation_fixtures import CODES, GRID, tiny_baseline, tiny_dpar, tiny_gate

NAME = "elsewhere"
VIEWS = (
    "view",
    "_unsafe_view",
    "expand",
    "slice",
    "select",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "t",
    "split",
    "chunk",
    "unbind",
    "detach",
    "alias",
    "view_as_complex",
    "view_as_real",
    "as_strided",
    "empty",
    "empty_like",
    "new_empty",
    "_reshape_alias",
    "split_with_sizes",
    "is_same_size",
)
ORIGINALS = {"launch": Static.launch, "read_count": StaticDPAR.read_count}
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # the host waits for their result


class There(torch.Tensor):
    """A tensor on the other device; `held` is its content."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran outside the mode")


class Elsewhere(TorchDispatchMode):
    """Runs every operation; refuses those that mix the devices, as CUDA does.

    waits: how often the host had to wait for a value; copies: how often its memory was copied there; kernels: operations
    there that are more than a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.copies = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name, wanted = func.overloadpacket.__name__, kwargs.get("device")
        wanted = wanted if wanted is None else torch.device(wanted).type
        if wanted != NAME and not any(isinstance(x, There) for x in tensors):
            return func(*args, **kwargs)
        here = [x for x in tensors if not isinstance(x, There) and x.ndim]
        if here and name not in ("_to_copy", "copy_"):
            raise RuntimeError(f"{func}: a tensor {tuple(here[0].shape)} is on the CPU, others are on the other device")
        self.waits += name in READS or wanted == "cpu"
        self.copies += bool(here) or (wanted == NAME and name == "_to_copy" and not isinstance(tensors[0], There))
        self.kernels += name not in VIEWS
        if wanted:
            kwargs["device"] = "cpu"
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
        result = func(*args, **kwargs)
        if wanted == "cpu":
            return result
        if name.endswith("_") and result is not None:
            return tensors[0]
        return tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, result)


def compared(make, **arguments) -> dict:
    """Draw on both devices with make(device) -> generator."""
    labels, seeds = torch.tensor([3, 0, 4, 1, 2]), [11, 5, 900, 12, 13]
    # Inference mode knows no tensors of other kinds.
    generate = torch.no_grad()(type(make("cpu")).generate.__wrapped__)
    expected = generate(make("cpu"), labels, seeds, keep_logits=True, **arguments)
    with Elsewhere() as mode:
        generator = make(NAME)
        mode.waits = mode.copies = mode.kernels = 0
        steps = watched(mode, generator)
        found = generate(generator, labels, seeds, keep_logits=True, **arguments)
        counts = {name: getattr(mode, name) for name in steps}
        tokens, logits = found.tokens.cpu(), found.logits.cpu()
    return {
        "same_tokens": torch.equal(tokens, expected.tokens),
        "same_patches": [x.tolist() for x in found.patch_lengths] == [x.tolist() for x in expected.patch_lengths],
        "difference": float((logits - expected.logits).abs().max()),
        **(steps if generator.static else counts),
    }


def watched(mode: Elsewhere, generator) -> dict:
    """Count what happens in the steps of a static decoder: in all that it launches, and in what the host reads between."""
    steps = {"waits": 0, "copies": 0, "kernels": 0}

    def counted(original):
        def wrapped(*arguments):
            before = {name: getattr(mode, name) for name in steps}
            result = original(*arguments)
            for name in steps:
                steps[name] += getattr(mode, name) - before[name]
            return result

        return wrapped

    if generator.static:
        Static.launch, StaticDPAR.read_count = (counted(ORIGINALS[name]) for name in ("launch", "read_count"))
    return steps


def triton_kernels(make, *, fused: int = 0) -> int:
    """Count the kernels of all steps on CUDA: launches of Triton's, none of which runs, and of torch's between them.

    fused: rows up to which norm, residual and silu are part of the products.
    """
    language = SimpleNamespace(constexpr=lambda value: value)  # nothing is compiled here, so that names are enough
    names = SimpleNamespace(jit=lambda f: f, language=language, next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    with patch.dict(sys.modules, {"triton": names, "triton.language": language}):
        from dpar_core.generation import triton_ops

    with Elsewhere() as mode, patch.object(triton_ops, "FUSED", fused):

        class Counted(triton_ops.TritonOps):
            def go(self, *arguments, **constants):
                mode.kernels += 1

        generator = make(NAME)
        steps, labels, seeds = watched(mode, generator), torch.tensor([3, 0, 4, 1, 2]), [11, 5, 900, 12, 13]
        unchecked = patch.object(DPARGenerator, "_sound", lambda self, drawn: drawn)  # no kernel runs: nothing is a number
        with patch.object(static, "ops_for", lambda device: Counted()), unchecked:
            torch.no_grad()(type(generator).generate.__wrapped__)(generator, labels, seeds)
    assert steps["waits"] == steps["copies"] == 0
    return steps["kernels"]


def main() -> None:
    _setup_privateuseone_for_python_backend(NAME)
    torch.set_num_threads(1)
    rows = PatchRule("entropy_rows", GRID, 2.2, 4)
    guided = SampleSettings(cfg_scale=2.0, rule=rows)
    interval = replace(guided, cfg_schedule="interval", cfg_interval=(0.0, 0.7))
    decoder = replace(interval, gate="decoder", rule=replace(rows, threshold=1.2))
    fixed = replace(guided, rule=PatchRule("static", GRID, static_length=3), top_k=5, top_p=0.9)
    given = torch.randint(CODES, (5, GRID * GRID), generator=torch.Generator().manual_seed(4))
    some = given[:, :6]

    def dpar(settings, dtype=torch.float32, **how):
        def make(device):
            here = {} if device == "cpu" else how  # the CPU's ragged decoder is what all are compared with
            return DPARGenerator(tiny_dpar().to(device), tiny_gate().to(device), settings, dtype=dtype, **here)

        return make

    def baseline(settings, **how):
        return lambda device: GPTGenerator(tiny_baseline().to(device), settings, **({} if device == "cpu" else how))

    on_cuda = {
        "entropy model": dpar(guided, static=True, schedule="ahead"),
        "decoder": dpar(decoder, static=True, schedule="ahead"),
        "baseline": baseline(interval, static=True),
    }
    kernels = {name: triton_kernels(make) for name, make in on_cuda.items()}
    fused = triton_kernels(on_cuda["entropy model"], fused=64)
    print(
        json.dumps(
            {
                "kernels on CUDA": kernels,
                "with fused products": fused,
                "entropy model": compared(dpar(guided), given=some),
                "two lanes, guidance that ends": compared(dpar(interval), lanes=2),
                "decoder": compared(dpar(decoder)),
                "bfloat16": compared(dpar(guided, torch.bfloat16), given=given),  # all tokens, so that rounding turns none
                "static patches": compared(dpar(fixed)),
                "baseline": compared(baseline(interval), given=some),
                "static decoder, ahead": compared(dpar(guided, static=True, schedule="ahead"), given=some),
                "static decoder, buckets": compared(dpar(guided, static=True, schedule="buckets"), given=some),
                "static decoder, rounds": compared(dpar(guided, static=True, schedule="rounds"), given=some, lanes=3),
                "static decoder, top-k and top-p": compared(dpar(fixed, static=True)),
                "static decoder, decoder's entropy": compared(dpar(decoder, static=True, schedule="ahead")),
                "static decoder, baseline": compared(baseline(interval, static=True), given=some),
            }
        )
    )


if __name__ == "__main__":
    main()
