"""Generation with exact caches, for DPAR and its LlamaGen baseline.

Everything in DPAR is causal and boundaries are known before the token that they begin, so what was computed stays: the
entropy model, the patch encoder and the patch decoder step once per token, the patch transformer once per patch. Encoder,
patch vectors and entropy model do not see the class: under guidance they run once, not twice.

An image depends on model, settings, label, seed and given tokens alone: every row is computed by kernels whose result
does not depend on the other rows (see kv_cache.py, stepping.py), and samples from a generator of its own seed.

Shapes: B images, T tokens per image, M_b patches of image b, A lanes that take part in a launch, D width, V codebook
entries. A lane is the place of one image in the caches; with guidance lane b has a second row B + b, unconditional.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from dpar_core.generation.lanes import Lanes
from dpar_core.generation.rounds import RoundsDPAR
from dpar_core.generation.sampling import SampleSettings, TokenSampler
from dpar_core.generation.static import Schedule, StaticDPAR, StaticGPT, static_dpar_bytes, static_gpt_bytes
from dpar_core.generation.stepping import DPARStepper, GPTStepper
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.memory import dpar_cache_bytes, gpt_cache_bytes
from dpar_core.patches.rule import lengths_from_starts

OnTokens = Callable[[int], None]  # called with the number of tokens just settled, over all images


@dataclass(frozen=True)
class Generated:
    """tokens: (B, T) int64.
    patch_lengths: for each image (M_b,) uint16 that sum to T (the baseline: none).
    entropies: (B, T) float32 nats by which the gate decided, nan where it was not asked, on the host.
    logits: (B, T, V) float32, guided, where they were asked for.
    """

    tokens: Tensor
    patch_lengths: list[np.ndarray]
    entropies: Tensor
    logits: Tensor | None = None


Engine = TypeVar("Engine", StaticGPT, StaticDPAR)


class _Generator(ABC, Generic[Engine]):
    """What both generators share: the checks of a call, and the choice between the static decoder and the ragged one."""

    config: GPTConfig | DPARConfig
    num_classes: int

    def __init__(
        self,
        config: GPTConfig | DPARConfig,
        settings: SampleSettings,
        device: torch.device,
        *,
        dtype: torch.dtype,
        static: bool | None,
        capture: bool,
    ) -> None:
        self.settings, self.device, self.dtype = settings, device, dtype
        self.guided = settings.guided(config.tokens)
        # A GPU's queue of launches needs the static decoder; the ragged one saves rows.
        self.static, self.capture = device.type == "cuda" if static is None else static, capture
        self.engine: Engine | None = None

    @abstractmethod
    def _new_engine(self, lanes: int, images: int, keep_logits: bool) -> Engine:
        """Return a static decoder of `lanes` images at a time, which may be asked for `images` at once."""

    @abstractmethod
    def _ragged(self, labels: Tensor, sampler: TokenSampler, progress: OnTokens | None, lanes: int) -> Generated: ...

    @torch.inference_mode()
    def generate(
        self,
        labels: Tensor,
        seeds: Sequence[int],
        *,
        given: Tensor | None = None,
        progress: OnTokens | None = None,
        keep_logits: bool = False,
        lanes: int | None = None,
    ) -> Generated:
        """Generate an image of each label.

        labels: (B,) int64 in [0, classes] (the last is "no class").
        seeds: B integers.
        given: (B, n) int64, the first n tokens of each image.
        lanes: images that are generated at a time (None: all); where they are at tokens of their own (ragged decoder, or
            static one in rounds), a lane that is done takes the next.
        Raises ValueError in a sentence.
        """
        self._check(labels, seeds, given)
        images, engine = len(labels), self.engine
        if not self.static:
            sampler = TokenSampler(self.settings, seeds, given, self.config, device=self.device, keep_logits=keep_logits)
            return self._sound(self._ragged(labels, sampler, progress, min(lanes or images, images)))
        lanes = min(lanes or images, images)
        # A smaller batch than the engine's is filled up, which keeps its kernels.
        small = engine is None or lanes > engine.images or (engine.apart is not None and images > engine.most)
        if engine is None or small or keep_logits != (engine.logits is not None):
            engine = self.engine = None  # its memory is free before the next one takes some
            engine = self.engine = self._new_engine(lanes, images, keep_logits)
            engine.prepare()
        parts = []
        for first in range(0, images, engine.most):
            some = slice(first, first + engine.most)
            engine.run(labels[some], seeds[some], None if given is None else given[some], progress)
            parts.append(generated_by(engine, len(labels[some])))
        return self._sound(parts[0] if len(parts) == 1 else joined(parts))

    def _sound(self, sampled: Generated) -> Generated:
        return sampled

    def _check(self, labels: Tensor, seeds: Sequence[int], given: Tensor | None) -> None:
        """Check what a caller asks for, in sentences."""
        config = self.config
        if labels.ndim != 1 or len(labels) != len(seeds):
            raise ValueError(
                f"expected one label and one seed per image; got {tuple(labels.shape)} labels, {len(seeds)} seeds"
            )
        wrong = labels[(labels < 0) | (labels > self.num_classes)]
        if len(wrong):
            raise ValueError(f"class {int(wrong[0])} does not exist: the model knows classes 0 to {self.num_classes - 1}")
        if given is None:
            return
        if given.ndim != 2 or given.shape[0] != len(labels) or given.shape[1] > config.tokens:
            raise ValueError(
                f"given tokens must be (B, n) with B = {len(labels)}, n <= {config.tokens}; got {tuple(given.shape)}"
            )
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < config.codebook_size:
            raise ValueError(f"given tokens must lie in 0..{config.codebook_size - 1}: were they made by another tokenizer?")


class GPTGenerator(_Generator[StaticGPT]):
    """Generates images with the LlamaGen baseline; weights are laid out once for many batches."""

    config: GPTConfig

    def __init__(
        self,
        model: GPT,
        settings: SampleSettings,
        *,
        dtype: torch.dtype = torch.float32,
        static: bool | None = None,
        capture: bool = True,
    ) -> None:
        """Lay out the weights. static, capture: as in `DPARGenerator`."""
        if model.config.num_classes is None:
            raise ValueError("this GPT has no class token, so it cannot generate images of a class: use the baseline")
        self.config, self.num_classes, self.stepper = model.config, model.config.num_classes, GPTStepper(model, dtype)
        super().__init__(self.config, settings, self.stepper.tokens.device, dtype=dtype, static=static, capture=capture)

    def cache_bytes(self, images: int) -> int:
        """Return the most bytes that the caches of a batch can take; of the static decoder, its working memory too."""
        if self.static:
            return static_gpt_bytes(self.stepper, images=images, halves=2 if self.guided else 1, dtype=self.dtype)
        return gpt_cache_bytes(self.config, images, guided=self.guided, value_bytes=self.dtype.itemsize)

    def _new_engine(self, lanes: int, images: int, keep_logits: bool) -> StaticGPT:
        return StaticGPT(
            self.stepper, self.settings, images=lanes, dtype=self.dtype, keep_logits=keep_logits, capture=self.capture
        )

    def _ragged(self, labels: Tensor, sampler: TokenSampler, progress: OnTokens | None, lanes: int) -> Generated:
        stepper, images = self.stepper, len(labels)
        assert stepper.classes is not None
        lanes_B = torch.arange(images)
        cache = stepper.new_cache((2 if self.guided else 1) * images, self.dtype)
        null = torch.full_like(labels, self.num_classes)
        x = stepper.classes[torch.cat([labels, null[: len(sampler.half(lanes_B, lanes_B * 0))]]).to(self.device)]
        for position in range(self.config.tokens):
            positions = torch.full_like(lanes_B, position)
            half = sampler.half(lanes_B, positions)
            rows = torch.cat([lanes_B, half + images])
            logits = stepper(x[: len(rows)], cache, rows, torch.full_like(rows, position))
            tokens = sampler(lanes_B, positions, logits)
            x = stepper.tokens[torch.cat([tokens, tokens[half.to(self.device)]])]
            if progress:
                progress(images)
        return Generated(sampler.tokens, [], torch.full(sampler.tokens.shape, float("nan")), sampler.logits)


class DPARGenerator(_Generator[StaticDPAR]):
    """Generates images with a DPAR; weights are laid out once for many batches."""

    config: DPARConfig

    def __init__(
        self,
        model: DPAR,
        entropy_model: GPT | None,
        settings: SampleSettings,
        *,
        dtype: torch.dtype = torch.float32,
        gate_dtype: torch.dtype = torch.float32,
        patience: int = 1,
        static: bool | None = None,
        schedule: Schedule | None = None,
        capture: bool = True,
    ) -> None:
        """Lay out the weights.

        dtype: of the model's matrices and caches. gate_dtype: the entropy model's; rounding moves boundaries, so it is that
        of the entropies the patches were trained on (`patches.maps.rule_precision`). patience: launches of the token
        networks after which the patch transformer steps for the lanes that wait for it (1: after each); a schedule, it never
        changes an image. static: use the static decoder (None: on CUDA); then `schedule` sets what becomes of rows that
        begin no patch (None: the fastest one as measured), and capture False replays no graph. Raises ValueError for a
        rule that is missing or does not fit, or an entropy model that does not.
        """
        config, rule = model.config, settings.rule
        if rule is None or rule.row_width != config.row_width:
            raise ValueError(f"expected a patch rule for rows of {config.row_width} tokens; got {rule and rule.row_width}")
        largest = float(np.log(config.codebook_size))
        if rule.threshold is not None and rule.reads_entropies and not 0 <= rule.threshold <= largest:
            raise ValueError(
                f"threshold {rule.threshold} nats makes no sense for {config.codebook_size} codes: expected 0 to "
                f"ln {config.codebook_size} = {largest:.3f}, the largest entropy there is"
            )
        self.asks_model = rule.reads_entropies and settings.gate == "entropy_model"
        self.asks_decoder = rule.reads_entropies and settings.gate == "decoder"
        if self.asks_model:
            if entropy_model is None:
                raise ValueError("the gate entropy_model needs an entropy model: give one, or use gate decoder")
            gate = entropy_model.config
            if (gate.codebook_size, gate.row_width, gate.num_classes) != (config.codebook_size, config.row_width, None):
                raise ValueError(
                    f"the entropy model is made for {gate.codebook_size} codes, rows of {gate.row_width} and "
                    f"{gate.num_classes or 'no'} classes; expected {config.codebook_size}, {config.row_width}, no"
                )
        self.config, self.rule, self.num_classes, self.stepper = config, rule, config.num_classes, DPARStepper(model, dtype)
        super().__init__(config, settings, self.stepper.tokens.device, dtype=dtype, static=static, capture=capture)
        self.gate_dtype, self.patience, self.schedule = gate_dtype, patience, schedule
        self.gate = GPTStepper(entropy_model, gate_dtype) if self.asks_model and entropy_model else None

    def cache_bytes(self, images: int) -> int:
        """Return the most bytes that the caches of a batch can take (every token a patch of its own); of the static
        decoder, its working memory too."""
        if self.static:
            return static_dpar_bytes(
                self.stepper,
                self.gate,
                images=images,
                halves=2 if self.guided else 1,
                longest=self.rule.longest(self.config.tokens),
                dtype=self.dtype,
                gate_dtype=self.gate_dtype,
            )
        return dpar_cache_bytes(
            self.config,
            images,
            guided=self.guided,
            value_bytes=self.dtype.itemsize,
            longest_patch=self.rule.longest(self.config.tokens),
            gate=self.gate.config if self.gate else None,
        )

    def _ragged(self, labels: Tensor, sampler: TokenSampler, progress: OnTokens | None, lanes: int) -> Generated:
        state = Lanes(self, labels, sampler, lanes=lanes)
        since_patch = self.patience
        while True:
            state.refill()
            if self.asks_decoder:
                state.probe_launch(state.ready())
            ready, waiting = state.ready(), state.waiting()
            if len(waiting) and (since_patch >= self.patience or not len(ready)):
                state.patch_launch(waiting)
                since_patch = 0
            elif len(ready):
                sampled = state.token_launch(ready)
                since_patch += 1
                if progress:
                    progress(sampled)
            else:
                break
        lengths = lengths_from_starts(state.starts.numpy())
        return Generated(sampler.tokens, lengths, state.entropies, sampler.logits)

    def _sound(self, sampled: Generated) -> Generated:
        """Return what was sampled. Raises ValueError where the entropy model gave no numbers: no patch began there."""
        if self.asks_model and not sampled.entropies[:, 1:].isfinite().all():
            raise ValueError(
                f"the entropy model's entropies in {self.gate_dtype} are not finite numbers: set entropies.precision to "
                "fp32 and run `dpar-cli run`, or train the entropy model again"
            )
        return sampled

    def _new_engine(self, lanes: int, images: int, keep_logits: bool) -> StaticDPAR:
        schedule = self.schedule or fastest_schedule(self.config, lanes)
        apart = schedule == "rounds" and self.asks_model  # where the model itself decides, all images go together
        return (RoundsDPAR if apart else StaticDPAR)(
            self.stepper,
            self.gate,
            self.settings,
            images=lanes,
            most=images if apart else None,
            dtype=self.dtype,
            gate_dtype=self.gate_dtype,
            longest=self.rule.longest(self.config.tokens),
            keep_logits=keep_logits,
            capture=self.capture,
            schedule=schedule,
        )


def fastest_schedule(config: DPARConfig, images: int) -> Schedule:
    """Return how rows that begin no patch are best handled in a batch, as measured on an H200 (docs/gpu.md).

    Leaving rows out pays where a launch is bound by its matrices or its keys and values; where a middle-sized batch of a
    small model is bound by launches, it pays more not to wait for the gate.
    """
    return "ahead" if 16 <= images <= 128 and config.patch_layers <= 12 else "buckets"


def generated_by(engine: StaticDPAR | StaticGPT, images: int) -> Generated:
    """Return what the static decoder sampled last."""
    tokens = engine.tokens[:images].clone()
    logits = None if engine.logits is None else engine.logits[:images].clone()
    if isinstance(engine, StaticGPT):
        return Generated(tokens, [], torch.full(tokens.shape, float("nan")), logits)
    lengths = lengths_from_starts(engine.starts_on_host()[:images])
    return Generated(tokens, lengths, engine.entropies[:images, : engine.length].cpu().clone(), logits)


def joined(parts: Sequence[Generated]) -> Generated:
    """Return one batch after the other as one."""
    logits = [part.logits for part in parts if part.logits is not None]
    return Generated(
        torch.cat([part.tokens for part in parts]),
        [lengths for part in parts for lengths in part.patch_lengths],
        torch.cat([part.entropies for part in parts]),
        torch.cat(logits) if logits else None,
    )
