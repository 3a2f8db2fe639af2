"""Generation in steps of fixed shape, for devices that launch work from a queue: on CUDA captured once and replayed.

All images are at the same token here. One step is: where a patch begins, close the open one and step the patch transformer;
decode and sample; encode the token; ask the gate and apply the rule to the next token. The gate needs nothing of the
encoder, so the two run side by side. Tokens, caches, positions, boundaries and random numbers stay on the device. Rows
that begin no patch are handled in one of two ways (`Schedule`):

- "ahead": nothing is read by the host. The patch transformer does not wait for the gate either: it steps for all rows as
  if each began a patch, and what it finds is dropped where none begins. A row's keys and values lie where its next patch
  belongs, so the next step overwrites them. (Where the decoder's entropy decides, it has to be waited for.)
- "buckets": the host reads one number of four bytes per token, how many images begin a patch, and launches the patch
  transformer for at least as many (one captured graph per bucket), or not at all.

A third way leaves the images at tokens of their own (rounds.py). All give the images of the ragged decoder (lanes.py) up
to rounding: the random numbers are the same.

Shapes: B images, T tokens per image, D width, V codebook entries, k images of a bucket, hd head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpar_core.choices import ENCODED, Coordinate
from dpar_core.generation.sampling import SampleSettings, uniforms
from dpar_core.generation.static_ops import Apart, Opened, StaticCache, TorchOps
from dpar_core.generation.stepping import DPARStepper, GPTStepper
from dpar_core.models.dpar import DPARConfig
from dpar_core.models.memory import cache_bytes
from dpar_core.models.rope import frequencies, pairs_of
from dpar_core.patches.rule import BoundaryState, PatchRule

Schedule = Literal["ahead", "buckets", "rounds"]

BUCKETS = 8  # sizes of a launch of the patch transformer
SMALLEST_BUCKET = 8
SPINS = 100_000  # how often the host looks for a count before it asks whether the device still runs


def bucket_sizes(images: int) -> list[int]:
    """Return how many images a launch of the patch transformer may have, smallest first; the last is all of them."""
    step = max(SMALLEST_BUCKET, -(-images // BUCKETS))
    return [*range(step, images, step), images]


def ops_for(device: torch.device) -> Any:
    """Return the operations of a device: Triton's where CUDA and Triton are there, plain torch elsewhere."""
    if device.type == "cuda":
        try:
            from dpar_core.generation.triton_ops import TritonOps
        except ImportError:  # CUDA without Triton (Windows)
            return TorchOps()
        return TritonOps()
    return TorchOps()


class Static(ABC):
    """What both models share: state of a batch, the loop, and the captured parts.

    images: B, those that are sampled at a time.
    most: N, images that may be asked for at once.
    apart: where images are that are at tokens of their own (rounds.py); then N may exceed B, and row N is nobody's.
    position: (1,) int64, or (B,) where apart, the token that is sampled next.
    current: (B,) int64, the last token.
    image: (B,) int64, rows of those that follow.
    tokens, given, uniforms: (N, T) int64, int64 with -1 where nothing is given, and float64.
    """

    def __init__(
        self,
        stepper: GPTStepper | DPARStepper,
        settings: SampleSettings,
        *,
        images: int,
        keep_logits: bool,
        capture: bool,
        most: int | None = None,
    ) -> None:
        """Make the state. most: N, where images are to be apart (None: all are at the same token)."""
        tokens, device = stepper.config.tokens, stepper.tokens.device
        self.settings, self.images, self.length, self.device = settings, images, tokens, device
        self.most, self.apart = most or images, Apart.of(images, most, device) if most else None
        rows = self.most + (1 if self.apart else 0)
        self.ops = ops_for(device)
        scales = settings.scales(tokens)
        guided = torch.nonzero(scales != 1).flatten().tolist()
        self.last_guided = max(guided, default=-1)
        self.halves = 2 if guided else 1
        self.scales = scales.to(device)
        self.position = torch.zeros(images if self.apart else 1, dtype=torch.int64, device=device)
        self.current = torch.zeros(images, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        self.given = torch.full((rows, tokens), -1, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(rows, tokens, dtype=torch.float64, device=device)
        self.logits = torch.zeros(rows, tokens, stepper.config.codebook_size, device=device) if keep_logits else None
        self.all_rows = torch.arange(2 * images, device=device)
        self.image = self.all_rows[:images].clone()
        self.capture = capture and device.type == "cuda"
        self.graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}

    @abstractmethod
    def parts(self) -> dict[tuple[Any, ...], Callable[[], None]]:
        """Return all parts that the loop may launch, by name."""

    def phases(self) -> list[int]:
        """Halves (conditional, unconditional) that tokens may need: all the same, or both kinds."""
        if self.halves == 2 and self.last_guided < self.length - 1:
            return [2, 1]
        return [self.halves]

    def halves_at(self, token: int) -> int:
        """Return how many halves the token at a position needs: the unconditional one up to the last guided token."""
        return 2 if token <= self.last_guided else 1

    def prepare(self) -> None:
        """Capture every part. Each runs once before, so that kernels are compiled and handles made."""
        self.functions = self.parts()
        if not self.capture:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for function in self.functions.values():
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        for name, function in self.functions.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                function()
            self.graphs[name] = graph

    def launch(self, *name: Any) -> None:
        """Run a part: replay it where it is captured."""
        if self.capture:
            self.graphs[name].replay()
        else:
            self.functions[name]()

    def begin(self, seeds: Sequence[int], given: Tensor | None) -> None:
        """Set the state of a batch to its first token. Seeds and given tokens of fewer images are filled up."""
        self.position.zero_()
        self.current.zero_()
        numbers = uniforms(list(seeds), self.length)
        self.uniforms.copy_(F.pad(numbers, (0, 0, 0, len(self.uniforms) - len(numbers))))
        self.given.fill_(-1)
        if given is not None and given.numel():
            self.given[: len(given), : given.shape[1]] = given.to(self.device)


class StaticGPT(Static):
    """The LlamaGen baseline in steps of fixed shape."""

    def __init__(
        self,
        stepper: GPTStepper,
        settings: SampleSettings,
        *,
        images: int,
        dtype: torch.dtype,
        keep_logits: bool,
        capture: bool,
    ) -> None:
        super().__init__(stepper, settings, images=images, keep_logits=keep_logits, capture=capture)
        self.stepper, self.config = stepper, stepper.config
        config, positions = self.config, len(stepper.table)
        rows = self.halves * images
        self.table = torch.view_as_real(stepper.table).contiguous()
        self.classes = torch.zeros(rows, config.width, device=self.device)
        self.cache = StaticCache(config, config.layers, rows=rows, positions=positions, device=self.device, dtype=dtype)

    def parts(self) -> dict[tuple[Any, ...], Callable[[], None]]:
        return {("step", halves): partial(self.step, halves) for halves in self.phases()}

    def step(self, halves: int) -> None:
        """Sample one token of every image."""
        x = self.ops.embed_or_class(self, halves)
        plan = self.ops.placed(self.cache, self.position, self.table, shift=0)
        for layer, block in enumerate(self.stepper.blocks):
            x = self.ops.block(block, x, self.cache, layer, plan)
        self.ops.sample(self, self.ops.project(self.stepper.head.output, x), halves)
        self.position.add_(1)

    def run(
        self, labels: Tensor, seeds: Sequence[int], given: Tensor | None, progress: Callable[[int], None] | None
    ) -> None:
        """Sample a batch into `tokens`. labels: (B or fewer,) int64 on the host."""
        self.begin(seeds, given)
        assert self.stepper.classes is not None
        self.classes.copy_(class_vectors(self.stepper.classes, labels, self.images, self.halves))
        for token in range(self.length):
            self.launch("step", self.halves_at(token))
            if progress:
                progress(len(labels))


class StaticDPAR(Static):
    """DPAR in steps of fixed shape.

    begins: (B,) bool, images whose next token begins a patch.
    lanes: (B,) int64, those first.
    count: (1,) int32, how many.
    first, index: (B,) int64, first token and number of the open patch.
    last_cut: (B,) int64, as in BoundaryState.
    entropies, starts: (N, T + 1), the gate's entropies and where patches begin.
    state: (B or 2 B, D), x' of the last token, once per half.
    peak: (B, D), maximum of x' in the open patch.
    copied: (B or 2 B, layers D), what decoder layers add from the patch's state.
    """

    def __init__(
        self,
        stepper: DPARStepper,
        gate: GPTStepper | None,
        settings: SampleSettings,
        *,
        images: int,
        dtype: torch.dtype,
        gate_dtype: torch.dtype,
        longest: int,
        schedule: Schedule,
        keep_logits: bool,
        capture: bool,
        most: int | None = None,
    ) -> None:
        config, rule = stepper.config, settings.rule
        assert rule is not None
        super().__init__(stepper, settings, images=images, keep_logits=keep_logits, capture=capture, most=most)
        self.stepper, self.gate, self.config, self.rule = stepper, gate, config, rule
        self.asks_decoder = rule.reads_entropies and settings.gate == "decoder"
        self.known = None if rule.reads_entropies else _known_starts(rule, config.tokens)
        self.reads_count = schedule == "buckets" and self.known is None
        self.ahead = schedule == "ahead" and self.known is None and not self.asks_decoder
        self.buckets = bucket_sizes(images) if self.reads_count else [images]
        device, rows, width, tokens = self.device, self.halves * images, config.width, config.tokens

        def whole(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.begins = self.apart.begins if self.apart else whole(1, images, dtype=torch.bool)
        self.lanes = torch.arange(images, device=device)
        self.count = whole(images, 1, dtype=torch.int32)
        self.count_host = torch.full((1,), -1, dtype=torch.int32, pin_memory=self.capture)
        self.side = torch.cuda.Stream() if device.type == "cuda" else None
        self.first, self.index, self.last_cut = (whole(0, images) for _ in range(3))
        self.entropies = torch.full((len(self.tokens), tokens + 1), float("nan"), device=device)
        self.starts = whole(0, len(self.tokens), tokens + 1, dtype=torch.bool)
        self.fixed = torch.from_numpy(rule.fixed_cuts(tokens + 1)).to(device)
        threshold = float("nan") if rule.threshold is None else rule.threshold
        self.threshold = torch.full((1,), threshold, dtype=torch.float32, device=device)
        self.state, self.peak = torch.zeros(rows, width, device=device), torch.zeros(images, width, device=device)
        self.copied = torch.zeros(rows, config.decoder_layers * width, device=device)
        self.classes = torch.zeros(rows, width, device=device)
        self.table = torch.view_as_real(stepper.table).contiguous()
        self.turns, self.turn_source = (x.to(device) for x in _patch_turns(stepper.head_dim, config))
        self.pair = torch.arange(stepper.head_dim // 2, device=device)

        def cache(layers: int, rows: int, positions: int) -> StaticCache:
            return StaticCache(config, layers, rows=rows, positions=positions, device=device, dtype=dtype)

        self.scratch = tokens
        self.encoder_cache = cache(config.encoder_layers, images, tokens)
        self.members = cache(config.encoder_layers, images, longest)
        self.patch_cache = cache(config.patch_layers, rows, tokens + 1)
        self.decoder_cache = cache(config.decoder_layers, rows, tokens)
        if gate is not None:
            self.gate_table = torch.view_as_real(gate.table).contiguous()
            layers = gate.config.layers
            self.gate_cache = StaticCache(
                gate.config, layers, rows=images, positions=tokens, device=device, dtype=gate_dtype
            )
        self.probed: dict[int, Tensor] = {}
        self.restart()

    def parts(self) -> dict[tuple[Any, ...], Callable[[], None]]:
        parts: dict[tuple[Any, ...], Callable[[], None]] = {}
        for halves in self.phases():
            for images in self.buckets:
                parts["patch", images, halves] = partial(self.patch, images, halves)
            if self.asks_decoder:
                parts["probe", halves] = partial(self.probe, halves)
                parts["keep", halves] = partial(self.keep, halves)
            parts["token", halves] = partial(self.token, halves)
        return parts

    @property
    def last_token(self) -> Tensor:
        """Position of the last token: (1,) the same for all, or (B,) where images are apart."""
        return self.apart.at if self.apart else self.position

    @property
    def moves(self) -> Tensor | None:
        """Images that the last step sampled: (B,) bool, None: all."""
        return self.apart.moves if self.apart else None

    def patch(self, images: int, halves: int) -> None:
        """Close the open patch of the first `images` of `lanes` and get the state of the next, where one begins."""
        opened = self.ops.open(self, images, halves, ahead=False)
        self.ops.keep_copies(self, self.transformed(opened, halves), opened, halves)

    def transformed(self, opened: Opened, halves: int) -> Tensor:
        """Return what decoder layers add from the state of the opened patches: (halves k, layers D)."""
        ops, stepper = self.ops, self.stepper
        q = ops.pooled(self, opened)
        for layer, reader in enumerate(stepper.readers):
            q = ops.read(reader, q, self, layer, opened)
        x = ops.spread(self, q, opened, halves)
        for layer, block in enumerate(stepper.patch_blocks):
            x = ops.block(block, x, self.patch_cache, layer, opened.plan)
        copies: Tensor = ops.project(stepper.copies, x)
        return copies

    def decode(self, halves: int) -> Tensor:
        """Return the logits of the token at the position, given the state of the open patch: (halves B, V)."""
        ops, width = self.ops, self.config.width
        x = self.state[: halves * self.images]
        plan = ops.placed(self.decoder_cache, self.position, self.table, shift=0, halves=halves)
        for layer, block in enumerate(self.stepper.decoder):
            copied = self.copied[: len(x), layer * width : (layer + 1) * width]
            x = ops.block(block, x, self.decoder_cache, layer, plan, copied)
        logits: Tensor = ops.project(self.stepper.head.output, x)
        return logits

    def token(self, halves: int) -> None:
        """Sample the token at the position, take it up, and decide which images begin a patch after it."""
        self.ops.sample(self, self.decode(halves), halves)
        self.take_up(halves)

    def take_up(self, halves: int) -> None:
        """Encode the sampled token beside the gate, and go on to the next position."""
        self.ask_beside()
        self.encode()
        copies = None
        if self.ahead:  # as if each image began a patch at the next token; `commit` keeps what counts
            copies = self.transformed(self.ops.open(self, self.images, halves, ahead=True), halves)
        self.wait_for_gate()
        if copies is not None:
            self.ops.commit(self, copies, halves)
        self.position.add_(1)

    def ask_beside(self) -> None:
        """Launch `decide_next` beside what follows."""
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream())
        with nullcontext() if self.side is None else torch.cuda.stream(self.side):
            self.decide_next()

    def wait_for_gate(self) -> None:
        """Let what follows wait for what `ask_beside` launched."""
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)

    def decide_next(self) -> None:
        """Ask the entropy model about the next token and apply the rule; the decoder is asked later (`probe`)."""
        if self.asks_decoder or self.known is not None:
            return
        ops, gate = self.ops, self.gate
        assert gate is not None
        x = ops.embed(gate.tokens, self.current)
        plan = ops.placed(self.gate_cache, self.last_token, self.gate_table, shift=0, moves=self.moves)
        for layer, block in enumerate(gate.blocks):
            x = ops.block(block, x, self.gate_cache, layer, plan)
        ops.decide(self, ops.project(gate.head.output, x), 1)
        if self.reads_count:
            self.send_count()

    def probe(self, halves: int) -> None:
        """Ask the decoder's entropy: its logits as if the token stayed in the open patch, which are kept if it does."""
        logits = self.probed[halves] = self.decode(halves)
        self.ops.decide(self, logits[: self.images], 0)
        if self.reads_count:
            self.send_count()

    def keep(self, halves: int) -> None:
        """Sample from the logits of the probe, where no image begins a patch, and take the token up."""
        self.ops.sample(self, self.probed[halves], halves)
        self.take_up(halves)

    def send_count(self) -> None:
        """Send the count to the host, which waits for it in `read_count`."""
        if self.capture:
            self.count_host.copy_(self.count, non_blocking=True)

    def read_count(self) -> int:
        """Wait for the count. Raises RuntimeError when the device has stopped without it."""
        if not self.capture:
            return int(self.count)
        seen, spins = self.count_host.numpy(), 0
        while seen[0] < 0:
            spins += 1
            if spins % SPINS == 0 and torch.cuda.current_stream().query() and seen[0] < 0:
                raise RuntimeError("the device has ended its work without sending the count that the host waits for")
        count, seen[0] = int(seen[0]), -1
        return count

    def encode(self) -> None:
        """Turn the sampled token into x', and keep it for the patch that holds it."""
        ops, stepper = self.ops, self.stepper
        x = ops.embed(stepper.tokens, self.current)
        plan = ops.placed(self.encoder_cache, self.last_token, self.table, shift=1, moves=self.moves)
        first_x, members = x, []
        for layer, (block, reader) in enumerate(zip(stepper.encoder, stepper.readers)):
            x = ops.block(block, x, self.encoder_cache, layer, plan)
            first_x = x if layer == 0 else first_x
            members.append(ops.project(reader.wkv, x))
        ops.take_up(self, x, first_x, members)

    def restart(self) -> None:
        """Set boundaries and vectors to those of an image without tokens: its first token begins a patch."""
        self.begins.fill_(True)
        self.lanes.copy_(self.all_rows[: self.images])
        self.count.fill_(self.images)
        self.count_host.fill_(-1)
        self.first.zero_()
        self.index.fill_(-1)
        self.last_cut.zero_()
        self.entropies.fill_(float("nan"))
        self.starts.zero_()
        self.starts[:, 0] = True
        self.state.copy_(self.stepper.start.expand_as(self.state))
        self.peak.zero_()

    def run(
        self, labels: Tensor, seeds: Sequence[int], given: Tensor | None, progress: Callable[[int], None] | None
    ) -> None:
        """Sample a batch into `tokens`, `starts` and `entropies`. labels: (B or fewer,) int64 on the host."""
        self.begin(seeds, given)
        self.restart()
        self.classes.copy_(class_vectors(self.stepper.classes, labels, self.images, self.halves))
        for token in range(self.length):
            halves = self.halves_at(token)
            begin = self.images
            if token and self.known is not None:
                begin = self.images if self.known[token] else 0
            elif token and self.ahead:
                begin = 0
            elif token:
                if self.asks_decoder:
                    self.launch("probe", halves)
                if self.reads_count:
                    begin = self.read_count()
            if begin:  # for at least so many images
                self.launch("patch", next(size for size in self.buckets if size >= begin), halves)
            self.launch("keep" if self.asks_decoder and not begin else "token", halves)
            if progress:
                progress(len(labels))
        if self.reads_count and not self.asks_decoder:
            self.read_count()  # that of the token behind the last one

    def starts_on_host(self) -> np.ndarray:
        """Return where patches begin: (B, T) bool."""
        if self.known is not None:
            return np.broadcast_to(np.array(self.known), (self.images, self.length)).copy()
        return self.starts[:, : self.length].cpu().numpy()


def static_gpt_bytes(stepper: GPTStepper, *, images: int, halves: int, dtype: torch.dtype) -> int:
    """Return the bytes of a `StaticGPT`'s state: its cache, and what one step makes of all rows at most."""
    c = stepper.config
    rows, positions = halves * images, len(stepper.table)
    cache = cache_bytes(layers=c.layers, rows=rows, width=c.width, positions=positions, value_bytes=dtype.itemsize)
    return cache + _working_bytes(images, rows, c.tokens, c.codebook_size, c.hidden)


def static_dpar_bytes(
    stepper: DPARStepper,
    gate: GPTStepper | None,
    *,
    images: int,
    halves: int,
    longest: int,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
) -> int:
    """Return the bytes of a `StaticDPAR`'s state: its caches, and what one step makes of all rows at most."""
    c, rows = stepper.config, halves * images

    def cache(layers: int, rows: int, positions: int) -> int:
        return cache_bytes(layers=layers, rows=rows, width=c.width, positions=positions, value_bytes=dtype.itemsize)

    total = cache(c.encoder_layers, images, c.tokens) + cache(c.encoder_layers, images, longest)
    total += cache(c.patch_layers, rows, c.tokens + 1) + cache(c.decoder_layers, rows, c.tokens)
    total += 4 * rows * c.decoder_layers * c.width
    if gate is not None:
        g = gate.config
        size = gate_dtype.itemsize
        total += cache_bytes(layers=g.layers, rows=images, width=g.width, positions=c.tokens, value_bytes=size)
        total += 4 * images * c.codebook_size
    return total + _working_bytes(images, rows, c.tokens, c.codebook_size, c.hidden)


def _working_bytes(images: int, rows: int, tokens: int, codebook_size: int, hidden: int) -> int:
    per_image = tokens * (8 + 8 + 8 + 4 + 1)  # tokens, given, random numbers, entropies, starts
    # Logits in float32, guided ones and a filter's copies beside them; a block's widest layer and its inputs.
    per_row = codebook_size * 4 * 3 + hidden * 4 * 6
    return images * per_image + rows * per_row


def class_vectors(table: Tensor, labels: Tensor, images: int, halves: int) -> Tensor:
    """Return the class vectors of all rows, the null class for the unconditional half and for images that fill up."""
    null = len(table) - 1
    labels = F.pad(labels.cpu(), (0, images - len(labels)), value=null)
    if halves == 2:
        labels = torch.cat([labels, torch.full_like(labels, null)])
    return F.embedding(labels.to(table.device), table)


def _known_starts(rule: PatchRule, tokens: int) -> list[bool]:
    """Return where patches begin under a rule that reads no entropies: one bool per token."""
    boundaries = BoundaryState(rule, 1)
    return [bool(boundaries.step(t, torch.full((1,), float("nan")))[0]) for t in range(tokens)]


def _patch_turns(head_dim: int, config: DPARConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every value times every pair's frequency, (n, hd / 2, 2) float32, and which value turns each
    pair, (hd / 2,) int64: 0 row, 1 first column, 2 last column, 3 number of the patch (see rope.patch_rotary)."""
    sources = [get_args(Coordinate).index(name) for name in ENCODED[config.position_encoding]]
    counts = pairs_of(head_dim, config.position_encoding)
    f = torch.cat([frequencies(count) for count in counts])
    angles = torch.arange(config.tokens + 1)[:, None] * f
    source = torch.cat([torch.full((count,), source) for source, count in zip(sources, counts)])
    return torch.stack([angles.cos(), angles.sin()], dim=-1), source
