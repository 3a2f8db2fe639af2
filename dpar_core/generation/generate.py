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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpar_core.generation.lanes import Lanes, longest_patch
from dpar_core.generation.sampling import SampleSettings, TokenSampler
from dpar_core.generation.static import Schedule, StaticDPAR, StaticGPT, static_dpar_bytes, static_gpt_bytes
from dpar_core.generation.stepping import DPARStepper, GPTStepper
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT
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


def generate_gpt(
    model: GPT,
    labels: Tensor,
    seeds: Sequence[int],
    settings: SampleSettings,
    *,
    given: Tensor | None = None,
    progress: OnTokens | None = None,
    keep_logits: bool = False,
) -> Generated:
    """Generate images with the baseline. See `GPTGenerator.generate`."""
    generator = GPTGenerator(model, settings)
    return generator.generate(labels, seeds, given=given, progress=progress, keep_logits=keep_logits)


def generate_dpar(
    model: DPAR,
    entropy_model: GPT | None,
    labels: Tensor,
    seeds: Sequence[int],
    settings: SampleSettings,
    *,
    given: Tensor | None = None,
    progress: OnTokens | None = None,
    keep_logits: bool = False,
) -> Generated:
    """Generate images with a DPAR. See `DPARGenerator.generate`."""
    generator = DPARGenerator(model, entropy_model, settings)
    return generator.generate(labels, seeds, given=given, progress=progress, keep_logits=keep_logits)


def _checked(
    labels: Tensor, seeds: Sequence[int], given: Tensor | None, *, num_classes: int, tokens: int, codebook_size: int
) -> Tensor | None:
    """Check what a caller asks for, in sentences. Returns the given tokens."""
    if labels.ndim != 1 or len(labels) != len(seeds):
        raise ValueError(f"expected one label and one seed per image; got {tuple(labels.shape)} labels, {len(seeds)} seeds")
    wrong = labels[(labels < 0) | (labels > num_classes)]
    if len(wrong):
        raise ValueError(f"class {int(wrong[0])} does not exist: the model knows classes 0 to {num_classes - 1}")
    if given is None:
        return None
    if given.ndim != 2 or given.shape[0] != len(labels) or given.shape[1] > tokens:
        raise ValueError(f"given tokens must be (B, n) with B = {len(labels)}, n <= {tokens}; got {tuple(given.shape)}")
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < codebook_size:
        raise ValueError(f"given tokens must lie in 0..{codebook_size - 1}: were they made by another tokenizer?")
    return given


class GPTGenerator:
    """Generates images with the LlamaGen baseline; weights are laid out once for many batches."""

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
        self.config, self.settings, self.dtype = model.config, settings, dtype
        self.stepper = GPTStepper(model, dtype)
        assert self.stepper.classes is not None
        self.num_classes, self.classes = model.config.num_classes, self.stepper.classes
        self.guided = settings.guided(model.config.tokens)
        self.static, self.capture = runs_static(self.stepper.tokens.device, static), capture
        self.engine: StaticGPT | None = None

    def cache_bytes(self, images: int) -> int:
        """Return the most bytes that the caches of a batch can take; of the static decoder, its working memory too."""
        if self.static:
            return static_gpt_bytes(self.stepper, images=images, halves=2 if self.guided else 1, dtype=self.dtype)
        return gpt_cache_bytes(self.config, images, guided=self.guided, value_bytes=self.dtype.itemsize)

    @torch.inference_mode()
    def generate(
        self,
        labels: Tensor,
        seeds: Sequence[int],
        *,
        given: Tensor | None = None,
        progress: OnTokens | None = None,
        keep_logits: bool = False,
    ) -> Generated:
        """Generate an image of each label.

        labels: (B,) int64 in [0, classes] (the last is "no class").
        seeds: B integers.
        given: (B, n) int64, the first n tokens of each image.
        Raises ValueError in a sentence.
        """
        config, stepper, images = self.config, self.stepper, len(labels)
        device = stepper.tokens.device
        given = _checked(
            labels,
            seeds,
            given,
            num_classes=self.num_classes,
            tokens=config.tokens,
            codebook_size=config.codebook_size,
        )
        if self.static:
            engine = self.engine
            if engine is None or not fits(engine, images, keep_logits):
                engine = self.engine = None  # its memory is free before the next one takes some
                engine = self.engine = StaticGPT(
                    stepper, self.settings, images=images, dtype=self.dtype, keep_logits=keep_logits, capture=self.capture
                )
            engine.run(labels, seeds, given, progress)
            return generated_by(engine, images)
        sampler = TokenSampler(
            self.settings,
            seeds,
            given,
            tokens=config.tokens,
            codebook_size=config.codebook_size,
            device=device,
            keep_logits=keep_logits,
        )
        lanes = torch.arange(images)
        cache = stepper.new_cache((2 if self.guided else 1) * images, self.dtype)
        null = torch.full_like(labels, self.num_classes)
        x = self.classes[torch.cat([labels, null[: len(sampler.half(lanes, lanes * 0))]]).to(device)]
        for position in range(config.tokens):
            positions = torch.full_like(lanes, position)
            half = sampler.half(lanes, positions)
            rows = torch.cat([lanes, half + images])
            logits = stepper(x[: len(rows)], cache, rows, torch.full_like(rows, position))
            tokens = sampler(lanes, positions, logits)
            x = stepper.tokens[torch.cat([tokens, tokens[half.to(device)]])]
            if progress:
                progress(images)
        return Generated(sampler.tokens, [], torch.full(sampler.tokens.shape, float("nan")), sampler.logits)


class DPARGenerator:
    """Generates images with a DPAR; weights are laid out once for many batches."""

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
        self.config, self.settings, self.rule = config, settings, rule
        self.num_classes = config.num_classes
        self.dtype, self.gate_dtype, self.patience = dtype, gate_dtype, patience
        self.stepper = DPARStepper(model, dtype)
        self.gate = GPTStepper(entropy_model, gate_dtype) if self.asks_model and entropy_model else None
        self.guided = settings.guided(config.tokens)
        self.static = runs_static(self.stepper.tokens.device, static)
        self.schedule, self.capture = schedule, capture
        self.engine: StaticDPAR | None = None

    def cache_bytes(self, images: int) -> int:
        """Return the most bytes that the caches of a batch can take (every token a patch of its own); of the static
        decoder, its working memory too."""
        if self.static:
            return static_dpar_bytes(
                self.stepper,
                self.gate,
                images=images,
                halves=2 if self.guided else 1,
                longest=longest_patch(self.rule, self.config.tokens),
                dtype=self.dtype,
                gate_dtype=self.gate_dtype,
            )
        return dpar_cache_bytes(
            self.config,
            images,
            guided=self.guided,
            value_bytes=self.dtype.itemsize,
            longest_patch=longest_patch(self.rule, self.config.tokens),
            gate=self.gate.config if self.gate else None,
        )

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
        """Generate an image of each label. Arguments as `GPTGenerator.generate`.

        lanes: images generated at a time (None: all); a lane that is done takes the next image.
        """
        config = self.config
        given = _checked(
            labels,
            seeds,
            given,
            num_classes=config.num_classes,
            tokens=config.tokens,
            codebook_size=config.codebook_size,
        )
        if self.static:
            return self._sound(self._generate_static(labels, seeds, given, progress, keep_logits))
        sampler = TokenSampler(
            self.settings,
            seeds,
            given,
            tokens=config.tokens,
            codebook_size=config.codebook_size,
            device=self.stepper.tokens.device,
            keep_logits=keep_logits,
        )
        state = Lanes(self, labels, sampler, lanes=min(lanes or len(labels), len(labels)))
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
        return self._sound(Generated(sampler.tokens, lengths, state.entropies, sampler.logits))

    def _sound(self, sampled: Generated) -> Generated:
        """Return what was sampled. Raises ValueError where the entropy model gave no numbers: no patch began there."""
        if self.asks_model and not sampled.entropies[:, 1:].isfinite().all():
            raise ValueError(
                f"the entropy model's entropies in {self.gate_dtype} are not finite numbers: set entropies.precision to "
                "fp32 and run `dvc repro`, or train the entropy model again"
            )
        return sampled

    def _generate_static(
        self, labels: Tensor, seeds: Sequence[int], given: Tensor | None, progress: OnTokens | None, keep_logits: bool
    ) -> Generated:
        engine = self.engine
        if engine is None or not fits(engine, len(labels), keep_logits):
            engine = self.engine = None  # its memory is free before the next one takes some
            engine = self.engine = StaticDPAR(
                self.stepper,
                self.gate,
                self.settings,
                images=len(labels),
                dtype=self.dtype,
                gate_dtype=self.gate_dtype,
                longest=longest_patch(self.rule, self.config.tokens),
                keep_logits=keep_logits,
                capture=self.capture,
                schedule=self.schedule or fastest_schedule(self.config, len(labels)),
            )
        engine.run(labels, seeds, given, progress)
        return generated_by(engine, len(labels))


def runs_static(device: torch.device, wanted: bool | None) -> bool:
    """Decide between the static decoder, which a GPU's queue of launches needs, and the ragged one, which saves rows."""
    return device.type == "cuda" if wanted is None else wanted


def fastest_schedule(config: DPARConfig, images: int) -> Schedule:
    """Return how rows that begin no patch are best handled in a batch, as measured on an H200 (docs/gpu.md).

    Leaving rows out pays where a launch is bound by its matrices or its keys and values; where a middle-sized batch of a
    small model is bound by launches, it pays more not to wait for the gate.
    """
    return "ahead" if 16 <= images <= 128 and config.patch_layers <= 12 else "buckets"


def fits(engine: StaticDPAR | StaticGPT, images: int, keep_logits: bool) -> bool:
    """Whether a batch can be sampled by an engine that is there: a smaller batch is filled up, which keeps its kernels."""
    return images <= engine.images and keep_logits == (engine.logits is not None)


def generated_by(engine: StaticDPAR | StaticGPT, images: int) -> Generated:
    """Return what the static decoder sampled last."""
    tokens = engine.tokens[:images].clone()
    logits = None if engine.logits is None else engine.logits[:images].clone()
    if isinstance(engine, StaticGPT):
        return Generated(tokens, [], torch.full(tokens.shape, float("nan")), logits)
    lengths = lengths_from_starts(engine.starts_on_host()[:images])
    return Generated(tokens, lengths, engine.entropies[:images, : engine.length].cpu(), logits)
