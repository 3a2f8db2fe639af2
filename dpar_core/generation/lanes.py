"""The images of a batch while DPAR generates them, each at a position of its own.

A lane is the place of one image in the caches. Its life is a sequence of launches, each for any set of lanes: a token
launch samples a token and takes it up, a patch launch closes a patch and steps the patch transformer; where the decoder's
entropy cuts patches, a probe launch asks it.

Who is where is kept on the host, vectors and caches on the device: a device is waited for once per token, when the gate's
entropies come back.

Shapes: B lanes, A lanes that take part in a launch, U of them that need their unconditional half (row B + lane), T
tokens per image, D width, V codebook entries, hd head dimension.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dpar_core.generation.sampling import TokenSampler
from dpar_core.generation.stepping import DPARStepper, GPTStepper, complex_table, normalized
from dpar_core.models.dpar import DPARConfig
from dpar_core.models.gpt import next_token_entropies
from dpar_core.models.rope import patch_rotary
from dpar_core.patches.rule import BoundaryState, PatchRule

HALVES_TOGETHER = 3  # lanes of a probe; of more, some begin a patch nearly always, and a second launch comes anyway


class Networks(Protocol):
    """What lanes need of a `DPARGenerator`."""

    config: DPARConfig
    rule: PatchRule
    dtype: torch.dtype
    gate_dtype: torch.dtype
    stepper: DPARStepper
    gate: GPTStepper | None
    guided: bool
    asks_decoder: bool


class Lanes:
    """The state of the images that are being generated, each at a position of its own.

    image: (B,) which of the sampler's images is in each lane; a lane whose image is finished takes the next one.
    position: (B,) next token to be sampled.
    first, index: (B,) first token and number of the patch that holds it.
    waits: (B,) whether that patch still needs its state from the patch transformer.
    decided: (B,) whether it is known to which patch that token belongs.
    All of these, and lanes and positions in arguments below, are on the host.
    """

    def __init__(self, networks: Networks, labels: Tensor, sampler: TokenSampler, *, lanes: int) -> None:
        self.networks, self.sampler, self.stepper = networks, sampler, networks.stepper
        config, dtype, stepper = networks.config, networks.dtype, networks.stepper
        self.device = device = stepper.tokens.device
        self.lanes = lanes
        self.labels = labels.cpu()
        self.entropies = torch.full((len(labels), config.tokens), float("nan"))
        self.starts = torch.zeros(len(labels), config.tokens, dtype=torch.bool)
        self.starts[:, 0] = True

        self.image = torch.arange(lanes)
        self.taken = lanes
        self.position = torch.zeros(lanes, dtype=torch.int64)
        self.first, self.index = torch.zeros_like(self.position), torch.zeros_like(self.position)
        self.waits = torch.ones(lanes, dtype=torch.bool)
        self.decided = torch.ones(lanes, dtype=torch.bool)
        self.boundaries = BoundaryState(networks.rule, lanes)

        rows = (2 if networks.guided else 1) * lanes
        self.state = stepper.start.expand(lanes, -1).clone()  # decoder input of the next token: start, x'_0, ...
        self.peak = torch.full((lanes, config.width), float("-inf"), device=device)  # maximum of x' in the open patch
        self.copied = torch.zeros(rows, config.decoder_layers, config.width, device=device)
        self.has = torch.zeros(rows, dtype=torch.bool)  # rows whose logits of the next token a probe has left in `kept`
        self.kept: Tensor | None = None
        longest = networks.rule.longest(config.tokens)
        self.encoder_cache = stepper.new_cache(config.encoder_layers, lanes, config.tokens, dtype)
        self.member_cache = stepper.new_cache(config.encoder_layers, lanes, longest, dtype)
        self.patch_cache = stepper.new_cache(config.patch_layers, rows, config.tokens, dtype)
        self.decoder_cache = stepper.new_cache(config.decoder_layers, rows, config.tokens, dtype)
        self.gate_cache = networks.gate.new_cache(lanes, networks.gate_dtype) if networks.gate else None

    def refill(self) -> None:
        """Put the next images into lanes whose image is finished. What the caches hold of it is never seen again."""
        left = len(self.labels) - self.taken
        if not left:
            return
        free = torch.nonzero(self.position == self.networks.config.tokens).flatten()[:left]
        if not len(free):
            return
        self.image[free] = torch.arange(self.taken, self.taken + len(free))
        self.taken += len(free)
        self.position[free] = self.first[free] = self.index[free] = 0
        self.waits[free] = self.decided[free] = True
        self.boundaries.last_cut[free] = 0
        free = free.to(self.device)
        self.state[free], self.peak[free] = self.stepper.start, float("-inf")

    def ready(self) -> Tensor:
        """Lanes whose next token can be sampled: (A,) int64."""
        return torch.nonzero(~self.waits & (self.position < self.networks.config.tokens)).flatten()

    def waiting(self) -> Tensor:
        """Lanes whose next token needs a step of the patch transformer first: (A,) int64."""
        return torch.nonzero(self.waits).flatten()

    def probe_launch(self, lanes: Tensor) -> None:
        """Ask the decoder's entropy where it is not known yet to which patch the next token belongs.

        The logits are those of the conditional half, unguided, as if the token stayed in the open patch: its own patch
        cannot be stepped before the boundary is known. Where it stays they are kept for sampling; where it begins a patch
        they are void. The unconditional half follows in the token launch, with the rows that begin one; of few lanes it
        comes along, so that they need no second launch when none begins.
        """
        lanes = lanes[~self.decided[lanes]]
        if not len(lanes):
            return
        position = self.position[lanes]
        both = len(lanes) <= HALVES_TOGETHER
        rows = torch.cat([lanes, self.sampler.half(lanes, position) + self.lanes]) if both else lanes
        logits = self.decode(rows)
        if self.kept is None:
            self.kept = torch.empty(len(self.has), logits.shape[1], device=self.device)
        self.kept[rows.to(self.device)], self.has[rows] = logits, True
        self.settle(lanes, position, next_token_entropies(logits[: len(lanes)]).cpu(), final=True)
        begin = lanes[self.waits[lanes]]
        self.has[torch.cat([begin, begin + self.lanes]) if self.networks.guided else begin] = False

    def token_launch(self, lanes: Tensor) -> int:
        """Sample a token in each of these lanes; return how many were sampled."""
        position = self.position[lanes]
        half = self.sampler.half(lanes, position)
        tokens = self.sampler(self.image[lanes], position, self.logits(torch.cat([lanes, half + self.lanes])))
        self.position[lanes] = position + 1
        sampled, last = len(lanes), self.networks.config.tokens - 1
        if bool((position == last).any()):
            going = torch.nonzero(position < last).flatten()
            lanes, position, tokens = lanes[going], position[going], tokens[going.to(self.device)]
        if len(lanes):
            self.encode(lanes, position, tokens)
            self.decide(lanes, position + 1, tokens)
        return sampled

    def logits(self, rows: Tensor) -> Tensor:
        """Return the logits of the next token of these rows (A,), those that a probe has kept among them: (A, V)."""
        missing = rows[~self.has[rows]]
        if len(missing) == len(rows):
            return self.decode(rows)
        assert self.kept is not None, "a probe keeps what `has` marks"
        if len(missing):
            self.kept[missing.to(self.device)] = self.decode(missing)
        self.has[rows] = False
        return self.kept[rows.to(self.device)]

    def decode(self, rows: Tensor) -> Tensor:
        """Run the decoder for the next token of these rows, given the state of the open patch: (A,) -> (A, V)."""
        stepper = self.stepper
        plan = self.decoder_cache.plan(rows, self.position[rows % self.lanes])
        table = stepper.table[plan.positions]
        x, copied = self.state[plan.rows % self.lanes], self.copied[plan.rows]
        for layer, block in enumerate(stepper.decoder):
            x = block(x + copied[:, layer], table, self.decoder_cache, layer, plan)
        return stepper.head(x)

    def encode(self, lanes: Tensor, position: Tensor, tokens: Tensor) -> None:
        """Take up the sampled tokens: x' of each, and its share in the open patch."""
        stepper = self.stepper
        plan = self.encoder_cache.plan(lanes, position)
        member = self.member_cache.plan(lanes, position - self.first[lanes])
        table = stepper.table[plan.positions + 1]
        x = stepper.tokens[tokens]
        for layer, (block, reader) in enumerate(zip(stepper.encoder, stepper.readers)):
            x = block(x, table, self.encoder_cache, layer, plan)
            if layer == 0:
                self.peak[plan.rows] = torch.maximum(self.peak[plan.rows], x)
            reader.write(x, self.member_cache, layer, member)
        self.state[plan.rows] = x

    def decide(self, lanes: Tensor, position: Tensor, tokens: Tensor) -> None:
        """Return whether the token at `position` begins a patch, as far as that is known before the decoder runs."""
        gate = self.networks.gate
        entropies = torch.full(position.shape, float("nan"))
        if gate and self.gate_cache:
            entropies = next_token_entropies(gate(gate.tokens[tokens], self.gate_cache, lanes, position - 1)).cpu()
        self.settle(lanes, position, entropies, final=not self.networks.asks_decoder)

    def settle(self, lanes: Tensor, position: Tensor, entropies: Tensor, *, final: bool) -> None:
        """Apply the rule. Not final: entropies are nan, only starts that no entropy could prevent are settled."""
        begins = self.boundaries.step(position, entropies, rows=lanes)
        self.entropies[self.image[lanes], position] = entropies
        self.starts[self.image[lanes], position] = begins
        self.waits[lanes] = begins
        self.decided[lanes] = True if final else begins

    def patch_launch(self, lanes: Tensor) -> None:
        """Close the open patch of these lanes and get the state of the next from the patch transformer."""
        stepper = self.stepper
        position = self.position[lanes]
        half = self.sampler.half(lanes, position)
        rows = torch.cat([lanes, half + self.lanes])
        opens = position == 0
        if bool(opens.any()):
            closing = torch.nonzero(~opens).flatten()
            x = torch.zeros(len(lanes), len(stepper.start), device=self.device)
            table = torch.zeros(len(lanes), stepper.head_dim // 2, dtype=torch.complex64, device=self.device)
            if len(closing):
                into = closing.to(self.device)
                x[into], table[into] = self.close(lanes[closing], position[closing])
        else:
            x, table = self.close(lanes, position)
        x, table = self.doubled(x, lanes, half), self.doubled(table, lanes, half)
        if bool(opens.any()):
            opening = torch.nonzero(self.doubled(opens, lanes, half)).flatten()
            labels = self.labels[self.image[rows[opening] % self.lanes]]
            labels = torch.where(rows[opening] < self.lanes, labels, self.networks.config.num_classes)
            x[opening.to(self.device)] = stepper.classes[labels.to(self.device)]
        slot = torch.where(opens, 0, self.index[lanes] + 1)
        self.index[lanes], self.first[lanes] = slot, position
        plan = self.patch_cache.plan(rows, self.doubled(slot, lanes, half))
        self.peak[plan.rows[: len(lanes)]] = float("-inf")
        for layer, block in enumerate(stepper.patch_blocks):
            x = block(x, table, self.patch_cache, layer, plan)
        copied = stepper.copies(normalized(x))
        self.copied[plan.rows] = copied.unflatten(-1, (-1, self.networks.config.width))
        self.waits[lanes] = False

    def doubled(self, x: Tensor, lanes: Tensor, half: Tensor) -> Tensor:
        """Repeat the entries of x (A, ...) that belong to an unconditional half: (A + U, ...)."""
        if not len(half):
            return x
        return torch.cat([x, x if len(half) == len(lanes) else x[torch.isin(lanes, half).to(x.device)]])

    def close(self, lanes: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of the patches that end before `position`, (A, D), and their rotary table."""
        stepper, config = self.stepper, self.networks.config
        first = self.first[lanes]
        plan = self.member_cache.plan(lanes, position - first - 1)
        patch = self.peak[plan.rows]
        for layer, reader in enumerate(stepper.readers):
            patch = reader.read(patch, self.member_cache, layer, plan)
        width = config.row_width
        table = patch_rotary(
            first // width,
            first % width,
            (position - 1) % width,
            self.index[lanes],
            stepper.head_dim,
            encoding=config.position_encoding,
        )
        return patch, complex_table(table).to(self.device)
