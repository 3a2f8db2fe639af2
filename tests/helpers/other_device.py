"""Generation on a device that is not the CPU, made of CPU memory: run as a script, prints what came out as JSON.

A GPU refuses tensors of two devices in one operation and is waited for whenever a value is read. This device refuses the
same and counts the readings, so what is wrong there is found without a GPU. It is registered with torch for the whole
process: tests run this file as a process of its own.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dpar_core.generation.generate import DPARGenerator, GPTGenerator
from dpar_core.generation.guidance import SampleSettings
from dpar_core.patches.rule import PatchRule
from tests.helpers.generation_fixtures import CODES, GRID, tiny_dpar, tiny_gate, tiny_twin

NAME = "elsewhere"
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # the host waits for their result


class There(torch.Tensor):
    """A tensor on the other device; `held` is its content."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran outside the mode")


class Elsewhere(TorchDispatchMode):
    """Runs every operation; refuses those that mix the devices, as CUDA does. waits: how often the host had to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

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
        if wanted:
            kwargs["device"] = "cpu"
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
        result = func(*args, **kwargs)
        if wanted == "cpu":
            return result
        if name.endswith("_"):
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
        mode.waits = 0
        found = generate(generator, labels, seeds, keep_logits=True, **arguments)
        waits = mode.waits
        tokens, logits = found.tokens.cpu(), found.logits.cpu()
    return {
        "same_tokens": torch.equal(tokens, expected.tokens),
        "same_patches": [x.tolist() for x in found.patch_lengths] == [x.tolist() for x in expected.patch_lengths],
        "difference": float((logits - expected.logits).abs().max()),
        "waits": waits,
    }


def main() -> None:
    _setup_privateuseone_for_python_backend(NAME)
    torch.set_num_threads(1)
    rows = PatchRule("entropy_rows", GRID, 2.2, 4)
    guided = SampleSettings(cfg_scale=2.0, rule=rows)
    interval = replace(guided, cfg_schedule="interval", cfg_interval=(0.0, 0.7))
    decoder = replace(interval, gate="decoder", rule=replace(rows, threshold=1.2))
    static = replace(guided, rule=PatchRule("static", GRID, static_length=3), top_k=5, top_p=0.9)
    given = torch.randint(CODES, (5, GRID * GRID), generator=torch.Generator().manual_seed(4))
    some = given[:, :6]

    def dpar(settings, dtype=torch.float32):
        return lambda device: DPARGenerator(tiny_dpar().to(device), tiny_gate().to(device), settings, dtype=dtype)

    def twin(settings):
        return lambda device: GPTGenerator(tiny_twin().to(device), settings)

    print(json.dumps({
        "entropy model": compared(dpar(guided), given=some),
        "two lanes, guidance that ends": compared(dpar(interval), lanes=2),
        "decoder": compared(dpar(decoder)),
        "bfloat16": compared(dpar(guided, torch.bfloat16), given=given),  # all tokens, so that rounding turns none
        "static patches": compared(dpar(static)),
        "twin": compared(twin(interval), given=some),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
