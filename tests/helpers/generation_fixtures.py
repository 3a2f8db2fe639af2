"""Tiny random models whose outputs vary enough to show every part, the golden ones, and the uncached baselines."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dpar_core.generation.sampling import SampleSettings, guide, sample_tokens, uniforms
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig, next_token_entropies
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.rule import PatchRule, lengths_from_starts, patch_starts
from tests.helpers.paths import GOLDEN

CODES, GRID, CLASSES = 16, 4, 5
TOKENS = GRID * GRID


@torch.no_grad()
def lively(model: nn.Module, seed: int) -> nn.Module:
    """Random weights large enough that attention, norms and the (initially zero) output layer matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        scale, offset = (0.3, 1.0) if "norm" in name else (0.15, 0.0)
        parameter.copy_(values * (0.6 if "output" in name or "emb" in name else scale) + offset)
    return model.eval().requires_grad_(False)


def tiny_gate() -> GPT:
    return lively(GPT(GPTConfig(CODES, GRID, 32, 2, 2, ffn_multiple=32)), 1)


def tiny_baseline() -> GPT:
    return lively(GPT(GPTConfig(CODES, GRID, 32, 2, 3, ffn_multiple=32, num_classes=CLASSES)), 2)


def tiny_dpar(position_encoding: str = "4d", *, encoder_layers: int = 1) -> DPAR:
    config = DPARConfig(CODES, GRID, 32, 2, encoder_layers, 2, 2, CLASSES, 32, position_encoding)
    return lively(DPAR(config), 3)


def golden_gpt(name: str, num_classes: int | None) -> GPT:
    model = GPT(GPTConfig(128, 8, 64, 2, 2, num_classes=num_classes))
    model.load_state_dict(load_file(GOLDEN / f"{name}.safetensors"))
    return model.eval().requires_grad_(False)


def golden_dpar(position_encoding: str) -> DPAR:
    model = DPAR(DPARConfig(128, 8, 64, 2, 1, 2, 2, 10, position_encoding=position_encoding))
    model.load_state_dict(load_file(GOLDEN / "dpar_reference.safetensors"))
    return model.eval().requires_grad_(False)


def conditional_and_not(model: nn.Module, forward, labels: Tensor, scale: Tensor) -> Tensor:
    """Guided logits of the last position: forward(labels) -> (B, n, V)."""
    cond = forward(labels)[:, -1]
    null = torch.full_like(labels, model.config.num_classes)
    return guide(cond, forward(null)[:, -1], scale.expand(len(labels)))


@torch.inference_mode()
def uncached_gpt(
    model: GPT, labels: Tensor, seeds: list[int], settings: SampleSettings, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the whole baseline on the whole prefix for every token. Returns tokens (B, T) and guided logits (B, T, V)."""
    count = model.config.tokens
    tokens, logits = torch.zeros(len(labels), 0, dtype=torch.int64), []
    numbers, scales = uniforms(seeds, count), settings.scales(count)
    for t in range(count):
        prefix = tokens
        guided = conditional_and_not(model, lambda to, prefix=prefix: model(prefix, to), labels, scales[t])
        logits.append(guided)
        new = sample_tokens(guided, numbers[:, t], settings)
        if given is not None and t < given.shape[1]:
            new = given[:, t]
        tokens = torch.cat([tokens, new[:, None]], dim=1)
    return tokens, torch.stack(logits, dim=1)


@torch.inference_mode()
def uncached_dpar(
    model: DPAR,
    gate: GPT | None,
    labels: Tensor,
    seeds: list[int],
    settings: SampleSettings,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[np.ndarray], Tensor]:
    """Run entropy model and DPAR on the whole prefix for every token, with the batched boundary rule.

    Returns tokens (B, T), guided logits (B, T, V), patch lengths, entropies (B, T).
    """
    count, rule = model.config.tokens, settings.rule
    tokens, logits = torch.zeros(len(labels), 0, dtype=torch.int64), []
    entropies = torch.full((len(labels), count), float("nan"))
    numbers, scales = uniforms(seeds, count), settings.scales(count)
    for t in range(count):
        if t and gate is not None and settings.gate == "entropy_model":
            entropies[:, t] = next_token_entropies(gate(tokens)[:, -1])
        if t and settings.gate == "decoder":
            entropies[:, t] = decoder_entropies(model, tokens, labels, entropies[:, :t], rule)
        guided = conditional_and_not(
            model, _forward(model, tokens, layout_of(entropies[:, : t + 1], rule)), labels, scales[t]
        )
        logits.append(guided)
        new = sample_tokens(guided, numbers[:, t], settings)
        if given is not None and t < given.shape[1]:
            new = given[:, t]
        tokens = torch.cat([tokens, new[:, None]], dim=1)
    lengths = lengths_from_starts(patch_starts(entropies, rule).numpy())
    return tokens, torch.stack(logits, dim=1), lengths, entropies


def layout_of(entropies: Tensor, rule: PatchRule) -> PatchLayout:
    lengths = lengths_from_starts(patch_starts(entropies, rule).numpy())
    return PatchLayout.from_lengths(lengths, row_width=rule.row_width)


def _forward(model: DPAR, tokens: Tensor, layout: PatchLayout):
    return lambda labels: model(tokens, labels, layout)


def decoder_entropies(model: DPAR, tokens: Tensor, labels: Tensor, entropies: Tensor, rule: PatchRule) -> Tensor:
    """Entropies of the next token under the decoder if it belonged to the patch that is open, unguided: (B,)."""
    starts = patch_starts(entropies, rule)
    starts = torch.cat([starts, torch.zeros(len(starts), 1, dtype=torch.bool)], dim=1)
    layout = PatchLayout.from_lengths(lengths_from_starts(starts.numpy()), row_width=rule.row_width)
    return next_token_entropies(model(tokens, labels, layout)[:, -1])
