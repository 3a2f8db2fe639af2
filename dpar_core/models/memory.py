"""What training and sampling hold in memory, computed from shapes alone; beside `flops`, plain numbers in and out.

Used by `dpar-cli cost`, by the presets, and by the checks before anything runs. T tokens and M patches of an image, D width,
F feed-forward width, V codebook entries. Sizes in bytes; a gigabyte is 10^9 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpar_core.models.configs import DPARConfig, GPTConfig

STATE = 16  # per parameter: float32 weight and gradient, AdamW's two moments
LOGITS_BLOCK = 2**25  # logits the loss holds at a time, see dpar_core.models.loss
CACHE_BLOCK = 16  # positions by which caches are rounded up, see dpar_core.generation.kv_cache
RUNTIME = 1_500_000_000  # CUDA's context, cuBLAS' workspace, fragments between tensors
TRAINING_SHARE = 0.9  # of a device's memory that a training step may be expected to fill
CACHE_SHARE = 0.7  # of the free memory that caches may take while sampling


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one worker.

    state: weights, gradients, moments and the half-precision copy of weights.
    activations: what the forward pass of one image keeps.
    loss: of a micro-batch, whatever its size.
    fixed: the rest.
    """

    state: float
    activations: float
    loss: float
    fixed: float = RUNTIME

    def total(self, images: int) -> float:
        """Return the bytes of a step with micro-batches of this many images."""
        return self.state + self.loss + self.fixed + images * self.activations

    def largest_batch(self, memory: float) -> int:
        """Return the images per micro-batch that fit in TRAINING_SHARE of a device's memory; 0 when none does."""
        return max(int((TRAINING_SHARE * memory - self.total(0)) // self.activations), 0)

    def micro_batches(self, images: int, memory: float, *, at_least: int = 1) -> int | None:
        """Return the fewest micro-batches, `at_least` or more, that a worker's share of a batch can be cut into to fit.

        images: of a step on this worker.
        memory: bytes of its device.
        Returns None where not even single images fit.
        """
        largest = self.largest_batch(memory)
        counts = (count for count in range(at_least, images + 1) if images % count == 0 and images // count <= largest)
        return next(counts, None)


def training_memory(
    shape: GPTConfig | DPARConfig, patches: float | None, *, bf16: bool, checkpointing: bool = False, shards: int = 1
) -> TrainingMemory:
    """Estimate what training a DPAR (with `patches` patches per image), a GPT or an entropy model (None) takes.

    A block keeps per position in bf16 autocast with float32 residuals at most 34 D + 8 F bytes, in float32 50 D + 16 F, or
    its input alone with activation checkpointing. Measured on an H200 in bf16, uncompiled: 27 D + 8 F at XL, 31 D (GPT)
    and 33 D (DPAR) + 8 F at B; compiled blocks keep 17 D + 8 F at XL. shards: workers that state is spread over (FSDP).
    """
    block = 34 * shape.width + 8 * shape.hidden if bf16 else 50 * shape.width + 16 * shape.hidden
    positions: float = shape.layers * shape.tokens
    if patches is not None:
        assert isinstance(shape, DPARConfig), "a GPT has no patches"
        positions = (shape.encoder_layers + shape.decoder_layers) * shape.tokens + shape.patch_layers * (patches + 1)
    kept = positions * (4 * shape.width if checkpointing else block)
    if checkpointing:
        kept += shape.tokens * block  # of the block that is computed again
    copies = (2 if bf16 else 0) * shape.num_parameters
    states = 3 * shape.tokens * shape.width * 4  # the last norm's input and output, and the gradient of the latter
    return TrainingMemory(
        state=STATE * shape.num_parameters / shards + copies,
        activations=kept + states,
        loss=(10 if bf16 else 12) * LOGITS_BLOCK + 4 * shape.codebook_size * shape.width,
    )


def cache_bytes(*, layers: int, rows: int, width: int, positions: int, value_bytes: int) -> int:
    """Return the bytes of the keys and values of a stack of attention layers."""
    return 2 * layers * rows * width * CACHE_BLOCK * -(-positions // CACHE_BLOCK) * value_bytes


def gpt_cache_bytes(shape: GPTConfig, images: int, *, guided: bool, value_bytes: int) -> int:
    """Return the bytes that caches of a batch take with the baseline or, not guided, an entropy model."""
    rows = (2 if guided else 1) * images
    positions = shape.tokens + (0 if shape.num_classes is None else 1)
    return cache_bytes(layers=shape.layers, rows=rows, width=shape.width, positions=positions, value_bytes=value_bytes)


def dpar_cache_bytes(
    shape: DPARConfig,
    images: int,
    *,
    guided: bool,
    value_bytes: int,
    longest_patch: int,
    gate: GPTConfig | None = None,
    gate_bytes: int = 4,
) -> int:
    """Return the most bytes that caches of a batch can take with DPAR: every token may be a patch of its own.

    Encoder and entropy model do not see the class, so guidance doubles the rows of patch transformer and decoder alone.
    longest_patch: tokens.
    gate: the entropy model asked while sampling, its caches of `gate_bytes` per value.
    """
    rows = (2 if guided else 1) * images

    def stack(layers: int, rows: int, positions: int) -> int:
        return cache_bytes(layers=layers, rows=rows, width=shape.width, positions=positions, value_bytes=value_bytes)

    asked = gpt_cache_bytes(gate, images, guided=False, value_bytes=gate_bytes) if gate else 0
    encoder = stack(shape.encoder_layers, images, shape.tokens) + stack(shape.encoder_layers, images, longest_patch)
    return asked + encoder + stack(shape.patch_layers + shape.decoder_layers, rows, shape.tokens)


def sampling_weights(shape: GPTConfig | DPARConfig, gate: GPTConfig | None = None, *, value_bytes: int) -> float:
    """Return the bytes of the networks that sampling holds: in float32 as read, and laid out in the precision of steps."""
    asked = 0 if gate is None else (4 + 4) * gate.num_parameters
    return (4 + value_bytes) * shape.num_parameters + asked


def fitting_images(wanted: float, images: int, free: float) -> int:
    """Return how many of `images` fit, at least 1, when their caches take `wanted` bytes and `free` are free."""
    return images if wanted <= CACHE_SHARE * free else max(int(images * CACHE_SHARE * free / wanted), 1)
