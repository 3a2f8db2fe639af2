"""Training steps on a device that is not the CPU, see other_device.py: run as a script, prints what came out as JSON."""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dpar_core.models import loss
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig, next_token_loss
from dpar_core.patches.layout import PatchLayout
from dpar_core.training.meters import Guard, MeanLoss
from dpar_core.training.optim import OptimSettings, adamw, clip_gradients
from dpar_core.training.prefetch import Batch
from tests.helpers.other_device import NAME, Elsewhere

GRID, CODES, CLASSES = 4, 16, 5
SHAPE = {"codebook_size": CODES, "row_width": GRID, "width": 32, "heads": 2, "num_classes": CLASSES, "ffn_multiple": 32}
LENGTHS = {
    "short patches": [[1, 1, 2, 4, 1, 3, 4], [1, 3, 4, 4, 4], [1] * 16],
    "long patches": [[1, 2, 10, 3], [16], [1, 3, 4, 4, 4]],
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = GPT(GPTConfig(**SHAPE, layers=2))
    if kind == "dpar":
        model = DPAR(DPARConfig(**SHAPE, encoder_layers=2, patch_layers=2, decoder_layers=2))
    nn.init.normal_(model.output.weight, std=0.1)
    return model.train()


def batch_of(lengths: list[list[int]]) -> Batch:
    tokens = torch.randint(CODES, (len(lengths), GRID**2), generator=torch.Generator().manual_seed(1))
    layout = PatchLayout.from_lengths([np.array(one) for one in lengths], row_width=GRID)
    return Batch(tokens, torch.arange(len(lengths)), layout)


def steps(kind: str, lengths: list[list[int]], device: str, mode: Elsewhere | None) -> tuple[list[float], dict[str, int]]:
    """Take three steps and return their losses, and what the last one made the host wait for, all but its batch's copies."""
    model = model_of(kind).to(device)
    parameters = list(model.parameters())
    optimizer = adamw(model.named_parameters(), OptimSettings(lr=1e-2))
    made = torch.tensor
    with patch.object(torch, "tensor", lambda value, *, dtype, device: made(value, dtype=dtype).to(device)):
        guard, mean = Guard(100.0, torch.device(device)), MeanLoss(torch.device(device))
    batch = batch_of(lengths).to(torch.device(device))
    losses: list[Tensor] = []
    for step in range(3):
        if mode is not None:
            mode.waits = mode.copies = mode.kernels = 0
        if kind == "dpar":
            value = model(batch.tokens, batch.labels, batch.layout, targets=batch.tokens)
        else:
            value = next_token_loss(model, batch.tokens, batch.labels)
        value.backward()
        norm = clip_gradients(parameters, 1.0)
        guard.look(step, value.detach(), norm)
        vars(optimizer).update(grad_scale=None, found_inf=guard.bad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean.add(value.detach())
        losses.append(value.detach())
    counts = {} if mode is None else {name: getattr(mode, name) for name in ("waits", "copies", "kernels")}
    return [float(one.cpu()) for one in losses], counts


def main() -> None:
    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.set_num_threads(1)
    cases = [("dpar", name) for name in LENGTHS] + [("llamagen", "short patches")]
    found = {}
    for kind, name in cases:
        with patch.object(loss, "LOGITS_AT_ONCE", 8 * CODES):
            expected, _ = steps(kind, LENGTHS[name], "cpu", None)
            with Elsewhere() as mode:
                losses, counts = steps(kind, LENGTHS[name], NAME, mode)
        found[f"{kind}, {name}"] = {**counts, "losses": losses, "expected": expected}
    print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
