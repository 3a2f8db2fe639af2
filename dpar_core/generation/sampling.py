"""How a token is sampled: classifier-free guidance over the course of an image, temperature, top-k and top-p, and one
random number per token.

Shapes: A rows, T tokens per image, V codebook entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpar_core.choices import LARGEST_CFG_SCALE, LEAST_TEMPERATURE, Gate, GuidanceSchedule
from dpar_core.models.dpar import DPARConfig
from dpar_core.models.gpt import GPTConfig
from dpar_core.patches.rule import PatchRule


@dataclass(frozen=True)
class SampleSettings:
    """Everything but model, label and seed that an image depends on.

    cfg_scale: guided logits are uncond + s (cond - uncond); 1 is off.
    cfg_schedule: "constant" (s = cfg_scale), "linear" (from 1 at the first token to cfg_scale at the last), "interval"
        (cfg_scale for tokens whose share t / T of the image lies in [cfg_interval[0], cfg_interval[1]), else 1).
    temperature: 1 samples from the model's own distribution.
    top_k, top_p: 0 and 1 are off.
    greedy: take the likeliest token.
    gate: whose entropy cuts patches, "entropy_model" or "decoder".
    rule: the patch rule while sampling (DPAR only).
    Raises ValueError for values that make no sense.
    """

    cfg_scale: float = 1.0
    cfg_schedule: GuidanceSchedule = "constant"
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    gate: Gate = "entropy_model"
    rule: PatchRule | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.cfg_schedule not in ("constant", "linear", "interval"):
            raise ValueError(f"cfg_schedule must be constant, linear or interval; got {self.cfg_schedule!r}")
        if self.gate not in ("entropy_model", "decoder"):
            raise ValueError(f"gate must be entropy_model or decoder; got {self.gate!r}")
        if not 1 <= self.cfg_scale <= LARGEST_CFG_SCALE:
            raise ValueError(
                f"cfg_scale must be at least 1 (1 is off) and at most {LARGEST_CFG_SCALE:g}; got {self.cfg_scale}"
            )
        low, high = self.cfg_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"cfg_interval must be two shares 0 <= a <= b <= 1; got {self.cfg_interval}")
        if not (self.temperature >= LEAST_TEMPERATURE and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"expected temperature >= {LEAST_TEMPERATURE:g}, top_k >= 0 and 0 < top_p <= 1; got {self.temperature}, "
                f"{self.top_k}, {self.top_p}"
            )

    def scales(self, tokens: int) -> Tensor:
        """Return the guidance scale of every token: (T,) float32."""
        position = torch.arange(tokens, dtype=torch.float32)
        if self.cfg_schedule == "linear":
            return 1 + (self.cfg_scale - 1) * position / max(tokens - 1, 1)
        scales = torch.full((tokens,), float(self.cfg_scale))
        if self.cfg_schedule == "interval":
            share = torch.arange(tokens, dtype=torch.float64) / tokens
            low, high = self.cfg_interval
            scales[(share < low) | (share >= high)] = 1.0
        return scales

    def guided(self, tokens: int) -> bool:
        """Whether any token needs the unconditional half."""
        return bool((self.scales(tokens) != 1).any())


def uniforms(seeds: Sequence[int], tokens: int) -> Tensor:
    """Return one number in [0, 1) for every token of every image, each image from a generator of its own seed alone:
    (B, T) float64, on the CPU, so that all devices sample alike."""
    rows = [torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def guide(cond: Tensor, uncond: Tensor, scales: Tensor) -> Tensor:
    """Return uncond + s (cond - uncond): logits (A, V), scales (A,); a row of scale 1 keeps cond to the bit."""
    s = scales.unsqueeze(-1)
    return torch.where(s == 1, cond, uncond + s * (cond - uncond))


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Divide by the temperature, then drop all but the k likeliest tokens (ties with the k-th are kept), then all
    beyond the smallest set whose probability exceeds top_p (the token that crosses it is kept).

    logits: (..., V) float32. temperature above 0. top_k 0 and top_p 1 are off. Returns logits (..., V) float32 with
    -inf for dropped tokens. Raises ValueError.
    """
    if not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"expected temperature > 0, top_k >= 0 and 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}")
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        weakest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        above = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        above[..., 0] = 0  # probability of all likelier tokens
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, above > top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def sample_tokens(logits: Tensor, uniform: Tensor, settings: SampleSettings) -> Tensor:
    """Sample a token for each row by inverting the cumulative distribution.

    logits: (A, V) float32, guided.
    uniform: (A,) float64 in [0, 1).
    Returns (A,) int64. No row depends on another.
    """
    if settings.greedy:
        return logits.argmax(-1)
    filtered = filter_logits(logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    cumulative = filtered.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Smallest index whose cumulative sum exceeds the random number: never a token of probability zero.
    return torch.searchsorted(cumulative, uniform.unsqueeze(-1) * total, right=True).squeeze(-1)


class TokenSampler:
    """Turns logits into tokens: guidance, given tokens, one random number per token."""

    def __init__(
        self,
        settings: SampleSettings,
        seeds: Sequence[int],
        given: Tensor | None,
        config: GPTConfig | DPARConfig,
        *,
        device: torch.device,
        keep_logits: bool,
    ) -> None:
        self.settings, self.device, tokens = settings, device, config.tokens
        self.given = None if given is None else given.to(device)
        self.uniforms = uniforms(seeds, tokens).to(device)
        self.scales = settings.scales(tokens).to(device)
        guided = torch.nonzero(settings.scales(tokens) != 1).flatten().tolist()
        self.ever_guided, self.last_guided = bool(guided), max(guided, default=-1)
        self.tokens = torch.zeros(len(seeds), tokens, dtype=torch.int64, device=device)
        self.logits = torch.zeros(len(seeds), tokens, config.codebook_size, device=device) if keep_logits else None
        self.num_given = 0 if given is None else given.shape[1]

    def half(self, lanes: Tensor, positions: Tensor) -> Tensor:
        """Return those of the lanes (A,), on the host, that need an unconditional half: up to the last guided token."""
        if not self.ever_guided:
            return lanes[:0]
        return lanes if self.last_guided == len(self.scales) - 1 else lanes[positions <= self.last_guided]

    def __call__(self, lanes: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        """lanes, positions: (A,) int64, on the host.
        logits: (A + U, V), conditional ones over those of `half`.
        Returns tokens (A,) int64.
        """
        guided = torch.nonzero(positions <= self.last_guided).flatten().to(self.device)
        lanes, positions = lanes.to(self.device), positions.to(self.device)
        logits, uncond = logits[: len(lanes)], logits[len(lanes) :]
        if len(uncond) == len(lanes):
            logits = guide(logits, uncond, self.scales[positions])
        elif len(uncond):
            logits = logits.index_copy(0, guided, guide(logits[guided], uncond, self.scales[positions[guided]]))
        if self.logits is not None:
            self.logits[lanes, positions] = logits
        tokens = sample_tokens(logits, self.uniforms[lanes, positions], self.settings)
        if self.given is not None and self.num_given:
            known = positions < self.num_given
            tokens = torch.where(known, self.given[lanes, positions.clamp_max(self.num_given - 1)], tokens)
        self.tokens[lanes, positions] = tokens
        return tokens
