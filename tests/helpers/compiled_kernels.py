"""Compile the kernels of triton_ops.py for a GPU that is not there: run as a script, prints what came out as JSON.

    python -m tests.helpers.compiled_kernels [90]        # compute capability, in tenths

Triton brings its own compiler down to machine code, so that a mistake of types, or a tile that does not fit into the
shared memory of a multiprocessor, is found without a GPU. Every kernel is compiled with the arguments that the static
decoders launch it with; nothing runs. For each kernel: how many variants there are, the most shared memory in bytes, and
how many of them multiply on tensor cores.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpar_core.generation import static, triton_ops
from dpar_core.generation.generate import DPARGenerator, GPTGenerator
from dpar_core.generation.sampling import SampleSettings
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.sizes import GATE_SIZES, MODEL_SIZES
from dpar_core.patches.rule import PatchRule
from tests.helpers.other_device import NAME, Elsewhere

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages")
CODES, ROW, CLASSES = 16384, 16, 1000


class CompilingOps(triton_ops.TritonOps):
    """Compiles what it should launch. found: shared memory in bytes and use of tensor cores of every variant, by kernel."""

    def __init__(self, target: GPUTarget, found: dict[str, dict[Any, tuple[int, bool]]]) -> None:
        super().__init__()
        self.target, self.found = target, found

    def go(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        signature: dict[str, str] = {}
        fixed = {name: value for name, value in constants.items() if name not in OPTIONS}
        options = {name: value for name, value in constants.items() if name in OPTIONS}
        hints: dict[tuple[int], list[list[Any]]] = {}
        for number, (parameter, value) in enumerate(zip(kernel.params, arguments)):
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            elif value == 1 and isinstance(value, int):  # Triton makes a constant of it
                signature[parameter.name], fixed[parameter.name] = "constexpr", 1
            else:
                signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                hints[(number,)] = [["tt.divisibility", 16]]
        signature |= {name: "constexpr" for name in constants if name not in OPTIONS}
        variants = self.found.setdefault(kernel.__name__, {})
        key = (*signature.items(), *sorted(fixed.items()), *sorted(options.items()))
        if key not in variants:
            source = ASTSource(kernel, signature, fixed, hints)
            compiled = triton.compile(source, target=self.target, options=options)
            variants[key] = compiled.metadata.shared, "mma" in compiled.asm["ptx"]


def compile_all(size: str, images: int, fused: int, dtype: torch.dtype, ops: CompilingOps) -> None:
    """Compile what the decoders launch: one layer of each kind, in all schedules, with guidance."""
    shape, gate_shape = MODEL_SIZES[size], GATE_SIZES["XS"]
    model = DPAR(DPARConfig(CODES, ROW, shape.width, shape.heads, 1, 1, 1, CLASSES, 256)).to(NAME)
    gate = GPT(GPTConfig(CODES, ROW, gate_shape.width, gate_shape.heads, 1, 256)).to(NAME)
    baseline = GPT(GPTConfig(CODES, ROW, shape.width, shape.heads, 1, 256, num_classes=CLASSES)).to(NAME)
    rule = PatchRule("entropy_rows", ROW, 7.0, 4)
    makers: list[Any] = [
        lambda schedule=schedule: DPARGenerator(
            model,
            gate,
            SampleSettings(cfg_scale=2.0, rule=rule),
            dtype=dtype,
            gate_dtype=torch.float16,
            static=True,
            schedule=schedule,
        )
        for schedule in ("ahead", "buckets", "rounds")
    ]
    makers.append(lambda: GPTGenerator(baseline, SampleSettings(cfg_scale=2.0), dtype=dtype, static=True))
    with (
        patch.object(static, "ops_for", lambda device: ops),
        patch.object(triton_ops, "FUSED", fused),
    ):
        for maker in makers:
            engine = maker()._new_engine(images, images, False)
            engine.prepare()
            buckets = getattr(engine, "buckets", [])
            for name, launch in engine.functions.items():
                if name[0] != "patch" or name[1] in (buckets[0], buckets[-1]):
                    launch()


def main() -> None:
    _setup_privateuseone_for_python_backend(NAME)  # on a CPU, matrices would be float32
    torch.set_num_threads(1)
    found: dict[str, dict[Any, tuple[int, bool]]] = {}
    ops = CompilingOps(GPUTarget("cuda", int(sys.argv[1]) if sys.argv[1:] else 90, 32), found)
    with torch.no_grad(), Elsewhere():
        for size, images, fused in (("B", 1, 0), ("XL", 64, 0), ("XL", 64, 512)):
            compile_all(size, images, fused, torch.bfloat16, ops)
    summary = {}
    for name, variants in found.items():
        shared, cores = zip(*variants.values())
        summary[name] = [len(variants), max(shared), sum(cores)]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
