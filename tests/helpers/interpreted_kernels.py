"""The kernels of triton_ops.py on a CPU, by Triton's interpreter: run as a script, prints what came out as JSON.

    python -m tests.helpers.interpreted_kernels [rounds ...]        # all cases, or those whose names begin so

TRITON_INTERPRET holds for a whole process and must be set before Triton is imported, so tests run this file as a process
of its own. The interpreter cannot multiply tiles of bfloat16.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from triton.runtime import interpreter

from dpar_core.generation import static, stepping, triton_ops
from dpar_core.generation.generate import DPARGenerator, GPTGenerator
from dpar_core.generation.sampling import SampleSettings
from dpar_core.patches.rule import PatchRule
from tests.helpers.generation_fixtures import GRID, tiny_baseline, tiny_dpar, tiny_gate

ROWS = PatchRule("entropy_rows", GRID, 0.93, 4)
GUIDED = SampleSettings(cfg_scale=2.0, rule=ROWS)
FILTERED = replace(GUIDED, top_k=6, top_p=0.9, rule=replace(ROWS, mode="entropy"))
TOKENS_COMPARED = 6


# Bounds of loops are arrays of one element there, which NumPy 2.4 no longer takes for numbers.
_as_published = interpreter._patch_lang_tensor


def _with_bounds(tensor, scope) -> None:
    _as_published(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _with_bounds


class Enough(Exception):
    """So many tokens are compared: the interpreter takes seconds for each. In rounds, images are at tokens of their own."""


def steps() -> dict[str, bool]:
    """Sample some tokens with the static decoder and these kernels, and compare them with the ragged decoder's."""
    labels, seeds = torch.tensor([3, 0, 4]), [11, 5, 900]
    cases = {
        "ahead, products fused": (GUIDED, "ahead", 3, 4, 64),
        "buckets, filtered": (FILTERED, "buckets", 3, 4, 0),
        "one image": (replace(GUIDED, cfg_scale=1.0), "buckets", 1, 4, 0),
        "rounds": (FILTERED, "rounds", 3, 0, 0),
        "rounds, one after another": (GUIDED, "rounds", 2, 0, 0),
        "baseline, products fused": (replace(GUIDED, rule=None), None, 3, 4, 64),
    }
    found = {}
    for name, (settings, schedule, images, small, fused) in cases.items():
        if sys.argv[1:] and not name.startswith(tuple(sys.argv[1:])):
            continue

        def generator(settings=settings, schedule=schedule, **how):
            if settings.rule is None:
                return GPTGenerator(tiny_baseline(), settings, **how)
            return DPARGenerator(tiny_dpar(), tiny_gate(), settings, schedule=schedule, **how)

        alone = name.endswith("one after another")
        enough = TOKENS_COMPARED * images if not alone else GRID**2 + TOKENS_COMPARED

        def stop(count: int, left=[enough]) -> None:  # noqa: B006
            left[0] -= count
            if left[0] <= 0:
                raise Enough

        expected = generator().generate(labels[:images], seeds[:images])
        with (
            patch.object(stepping, "can_pack", lambda device: False),
            patch.object(static, "ops_for", lambda device: triton_ops.TritonOps()),
            patch.object(static, "SMALLEST_BUCKET", 2),
            patch.object(triton_ops, "SMALL", small),
            patch.object(triton_ops, "FUSED", fused),
            suppress(Enough),
        ):
            drawn = generator(static=True)
            drawn.generate(labels[:images], seeds[:images], progress=stop, lanes=1 if alone else None)
        upto, engine, right = [TOKENS_COMPARED] * images, drawn.engine, []
        if engine.apart:  # some are further, some less far
            upto = [GRID**2] * int(engine.image[0]) if alone else []
            upto += (engine.position + engine.apart.done).tolist()
        for image, tokens in enumerate(upto):
            right.append(torch.equal(engine.tokens[image, :tokens], expected.tokens[image, :tokens]))
            if settings.rule:
                mine, theirs = engine.entropies[image, :tokens], expected.entropies[image, :tokens]
                right.append(torch.allclose(mine, theirs, atol=1e-4, rtol=0, equal_nan=True))
        found[name] = all(right) and sum(upto) >= enough
    return found


def products() -> dict[str, float]:
    """Return the largest error of every product with what is fused into it, by dtype and number of rows."""
    generator, ops, found = torch.Generator().manual_seed(0), triton_ops.TritonOps(), {}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], None, triton_ops.NORM_EPS)

    for dtype, rows in itertools.product((torch.float32, torch.float16), (3, 40)):
        errors = []
        for outputs, columns in ((48, 80), (200, 64)):
            matrix = SimpleNamespace(weight=(random(outputs, columns) / columns**0.5).to(dtype))
            weight, x, add = matrix.weight.float(), random(rows, columns), random(rows, 2 * columns)[:, columns:]
            res, more = random(rows, outputs), random(rows, 2 * outputs)[:, outputs:]
            gate, up = F.linear(norm(x), weight).chunk(2, dim=-1)
            rounded = x if rows <= triton_ops.SMALL else x.to(dtype)
            pairs = (
                (ops.fused(matrix, x, norm=True), F.linear(norm(x), weight)),
                (ops.fused(matrix, x, norm=True, add=add), F.linear(norm(x + add), weight)),
                (ops.fused(matrix, x, norm=True, swiglu=True), F.silu(gate) * up),
                (ops.fused(matrix, rounded, res=res, add=more), res + more + F.linear(rounded.float(), weight)),
            )
            errors += [float((a.float() - b).abs().max()) for a, b in pairs]
        found[f"{dtype}, {rows} rows"] = max(errors)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode(), patch.object(triton_ops, "FUSED", 64):
        errors = products()
    print(json.dumps({"steps": steps(), "products": errors}))
