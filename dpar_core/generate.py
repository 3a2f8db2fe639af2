"""Generation with exact caches, for DPAR and its LlamaGen twin.

Everything in DPAR is causal and boundaries are known before the token that they begin, so what was computed stays: the
entropy model, the patch encoder and the patch decoder step once a token, the patch transformer once a patch. Encoder,
patch vectors and entropy model do not see the class: under guidance they run once, not twice.

An image depends on model, settings, label, seed and given tokens alone: every row is computed by kernels whose result
does not depend on the other rows (see kv_cache.py, stepping.py), and draws from a generator of its own seed.

Shapes: B images, T tokens an image, M_b patches of image b, A lanes that take part in a launch, D width, V codebook
entries. A lane is the place of one image in the caches; with guidance lane b has a second row B + b, unconditional.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpar_core.dpar import DPAR
from dpar_core.gpt import GPT, next_token_entropies
from dpar_core.guidance import SampleSettings, draw, guide, uniforms
from dpar_core.patching import BoundaryState, PatchRule, lengths_from_starts
from dpar_core.rope import patch_rotary
from dpar_core.stepping import DPARStepper, GPTStepper, complex_table, normalized

Progress = Callable[[int], None]  # called with the number of tokens just settled, over all images


@dataclass(frozen=True)
class Generated:
    """tokens: (B, T) int64. patch_lengths: for each image (M_b,) uint16 that sum to T (the twin: none). entropies:
    (B, T) float32 nats by which the gate decided, nan where it was not asked. logits: (B, T, V) float32, guided, where
    they were asked for."""

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
    progress: Progress | None = None,
    keep_logits: bool = False,
) -> Generated:
    """Draw images from the twin. See `GPTGenerator.generate`."""
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
    progress: Progress | None = None,
    keep_logits: bool = False,
) -> Generated:
    """Draw images from a DPAR. See `DPARGenerator.generate`."""
    generator = DPARGenerator(model, entropy_model, settings)
    return generator.generate(labels, seeds, given=given, progress=progress, keep_logits=keep_logits)


def _checked(
    labels: Tensor, seeds: Sequence[int], given: Tensor | None, *, num_classes: int, tokens: int, codebook_size: int
) -> Tensor | None:
    """Check what a caller asks for, in sentences. Returns the given tokens."""
    if labels.ndim != 1 or len(labels) != len(seeds):
        raise ValueError(f"expected one label and one seed an image; got {tuple(labels.shape)} labels, {len(seeds)} seeds")
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


class _Drawer:
    """Turns logits into tokens: guidance, given tokens, one random number a token."""

    def __init__(
        self, settings: SampleSettings, seeds: Sequence[int], given: Tensor | None, *,
        tokens: int, codebook_size: int, device: torch.device, keep_logits: bool,
    ) -> None:  # fmt: skip
        self.settings, self.given = settings, given
        self.uniforms = uniforms(seeds, tokens).to(device)
        self.scales = settings.scales(tokens).to(device)
        self.tokens = torch.zeros(len(seeds), tokens, dtype=torch.int64, device=device)
        self.logits = torch.zeros(len(seeds), tokens, codebook_size, device=device) if keep_logits else None
        self.num_given = 0 if given is None else given.shape[1]

    def __call__(self, lanes: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        """lanes, positions: (A,) int64; logits: (A, V), or (2 A, V) conditional over unconditional. -> (A,) int64."""
        if len(logits) == 2 * len(lanes):
            logits = guide(*logits.chunk(2), self.scales[positions])
        if self.logits is not None:
            self.logits[lanes, positions] = logits
        tokens = draw(logits, self.uniforms[lanes, positions], self.settings)
        if self.num_given:
            known = positions < self.num_given
            tokens = torch.where(known, self.given[lanes, positions.clamp_max(self.num_given - 1)], tokens)
        self.tokens[lanes, positions] = tokens
        return tokens


class GPTGenerator:
    """Draws images from the LlamaGen twin; weights are laid out once for many batches."""

    def __init__(self, model: GPT, settings: SampleSettings, *, dtype: torch.dtype = torch.float32) -> None:
        if model.config.num_classes is None:
            raise ValueError("this GPT has no class token, it cannot draw images of a class: give the twin's weights")
        self.config, self.settings, self.dtype = model.config, settings, dtype
        self.stepper = GPTStepper(model, dtype)
        self.guided = settings.guided(model.config.tokens)

    @torch.inference_mode()
    def generate(
        self,
        labels: Tensor,
        seeds: Sequence[int],
        *,
        given: Tensor | None = None,
        progress: Progress | None = None,
        keep_logits: bool = False,
    ) -> Generated:
        """Draw an image of each label.

        labels: (B,) int64 in [0, classes] (the last is "no class"). seeds: B integers. given: (B, n) int64, the first
        n tokens of each image. Raises ValueError in a sentence.
        """
        config, stepper, images = self.config, self.stepper, len(labels)
        device = stepper.tokens.device
        given = _checked(
            labels, seeds, given,
            num_classes=config.num_classes, tokens=config.tokens, codebook_size=config.codebook_size,
        )  # fmt: skip
        drawer = _Drawer(
            self.settings, seeds, given,
            tokens=config.tokens, codebook_size=config.codebook_size, device=device, keep_logits=keep_logits,
        )  # fmt: skip
        halves = 2 if self.guided else 1
        lanes, rows = torch.arange(images, device=device), torch.arange(halves * images, device=device)
        cache = stepper.new_cache(halves * images, self.dtype)
        labels = labels.to(device)
        both = torch.cat([labels, torch.full_like(labels, config.num_classes)]) if self.guided else labels
        x = stepper.classes[both].float()
        for position in range(config.tokens):
            logits = stepper(x, cache, rows, torch.full_like(rows, position))
            tokens = drawer(lanes, torch.full_like(lanes, position), logits)
            x = stepper.tokens[tokens].repeat(halves, 1)
            if progress:
                progress(images)
        return Generated(drawer.tokens, [], torch.full(drawer.tokens.shape, float("nan")), drawer.logits)


class DPARGenerator:
    """Draws images from a DPAR; weights are laid out once for many batches."""

    def __init__(
        self,
        model: DPAR,
        entropy_model: GPT | None,
        settings: SampleSettings,
        *,
        dtype: torch.dtype = torch.float32,
        patience: int = 1,
    ) -> None:
        """patience: launches of the token networks after which the patch transformer steps for the lanes that wait
        for it (1: after each; a schedule, it never changes an image). Raises ValueError for a rule that is missing or
        does not fit, or an entropy model that does."""
        config, rule = model.config, settings.rule
        if rule is None or rule.row_width != config.row_width:
            raise ValueError(
                f"expected a patch rule for rows of {config.row_width} tokens; got {rule and rule.row_width}"
            )
        largest = float(np.log(config.codebook_size))
        if rule.reads_entropies and not 0 <= rule.threshold <= largest:
            raise ValueError(
                f"threshold {rule.threshold} nats makes no sense for {config.codebook_size} codes: expected 0 to "
                f"ln {config.codebook_size} = {largest:.3f}, the largest entropy there is"
            )
        self.asks_model = rule.reads_entropies and settings.gate == "entropy_model"
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
        self.dtype, self.patience = dtype, patience
        self.stepper = DPARStepper(model, dtype)
        self.gate = GPTStepper(entropy_model, dtype) if self.asks_model else None
        self.guided = settings.guided(config.tokens)

    @torch.inference_mode()
    def generate(
        self,
        labels: Tensor,
        seeds: Sequence[int],
        *,
        given: Tensor | None = None,
        progress: Progress | None = None,
        keep_logits: bool = False,
    ) -> Generated:
        """Draw an image of each label. Arguments as `GPTGenerator.generate`."""
        config = self.config
        given = _checked(
            labels, seeds, given,
            num_classes=config.num_classes, tokens=config.tokens, codebook_size=config.codebook_size,
        )  # fmt: skip
        drawer = _Drawer(
            self.settings, seeds, given, tokens=config.tokens, codebook_size=config.codebook_size,
            device=self.stepper.tokens.device, keep_logits=keep_logits,
        )  # fmt: skip
        lanes = _Lanes(self, labels, drawer)
        since_patch = self.patience
        while True:
            ready = lanes.ready()
            waiting = lanes.waiting()
            if len(waiting) and (since_patch >= self.patience or not len(ready)):
                lanes.patch_launch(waiting)
                since_patch = 0
            elif len(ready):
                lanes.token_launch(ready)
                since_patch += 1
                if progress:
                    progress(len(ready))
            else:
                break
        lengths = lengths_from_starts(lanes.starts.cpu().numpy())
        return Generated(drawer.tokens, lengths, lanes.entropies, drawer.logits)


def longest_patch(rule: PatchRule, tokens: int) -> int:
    """Return the largest number of tokens that a patch can have under a rule."""
    by_mode = {"token": 1, "static": rule.static_length, "entropy_rows": rule.row_width, "entropy": tokens}
    return min(by_mode[rule.mode], rule.max_patch_length or tokens, tokens)


class _Lanes:
    """The state of the images of a batch, each at a position of its own.

    position: (B,) next token to be drawn. first, index: (B,) first token and number of the patch that holds it.
    waits: (B,) whether that patch still needs its state from the patch transformer.
    """

    def __init__(self, generator: DPARGenerator, labels: Tensor, drawer: _Drawer) -> None:
        self.g, self.drawer, self.stepper = generator, drawer, generator.stepper
        config, dtype, images = generator.config, generator.dtype, len(labels)
        device = self.stepper.tokens.device
        self.device, self.images, self.halves = device, images, 2 if generator.guided else 1
        rows = self.halves * images
        labels = labels.to(device)
        null = torch.full_like(labels, config.num_classes)
        self.labels = torch.cat([labels, null]) if generator.guided else labels

        self.position = torch.zeros(images, dtype=torch.int64, device=device)
        self.first, self.index = torch.zeros_like(self.position), torch.zeros_like(self.position)
        self.waits = torch.ones(images, dtype=torch.bool, device=device)
        self.boundaries = BoundaryState(generator.rule, images, device=device)
        self.entropies = torch.full((images, config.tokens), float("nan"), device=device)
        self.starts = torch.zeros(images, config.tokens, dtype=torch.bool, device=device)
        self.starts[:, 0] = True

        self.state = self.stepper.start.expand(images, -1).clone()  # decoder input of the next token: start, x'_0, ...
        self.peak = torch.full((images, config.width), float("-inf"), device=device)  # maximum of x' in the open patch
        self.copied = torch.zeros(rows, config.decoder_layers, config.width, device=device)
        longest = longest_patch(generator.rule, config.tokens)
        stepper = self.stepper
        self.encoder_cache = stepper.new_cache(config.encoder_layers, images, config.tokens, dtype)
        self.member_cache = stepper.new_cache(config.encoder_layers, images, longest, dtype)
        self.patch_cache = stepper.new_cache(config.patch_layers, rows, config.tokens, dtype)
        self.decoder_cache = stepper.new_cache(config.decoder_layers, rows, config.tokens, dtype)
        self.gate_cache = generator.gate.new_cache(images, dtype) if generator.gate else None

    def ready(self) -> Tensor:
        """Lanes whose next token can be drawn: (A,) int64."""
        return torch.nonzero(~self.waits & (self.position < self.g.config.tokens)).flatten()

    def waiting(self) -> Tensor:
        """Lanes whose next token needs a step of the patch transformer first: (A,) int64."""
        return torch.nonzero(self.waits).flatten()

    def both(self, lanes: Tensor) -> Tensor:
        """Rows of the conditional and the unconditional half."""
        return torch.cat([lanes, lanes + self.images]) if self.halves == 2 else lanes

    def token_launch(self, lanes: Tensor) -> None:
        """Draw one token in each of these lanes, and learn whether the one after it begins a patch."""
        position = self.position[lanes]
        tokens = self.drawer(lanes, position, self.decode(lanes, position))
        self.position[lanes] = position + 1
        last = self.g.config.tokens - 1
        if bool((position == last).any()):
            going = torch.nonzero(position < last).flatten()
            lanes, position, tokens = lanes[going], position[going], tokens[going]
        if len(lanes):
            self.encode(lanes, position, tokens)
            self.decide(lanes, position + 1, tokens)

    def decode(self, lanes: Tensor, position: Tensor) -> Tensor:
        """Return the logits of the tokens at `position`: (A or 2 A, V)."""
        stepper, rows = self.stepper, self.both(lanes)
        step = self.decoder_cache.plan(rows, position.repeat(self.halves))
        table = stepper.table[step.positions]
        x, copied = self.state[lanes].repeat(self.halves, 1), self.copied[rows]
        for layer, block in enumerate(stepper.decoder):
            x = block(x + copied[:, layer], table, self.decoder_cache, layer, step)
        return stepper.head(x)

    def encode(self, lanes: Tensor, position: Tensor, tokens: Tensor) -> None:
        """Take up the drawn tokens: x' of each, and its share in the open patch."""
        stepper = self.stepper
        step = self.encoder_cache.plan(lanes, position)
        member = self.member_cache.plan(lanes, position - self.first[lanes])
        table = stepper.table[position + 1]
        x = stepper.tokens[tokens]
        for layer, (block, reader) in enumerate(zip(stepper.encoder, stepper.readers)):
            x = block(x, table, self.encoder_cache, layer, step)
            if layer == 0:
                self.peak[lanes] = torch.maximum(self.peak[lanes], x)
            reader.write(x, self.member_cache, layer, member)
        self.state[lanes] = x

    def decide(self, lanes: Tensor, position: Tensor, tokens: Tensor) -> None:
        """Tell by the entropy of the token at `position` whether it begins a patch."""
        entropies = torch.full(position.shape, float("nan"), device=self.device)
        if self.g.gate:
            gate = self.g.gate
            entropies = next_token_entropies(gate(gate.tokens[tokens], self.gate_cache, lanes, position - 1))
            self.entropies[lanes, position] = entropies
        begins = self.boundaries.step(position, entropies, rows=lanes)
        self.starts[lanes, position] = begins
        self.waits[lanes] = begins

    def patch_launch(self, lanes: Tensor) -> None:
        """Close the open patch of these lanes and get the state of the next from the patch transformer."""
        stepper, rows = self.stepper, self.both(lanes)
        position = self.position[lanes]
        opening = position == 0
        if bool(opening.all()):
            x, table = stepper.classes[self.labels[rows]], torch.zeros(len(rows), stepper.head_dim // 2) + 0j
            place = position
        else:
            patch, table = self.close(lanes, position)
            x, table = patch.repeat(self.halves, 1), table.repeat(self.halves, 1)
            place = self.index[lanes] + 1
            self.index[lanes] = place
            self.first[lanes] = position
            self.peak[lanes] = float("-inf")
        step = self.patch_cache.plan(rows, place.repeat(self.halves))
        for layer, block in enumerate(stepper.patch_blocks):
            x = block(x, table.to(self.device), self.patch_cache, layer, step)
        copied = stepper.copies(normalized(x))
        self.copied[rows] = copied.unflatten(-1, (-1, self.g.config.width))
        self.waits[lanes] = False

    def close(self, lanes: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of the patches that end before `position`, (A, D), and their rotary table."""
        stepper, config = self.stepper, self.g.config
        first = self.first[lanes]
        patch = self.peak[lanes]
        step = self.member_cache.plan(lanes, position - first - 1)
        for layer, reader in enumerate(stepper.readers):
            patch = reader.read(patch, self.member_cache, layer, step)
        width = config.row_width
        table = patch_rotary(
            first // width, first % width, (position - 1) % width, self.index[lanes], stepper.head_dim,
            encoding=config.position_encoding,
        )  # fmt: skip
        return patch, complex_table(table)
