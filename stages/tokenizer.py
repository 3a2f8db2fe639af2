"""Train the small VQ tokenizer, or import published LlamaGen weights; measure its reconstructions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpar_core.data.manifest import read_manifest
from dpar_core.evaluation.reconstruction import codebook_use, psnr_db, reconstruct
from dpar_core.files import atomic_path, save_weights, write_json
from dpar_core.models.published import read_vq
from dpar_core.models.vq import VQ, Reconstruction, VQConfig, to_float
from dpar_core.pictures import labelled_grid, save_png
from dpar_core.training.allocator import keep_freed_blocks
from dpar_core.training.checkpoint import Architecture, CheckpointStore
from dpar_core.training.codebook import place_codes, restart_dead_codes
from dpar_core.training.optim import OptimSettings, adamw, learning_rate, set_learning_rate
from dpar_core.training.order import DataOrder, random_subset
from stages import params as P
from stages.data import ManifestOpener
from stages.shared.configs import vq_config
from stages.shared.crops import CenterCrops, Crops
from stages.sources import checked_file
from stages.terminal import print_fitted
from stages.tracker import Tracker

CHECKPOINT_EVERY, LOG_EVERY, RESTART_EVERY = 100, 10, 20
MEASURED_IMAGES = 256


@dataclass(frozen=True)
class Params:
    seed: int
    data: P.Data
    tokenizer: P.Tokenizer


@dataclass(frozen=True)
class Inputs:
    manifest: Path
    weights_seen: Path  # what stage sources saw of tokenizer.weights


@dataclass(frozen=True)
class Outputs:
    weights: Path
    metrics: Path
    picture: Path


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Make the tokenizer and measure how well it reconstructs the validation images."""
    manifest = read_manifest(inputs.manifest)
    tracker.log_input("manifest", inputs.manifest, manifest.digest)
    opener, settings = ManifestOpener(manifest), params.tokenizer
    assert settings.precision != "auto", "the runner settles precisions"
    config = vq_config(settings)
    if settings.weights is None:
        keep_freed_blocks()
        images = CenterCrops(manifest.split("train"), opener, params.data.image_size)
        state = train(config, settings, images, tracker, seed=params.seed, device=device, work=work)
        if (note := images.note("training")) is not None:
            print_fitted(note)
    else:
        with checked_file(inputs.weights_seen, "tokenizer.weights", Path(settings.weights)) as source:
            state = read_vq(Path(settings.weights), expected=config, holder=settings.weights_key)
    model = VQ(config).to(device).eval()
    model.load_state_dict(state)
    rows = manifest.split("validation")
    held_out = CenterCrops(rows, opener, params.data.image_size)
    chosen = random_subset(len(rows), MEASURED_IMAGES)
    metrics, originals, copies = measure_reconstruction(model, held_out, chosen, device=device)
    if (note := held_out.note("validation")) is not None:
        print_fitted(f"{note}: {metrics['tokenizer/measured_images']} of {len(chosen)} are measured")
    tracker.log_metrics(metrics)
    labels = [rows[int(index)].label for index in originals.indices]
    by_class = _one_a_class(labels)
    titles = [manifest.classes[labels[which]] for which in by_class]
    picture = labelled_grid(
        [originals.images[by_class], copies[by_class]], ["original", "decoded"], columns=titles, factor=4
    )
    with atomic_path(outputs.picture) as temporary:
        save_png(picture, temporary)
    write_json(outputs.metrics, metrics)
    meta = {"image_size": params.data.image_size, "imported": settings.weights is not None, "manifest": manifest.digest}
    if settings.weights is None:
        meta["precision"] = settings.precision
    if settings.weights is not None:
        meta["weights"] = source
    save_weights(outputs.weights, state, kind="vq", config=asdict(config), meta=meta)
    tracker.log_picture(outputs.picture)


def train(
    config: VQConfig, settings: P.Tokenizer, images: CenterCrops, tracker: Tracker, *, seed: int, device: str, work: Path
) -> dict[str, Tensor]:
    """Train a tokenizer on L1 distance plus the quantizer's loss and return its weights.

    During the first `warmup_steps` the decoder sees latents as they are, on the sphere but not quantized; then the
    codebook is placed by k-means on latents, and codes that no latent chose for a while restart from latents of the
    current batch, until three quarters of the steps. Continues from the newest checkpoint in `work`. Raises
    RuntimeError when a loss is not finite.
    """
    torch.manual_seed(seed)
    model = VQ(config).to(device).train()
    optim = OptimSettings(settings.lr, "cosine", min(20, settings.steps // 10), (0.9, 0.99), 1e-8, 0.0, 0.0)
    optimizer = adamw(model.named_parameters(), optim)
    shape = asdict(config) | {"channel_multipliers": list(config.channel_multipliers)}  # as JSON has it
    store = CheckpointStore(work / "checkpoints", Architecture("vq", shape), keep_last=2)
    used = torch.zeros(config.codebook_size, dtype=torch.int64, device=device)
    first = 0
    if (found := store.newest()) is not None:
        first = found.step
        model.load_state_dict(found.model())
        _load_optimizer(model, optimizer, found.optimizer())
        used = found.optimizer()["used"].to(device)
    order = DataOrder(images=len(images), views=2, batch_size=settings.batch_size, seed=seed)
    bar = tracker.progress(settings.steps, "tokenizer", done=first, unit="steps")
    with bar as progress:
        for step in range(first, settings.steps):
            set_learning_rate(optimizer, learning_rate(optim, step, steps=settings.steps))
            batch = _batch(images, order, step, device)
            quantize = step >= settings.warmup_steps
            if step == settings.warmup_steps:
                place_codes(model, (_batch(images, order, later, device) for later in itertools.count(step)))
            elif quantize and step % RESTART_EVERY == 0 and step < 0.75 * settings.steps:
                restart_dead_codes(model, optimizer, batch, used, seed=seed, step=step)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.precision == "bf16"):
                out = model(batch) if quantize else _continuous(model, batch)
                distance = F.l1_loss(out.images.float(), batch)
                loss = distance + out.loss
            if not torch.isfinite(loss):
                raise RuntimeError(
                    f"tokenizer training stopped at step {step + 1}: its loss is {loss.item()}; lower tokenizer.lr or set "
                    "tokenizer.precision: fp32, then run again"
                )
            used += torch.bincount(out.codes.flatten(), minlength=config.codebook_size)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done = step + 1
            if done % LOG_EVERY == 0:
                tracker.log_metrics({"train/loss": loss.item(), "train/l1": distance.item()}, step=done)
            if done % CHECKPOINT_EVERY == 0 and done < settings.steps:
                tensors = {**_optimizer_tensors(model, optimizer), "used": used}
                store.save(done, model=model.state_dict(), optimizer=tensors, state={})
            progress.advance(1, loss=loss.item())
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _batch(images: CenterCrops, order: DataOrder, step: int, device: str) -> Tensor:
    picks = order.batch(step)
    return to_float(torch.from_numpy(images.batch(picks.indices, picks.views).images).to(device))


def _continuous(model: VQ, batch: Tensor) -> Reconstruction:
    """Run the tokenizer without its quantizer."""
    latents = F.normalize(model.latents(batch).float(), dim=1)
    no_codes = torch.zeros(0, dtype=torch.int64, device=batch.device)
    return Reconstruction(model.decoder(model.post_quant_conv(latents)), no_codes, latents.new_zeros(()))


def _optimizer_tensors(model: VQ, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    return {f"{key}/{name}": value for name, state in states.items() for key, value in state.items()}


def _load_optimizer(model: VQ, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        if f"step/{name}" in tensors:  # the codebook has no moments yet while latents are not quantized
            optimizer.state[parameter] = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in keys}


def measure_reconstruction(
    model: VQ, images: CenterCrops, chosen: np.ndarray, *, device: str
) -> tuple[dict[str, float], Crops, np.ndarray]:
    """Reconstruct images and measure PSNR, SSIM and how the codebook is used.

    Returns metrics, the originals of `chosen` that could be read, and their reconstructions (n, size, size, 3) uint8.
    Raises ValueError when none could.
    """
    from skimage.metrics import structural_similarity

    originals = images.readable(chosen)
    copies = reconstruct(model, originals.images, device=device)
    use = codebook_use(copies.codes, model.config.codebook_size)
    similarity = [structural_similarity(a, b, channel_axis=2) for a, b in zip(originals.images, copies.images)]
    metrics = {
        "tokenizer/psnr_db": psnr_db(originals.images, copies.images),
        "tokenizer/ssim": float(np.mean(similarity)),
        "tokenizer/codes_used": use.codes,
        "tokenizer/codebook_use": use.share,
        "tokenizer/perplexity": use.perplexity,
        "tokenizer/measured_images": len(originals.indices),
    }
    return metrics, originals, copies.images


def _one_a_class(labels: Sequence[int]) -> np.ndarray:
    first: dict[int, int] = {}
    for which, label in enumerate(labels):
        first.setdefault(label, which)
    return np.array([first[label] for label in sorted(first)][:12])
