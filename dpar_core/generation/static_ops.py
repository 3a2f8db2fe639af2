"""The operations of a static step, written in plain torch: for the CPU, and the reference of triton_ops.py.

Everything has a fixed shape and stays on the device: positions, slots and boundaries are tensors, and no value is read by
the host. Rows of a cache that a launch leaves alone are addressed by a list of row numbers; rows of a launch that begin
no patch write to a scratch slot behind the last position.

Shapes: B images, A rows of a launch, R rows of a cache, H heads, hd head dimension, C positions of a cache, D width, T
tokens per image, V codebook entries, k images of a launch of the patch transformer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpar_core.generation.kv_cache import BLOCK
from dpar_core.generation.sampling import guide, sample_tokens
from dpar_core.generation.stepping import BlockStepper, Matrix, PatchReader
from dpar_core.models.dpar import DPARConfig
from dpar_core.models.gpt import GPTConfig, next_token_entropies
from dpar_core.models.layers import NORM_EPS

if TYPE_CHECKING:
    from dpar_core.generation.static import StaticDPAR, StaticGPT


class StaticCache:
    """Keys and values of a stack of attention layers: one tensor (2, R, H, C, hd) per layer, allocated once."""

    def __init__(
        self,
        config: GPTConfig | DPARConfig,
        layers: int,
        *,
        rows: int,
        positions: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.positions = BLOCK * -(-positions // BLOCK)
        shape = (2, rows, config.heads, self.positions, config.width // config.heads)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        # Row s hides all positions behind s; the plain operations add it to the scores.
        later = torch.arange(self.positions, device=device) > torch.arange(self.positions, device=device)[:, None]
        self.hidden = torch.zeros(later.shape, device=device).masked_fill_(later, float("-inf"))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.layers)


class LaunchPlan(NamedTuple):
    """Where the rows of a launch write and what they see; shared by all layers of a stack.

    slots: (1,) or (A,) int64, each row writes there and sees all positions up to it.
    table: (n, hd / 2, 2) float32, cos and sin; row `slots + shift` of it belongs to a row of the launch, or with shift None
        the row of the same number.
    rows: (A,) int64 rows of the cache, None: row i is row i.
    active: (A,) bool, rows that count, None: all.
    seen, turn: the same as the plain operations use them: (1 or A, C) float32 of 0 and -inf, (1 or A, 3, 1, hd / 2) complex.
    """

    slots: Tensor
    table: Tensor
    shift: int | None
    rows: Tensor | None = None
    active: Tensor | None = None
    seen: Tensor | None = None
    turn: Tensor | None = None


class Opened(NamedTuple):
    """A launch of the patch transformer for k images.

    lanes: (k,) int64 images, None: all.
    begins: (k,) bool, those that begin a patch; the others are computed and dropped.
    lengths: (k,) int64, tokens of the patch that ends, at least 1.
    plan: of the k or 2 k rows in the patch transformer.
    may_be_first: whether these can be the first patches of their images, which are made of the class.
    """

    lanes: Tensor | None
    begins: Tensor
    lengths: Tensor
    plan: LaunchPlan
    may_be_first: bool


class Apart(NamedTuple):
    """Where images are that are at tokens of their own, and who comes next.

    at: (B,) int64, the last token of each.
    moves, begins, done: (B,) bool, images that the last step sampled, that wait for a patch, and that have no token left.
    taken, finished, total: (1,) int64, images begun, images whose place another took, and images asked for.
    labels: (N + 1,) int64, classes of all images.
    """

    at: Tensor
    moves: Tensor
    begins: Tensor
    done: Tensor
    taken: Tensor
    finished: Tensor
    total: Tensor
    labels: Tensor

    @classmethod
    def of(cls, images: int, most: int, device: torch.device) -> Apart:
        """Return the state of `images` at a time, of up to `most`."""

        def zeros(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        moves, begins, done = (zeros(images, torch.bool) for _ in range(3))
        return cls(zeros(images), moves, begins, done, zeros(1), zeros(1), zeros(1), zeros(most + 1))


class TorchOps:
    """The operations in plain torch."""

    def normalized(self, x: Tensor) -> Tensor:
        """Return x / rms(x), the norm's weight being folded into the matrix behind it: (A, D) float32."""
        normed: Tensor = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], None, NORM_EPS)[0]
        return normed

    def add_linear(self, x: Tensor, matrix: Matrix, h: Tensor) -> Tensor:
        """Return x + W h."""
        if matrix.on_cpu or matrix.dtype != torch.float32:
            return x + matrix(h)
        return torch.addmm(x, h, matrix.weight.t())

    def project(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Return W x / rms(x): (A, D) -> (A, N)."""
        return matrix(self.normalized(x))

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        """Return the vectors of tokens (B,): (B, D) float32."""
        return F.embedding(tokens, table)

    def embed_or_class(self, engine: StaticGPT, halves: int) -> Tensor:
        """Return the baseline's input: the class at position 0, later the last token: (halves B, D)."""
        x = F.embedding(engine.current, engine.stepper.tokens)
        x = x if halves == 1 else torch.cat([x, x])
        return torch.where(engine.position == 0, engine.classes[: len(x)], x)

    def placed(
        self,
        cache: StaticCache,
        slots: Tensor,
        table: Tensor,
        *,
        shift: int,
        halves: int = 1,
        moves: Tensor | None = None,
    ) -> LaunchPlan:
        """Return the plan of all rows of a cache, at the same position (1,) or each image at its own (B,), in both halves.

        moves: (B,) bool, images whose result counts (None: all); the others may write where they have written before.
        """
        if len(slots) > 1 and halves == 2:
            slots = slots.repeat(2)
        turn = _turn(table[shift:].index_select(0, slots))
        return LaunchPlan(slots, table, shift, seen=cache.hidden.index_select(0, slots), turn=turn)

    def block(
        self, block: BlockStepper, x: Tensor, cache: StaticCache, layer: int, plan: LaunchPlan, add: Tensor | None = None
    ) -> Tensor:
        """Run one position of each row through a transformer block: x (A, D) -> (A, D). add: (A, D), added to x first."""
        assert plan.turn is not None and plan.seen is not None
        x = x if add is None else x + add
        qkv = block.wqkv(self.normalized(x)).unflatten(-1, (3, block.heads, -1, 2))  # (A, 3, H, hd / 2, 2)
        turned = torch.view_as_real(torch.view_as_complex(qkv) * plan.turn).flatten(-2)  # v is turned by 1
        held = cache.layers[layer]
        new = turned[:, 1:].transpose(0, 1).to(held.dtype)  # (2, A, H, hd)
        if plan.rows is None and len(plan.slots) == 1:
            held[:, : len(x)].index_copy_(3, plan.slots, new.unsqueeze(3))
            k, v = held[0, : len(x)], held[1, : len(x)]
        else:
            rows = rows_of(plan, len(x))
            held.transpose(2, 3)[:, rows, plan.slots] = new
            k, v = held[0].index_select(0, rows), held[1].index_select(0, rows)
        out = attend(turned[:, 0], k, v, plan.seen)
        x = self.add_linear(x, block.wo, out.flatten(1))
        gate, up = block.w13(self.normalized(x)).chunk(2, dim=-1)
        return self.add_linear(x, block.w2, F.silu(gate).mul_(up))

    def take_up(self, engine: StaticDPAR, x: Tensor, first_x: Tensor, members: list[Tensor]) -> None:
        """Keep what the encoder made of a token: x' (B, D), the first layer's x' for the maximum, and the keys and values
        (B, 2 D) of each layer for the patch vector. (Images that wait repeat their last token, which changes nothing.)"""
        within = engine.last_token - engine.first
        engine.state.copy_(x if len(engine.state) == len(x) else torch.cat([x, x]))
        opens = (within == 0).unsqueeze(1)
        torch.maximum(torch.where(opens, float("-inf"), engine.peak), first_x, out=engine.peak)
        for kv, held in zip(members, engine.members.layers):
            new = kv.unflatten(-1, (2, held.shape[2], -1)).transpose(0, 1).to(held.dtype)
            held.transpose(2, 3)[:, engine.all_rows[: len(x)], within] = new

    def open(self, engine: StaticDPAR, count: int, halves: int, *, ahead: bool) -> Opened:
        """Move `count` images (the first of `engine.lanes`) that begin a patch on to it, and say where it lies.

        ahead: say where it would lie if all images began one at the next token, and move none.
        """
        lanes = None if count == engine.images else engine.lanes[:count]
        begins, first, index = (_of(x, lanes) for x in (engine.begins, engine.first, engine.index))
        position, width = (engine.position + int(ahead)).expand_as(first), engine.config.row_width
        slot = index + 1
        values = torch.stack([first // width, first % width, (position - 1) % width, index.clamp_min(0)], dim=1)
        table = engine.turns[values[:, engine.turn_source], engine.pair]  # (k, hd / 2, 2)
        table = table * (position > 0)[:, None, None]
        slots = slot if ahead else torch.where(begins, slot, engine.scratch)
        if not ahead:
            _put(engine.first, lanes, torch.where(begins, position, first))
            _put(engine.index, lanes, torch.where(begins, slot, index))
            if engine.apart:
                engine.begins.zero_()
        rows = lanes
        if halves == 2:
            slots, table = slots.repeat(2), table.repeat(2, 1, 1)
            rows = None if lanes is None else torch.cat([lanes, lanes + engine.images])
        seen = engine.patch_cache.hidden.index_select(0, slots)
        placed = LaunchPlan(slots, table, None, rows, None, seen, _turn(table))
        return Opened(lanes, begins, (position - first).clamp_min(1), placed, lanes is None and not ahead)

    def pooled(self, engine: StaticDPAR, opened: Opened) -> Tensor:
        """Return the maximum over the tokens of each patch that ends: (k, D)."""
        return _of(engine.peak, opened.lanes)

    def read(self, reader: PatchReader, q: Tensor, engine: StaticDPAR, layer: int, opened: Opened) -> Tensor:
        """Refine the vectors (k, D) of the patches that end by their own tokens."""
        held, heads = engine.members.layers[layer], self.project(reader.wq, q).unflatten(-1, (reader.heads, -1))
        k, v = (held[0], held[1]) if opened.lanes is None else (held[0, opened.lanes], held[1, opened.lanes])
        seen = engine.members.hidden.index_select(0, opened.lengths - 1)
        return self.add_linear(q, reader.wo, attend(heads, k, v, seen).flatten(1))

    def spread(self, engine: StaticDPAR, patches: Tensor, opened: Opened, halves: int) -> Tensor:
        """Return the patch transformer's input: the class at position 0, later the patch, once per half: (halves k, D)."""
        x = patches if halves == 1 else torch.cat([patches, patches])
        if not opened.may_be_first:
            return x
        position = engine.position.repeat(halves) if engine.apart else engine.position
        return torch.where((position == 0)[:, None], engine.classes[: len(x)], x)

    def keep_copies(self, engine: StaticDPAR, copies: Tensor, opened: Opened, halves: int) -> None:
        """Keep what the decoder adds from a patch's state, for rows that begin one: (halves k, layers D)."""
        begins = opened.begins if halves == 1 else opened.begins.repeat(2)
        rows = rows_of(opened.plan, len(copies))
        engine.copied[rows] = torch.where(begins.unsqueeze(1), copies, engine.copied[rows])

    def commit(self, engine: StaticDPAR, copies: Tensor, halves: int) -> None:
        """Keep what was computed ahead, (halves B, layers D), for images that do begin a patch at the next token."""
        begins = engine.begins
        kept = engine.copied[: len(copies)]
        both = begins if halves == 1 else begins.repeat(2)
        torch.where(both.unsqueeze(1), copies, kept, out=kept)
        torch.where(begins, engine.position + 1, engine.first, out=engine.first)
        engine.index.add_(begins)

    def sample(self, engine: StaticDPAR | StaticGPT, logits: Tensor, halves: int) -> None:
        """Sample the token at the position of every image, or where apart of those that can: logits (halves B, V)."""
        rows, at, apart = engine.image, engine.position.expand(engine.images), engine.apart
        logits = logits.float()
        if halves == 2:
            logits = guide(logits[: engine.images], logits[engine.images :], engine.scales[at])
        tokens = sample_tokens(logits, engine.uniforms[rows, at], engine.settings)
        given = engine.given[rows, at]
        tokens = torch.where(given >= 0, given, tokens)
        if apart:
            torch.logical_not(apart.begins | apart.done, out=apart.moves)
            tokens = torch.where(apart.moves, tokens, engine.current)
        keep_logits(engine, logits)
        engine.current.copy_(tokens)
        engine.tokens[rows, at] = tokens if apart is None else torch.where(apart.moves, tokens, engine.tokens[rows, at])
        if apart:
            torch.where(apart.moves, at, apart.at, out=apart.at)
            apart.done.logical_or_(apart.moves & (at == engine.length - 1))
            engine.position.add_(apart.moves & ~apart.done)

    def refill(self, engine: StaticDPAR, apart: Apart) -> None:
        """Put the next images where one is done, and count the tokens that are settled."""
        image = engine.image
        free = apart.done & (image < apart.total)
        torch.where(free, apart.taken + free.cumsum(0) - 1, image, out=image)
        torch.minimum(image, apart.total, out=image)
        fresh = free & (image < apart.total)
        apart.taken.add_(free.sum())
        apart.finished.add_(free.sum())
        apart.done.logical_and_(~fresh)
        apart.begins.logical_or_(fresh)
        for x, value in ((engine.position, 0), (engine.first, 0), (engine.last_cut, 0), (engine.index, -1)):
            x.masked_fill_(fresh, value)
        both = fresh.repeat(engine.halves)[:, None]
        torch.where(both, engine.stepper.start, engine.state, out=engine.state)
        classes = F.embedding(apart.labels[image], engine.stepper.classes)
        of_images = engine.classes[: len(image)]
        torch.where(fresh[:, None], classes, of_images, out=of_images)
        live = (engine.position + apart.done) * (image < apart.total)
        engine.count.copy_(apart.finished * engine.length + live.sum())

    def decide(self, engine: StaticDPAR, logits: Tensor | None, ahead: int) -> None:
        """Apply the rule to the token `ahead` of the position, with the entropy of its logits (B, V) where it reads any.

        Where the decoder's entropy decides (ahead 0), a start that no entropy could prevent asks for none.
        """
        rule, rows, images = engine.rule, engine.image, engine.images
        at = (engine.last_token + ahead).expand(images)
        cut = fixed = engine.fixed[at]
        if logits is not None:
            entropies = next_token_entropies(logits)
            if ahead == 0:
                certain = fixed
                if rule.max_patch_length is not None:
                    certain = certain | ((at - torch.where(fixed, at, engine.last_cut)) % rule.max_patch_length == 0)
                entropies = torch.where(certain, float("nan"), entropies)
            engine.entropies[rows, at] = entropies
            cut = cut | (entropies > engine.threshold)
        torch.where(cut, at, engine.last_cut, out=engine.last_cut)
        if rule.max_patch_length is None:
            engine.begins.copy_(cut)
        else:
            torch.eq((at - engine.last_cut) % rule.max_patch_length, 0, out=engine.begins)
        engine.starts[rows, at] = engine.begins
        if engine.apart:
            engine.begins.logical_and_(~engine.apart.done)
        if engine.reads_count:
            torch.sum(engine.begins, 0, keepdim=True, dtype=torch.int32, out=engine.count)
            if len(engine.buckets) > 1:
                engine.lanes.copy_(torch.argsort(engine.begins.to(torch.uint8), descending=True, stable=True))


def keep_logits(engine: StaticDPAR | StaticGPT, logits: Tensor) -> None:
    """Keep the guided logits (B, V) of the images that move, where they were asked for."""
    if engine.logits is not None:
        rows, at = engine.image, engine.position.expand(engine.images)
        if engine.apart:
            logits = torch.where(engine.apart.moves[:, None], logits, engine.logits[rows, at])
        engine.logits[rows, at] = logits


def rows_of(plan: LaunchPlan, rows: int) -> Tensor:
    """Return the cache rows of a launch: (A,) int64."""
    return torch.arange(rows, device=plan.slots.device) if plan.rows is None else plan.rows


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attend where `seen` (1 or A, C) is 0: q (A, H, hd), scaled, k, v (A, H, C, hd) -> (A, H, hd) float32."""
    rows, heads, head_dim = q.shape
    k, v = k.reshape(rows * heads, -1, head_dim), v.reshape(rows * heads, -1, head_dim)
    seen = seen.unsqueeze(1).expand(rows, heads, -1).reshape(rows * heads, 1, -1).to(k.dtype)
    scores = torch.baddbmm(seen, q.reshape(rows * heads, 1, head_dim).to(k.dtype), k.transpose(1, 2))
    return torch.bmm(scores.float().softmax(-1).to(v.dtype), v).view(rows, heads, head_dim).float()


def _turn(table: Tensor) -> Tensor:
    """Turn (A, hd / 2, 2) into factors of q, k and v: (A, 3, 1, hd / 2) complex."""
    turn = torch.view_as_complex(table)
    return torch.stack([turn, turn, torch.ones_like(turn)], dim=1).unsqueeze(2)


def _of(x: Tensor, lanes: Tensor | None) -> Tensor:
    return x.clone() if lanes is None else x.index_select(0, lanes)


def _put(x: Tensor, lanes: Tensor | None, values: Tensor) -> None:
    if lanes is None:
        x.copy_(values)
    else:
        x.index_copy_(0, lanes, values)
