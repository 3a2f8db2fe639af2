"""What a run costs before it is started: parameters, FLOPs, memory, disk, GPU-hours.

N tokens and M patches per image. Training costs three forward passes; numbers are those of the paper's own accounting.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dpar_core.models.memory import TrainingMemory
    from dpar_core.models.vq import VQConfig

GIGA, HOUR = 1e9, 3600.0
IMAGENET_IMAGES, IMAGENET_CLASSES, BUILTIN_CLASSES = 1_281_167, 1000, 9
CHECKPOINT_BYTES = 12  # a parameter: weight and moments
INCEPTION_FLOPS = 2 * 5.7e9  # an image of 299 pixels through Inception v3: 5.7 billion multiply-adds
# Share of the GPU's peak that work other than training reaches: as measured on an H200 (docs/gpu.md), scoring assumed.
SHARES = {"tokenizing": 0.11, "entropies": 0.19, "entropies in fp32": 0.043, "sampling": 0.09, "scoring": 0.05}


@dataclass(frozen=True)
class Prices:
    """What an accelerator does and costs. utilisation: share of its peak that training reaches."""

    gpu: str
    utilisation: float
    price: float  # for a GPU-hour
    currency: str = "USD"

    def hours(self, operations: float, share: float | None = None) -> float:
        """Return GPU-hours for a number of FLOPs. share: of the peak, else `utilisation`.

        Raises ValueError for a GPU without a published peak.
        """
        from dpar_core.models.flops import PUBLISHED_PEAKS, published_peak

        peak = published_peak(self.gpu)
        if peak is None:
            raise ValueError(f"no peak is known for GPU {self.gpu!r}: expected one of {', '.join(PUBLISHED_PEAKS)}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"--utilisation {self.utilisation} must be above 0 and at most 1")
        return operations / (peak * (share or self.utilisation)) / HOUR


def patches_an_image(params: Any, tokens: int) -> float:
    """Return M for the patching section of params. Raises ValueError where M depends on the data."""
    patching = params.patching
    if patching.mode == "token":
        return tokens
    if patching.mode == "static":
        return math.ceil(tokens / patching.static_length)
    if patching.target_mean_length is not None:
        return tokens / patching.target_mean_length
    from pipeline.presets.published import PATCHES

    published = PATCHES.get((tokens, patching.threshold))
    if published and patching.mode == "entropy_rows" and patching.max_patch_length == 4:
        return published
    raise ValueError(
        f"how many patches threshold {patching.threshold} leaves of {tokens} tokens depends on the data: give --patches "
        "(`dpar-cli patches stats` counts them from stored entropies)"
    )


def fitting(training: Any, memory: TrainingMemory, gpu: float) -> dict[str, Any]:
    """Return what a worker holds by its training section, the largest micro-batch, and the `accumulate` that fits.

    gpu: bytes of its memory. The last is None where no number of micro-batches fits: another strategy, or a smaller batch.
    """
    share = training.batch_size // training.workers
    images = share // training.accumulate
    largest = memory.largest_batch(gpu)
    return {
        "state_gb_per_worker": (memory.state + memory.fixed + memory.loss) / GIGA,
        "activations_gb_per_worker": images * memory.activations / GIGA,
        "memory_gb_per_worker": memory.total(images) / GIGA,
        "micro_batch": images,
        "largest_micro_batch": largest,
        "accumulate": training.accumulate,
        "accumulate_that_fits": memory.micro_batches(share, gpu, at_least=training.accumulate),
    }


@functools.cache
def tokenizer_flops(config: VQConfig, side: int) -> tuple[float, float]:
    """Return the FLOPs of encoding and of decoding an image of `side` pixels, layer by layer, without computing anything."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dpar_core.models.vq import VQ

    grid = side // config.downsample
    with torch.device("meta"):
        model, image = VQ(config), torch.empty(1, 3, side, side)
        codes = torch.zeros(1, grid, grid, dtype=torch.int64)
    counts = []
    for call, given in ((model.encode, image), (model.decode, codes)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(given)
        counts.append(float(counter.get_total_flops()))
    return counts[0], counts[1]


def other_work(params: Any, prices: Prices, *, views: float, gate: float, forward: Mapping[str, float]) -> dict[str, Any]:
    """Return what a whole run does besides training DPAR, its baseline and the entropy model.

    views: encoded views of the training images. gate, forward: FLOPs of one image through the entropy model, through each
    model. The baseline is sampled twice, at equal steps and at equal training time.
    """
    from stages.tokenizer import vq_config

    encode, decode = tokenizer_flops(vq_config(params.tokenizer), params.data.image_size)
    images, guided = params.sample.images, 2 if params.sample.cfg_scale > 1 else 1
    trained = 0 if params.tokenizer.weights else params.tokenizer.steps * params.tokenizer.batch_size
    gated = gate if params.sample.gate == "entropy_model" else 0.0
    sampled = guided * (forward["dpar"] + 2 * forward["llamagen"]) + gated + 3 * decode
    exact = "entropies in fp32" if params.entropies.precision == "fp32" else "entropies"
    work = {
        "training the tokenizer": (trained, 3 * (encode + decode) * trained, prices.utilisation),
        "tokenizing": (views, encode * views, SHARES["tokenizing"]),
        "entropies": (views, gate * views, SHARES[exact]),
        "sampling": (3 * images, sampled * images, SHARES["sampling"]),
    }
    if params.score.features == "inception":
        work["scoring"] = (3 * images, INCEPTION_FLOPS * 3 * images, SHARES["scoring"])
    return {
        name: {"images": count, "exaflops": total / 1e18, "share_of_peak": share, "gpu_hours": prices.hours(total, share)}
        for name, (count, total, share) in work.items()
        if count
    }


def costs(
    params: Any, *, prices: Prices, patches: float | None = None, images: int | None = None, classes: int | None = None
) -> dict[str, Any]:
    """Return everything that `dpar-cli cost` prints, as plain data.

    params: the whole of a params file. patches, images, classes: M, training images and classes where the defaults
    (published or measured M; ImageNet's, or the built-in photographs') do not fit.
    """
    from dpar_core.data.images import VIEW_COUNTS
    from dpar_core.models.flops import (
        GPTShape,
        dpar_forward_flops,
        gpt_forward_flops,
        published_memory,
        training_flops,
    )
    from dpar_core.models.memory import training_memory
    from stages.entropy_model import entropy_config
    from stages.train import dpar_config, llamagen_config

    builtin = params.data.source == "builtin"
    images = images or (params.data.builtin.train_crops if builtin else IMAGENET_IMAGES)
    classes = classes or (BUILTIN_CLASSES if builtin else IMAGENET_CLASSES)
    shape = {
        "codebook_size": params.tokenizer.codebook_size,
        "row_width": params.data.image_size // params.tokenizer.downsample,
    }
    tokens = shape["row_width"] ** 2
    patches = patches or patches_an_image(params, tokens)
    if not 1 <= patches <= tokens:
        raise ValueError(f"--patches {patches:g} must lie between 1 and the {tokens} tokens of an image")
    dpar = dpar_config(params.model, **shape, num_classes=classes)
    plain = {
        "llamagen": llamagen_config(params.model, **shape, num_classes=classes),
        "entropy_model": entropy_config(params.entropy_model, **shape),
    }
    models: dict[str, GPTShape] = {"dpar": dpar, **plain}
    forward = {"dpar": dpar_forward_flops(dpar, patches)}
    forward |= {name: gpt_forward_flops(config) for name, config in plain.items()}
    gate = forward["entropy_model"]
    trainings = {"dpar": params.train, "llamagen": params.train, "entropy_model": params.entropy_model.train}
    views = VIEW_COUNTS[params.data.views]
    gpu = published_memory(prices.gpu)
    priced = {}
    for name, config in models.items():
        training = trainings[name]
        total = training_flops(forward[name]) * training.steps * training.batch_size
        hours = prices.hours(total)
        memory = training_memory(
            config,
            patches if name == "dpar" else None,
            bf16=training.precision != "fp32",
            checkpointing=training.activation_checkpointing,
            shards=training.workers if training.strategy == "fsdp" else 1,
        )
        priced[name] = {
            "parameters": config.num_parameters,
            "forward_gflops": forward[name] / GIGA,
            "training_gflops_per_image": training_flops(forward[name]) / GIGA,
            "training_exaflops": total / 1e18,
            "epochs": training.steps * training.batch_size / images,
            "gpu_hours": hours,
            "price": hours * prices.price,
            "workers": training.workers,
            "hours_on_its_workers": hours / training.workers,
            **fitting(training, memory, gpu or 0.0),
            "checkpoint_gb": config.num_parameters * CHECKPOINT_BYTES / GIGA,
            "weights_gb": config.num_parameters * 4 / GIGA,
        }
    priced["dpar"] |= {
        "generation_gflops": forward["dpar"] / GIGA,
        "generation_gflops_with_entropy_model": (forward["dpar"] + gate) / GIGA,
        "generation_cfg_gflops": 2 * forward["dpar"] / GIGA,
        "generation_cfg_gflops_with_entropy_model": (2 * forward["dpar"] + gate) / GIGA,
        "training_exaflops_with_entropy_model": priced["dpar"]["training_exaflops"]
        + priced["entropy_model"]["training_exaflops"]
        + gate * images * views / 1e18,
        "saved_percent": 100 * (1 - forward["dpar"] / forward["llamagen"]),
    }
    baseline = forward["llamagen"] / GIGA
    priced["llamagen"] |= {"generation_gflops": baseline, "generation_cfg_gflops": 2 * baseline}
    priced["entropy_model"]["exaflops_for_all_views"] = gate * images * views / 1e18
    others = other_work(params, prices, views=images * views, gate=gate, forward=forward)
    hours = sum(one["gpu_hours"] for one in (*priced.values(), *others.values()))
    return {
        "tokens_per_image": tokens,
        "patches_per_image": patches,
        "training_images": images,
        "views": views,
        "models": priced,
        "other_work": others,
        "whole_run": {
            "gpu_hours": hours,
            "price": hours * prices.price,
            "workers": params.train.workers,
            "days_on_its_workers": hours / params.train.workers / 24,
        },
        "disk_gb": {name: size / GIGA for name, size in _disk_bytes(tokens, patches, images, views).items()},
        "prices": {
            "gpu": prices.gpu,
            "utilisation": prices.utilisation,
            "price_per_gpu_hour": prices.price,
            "currency": prices.currency,
            "memory_gb": None if gpu is None else gpu / GIGA,
        },
    }


def _disk_bytes(tokens: int, patches: float, images: int, views: int) -> dict[str, float]:
    """Sizes of the training split's artifacts. Shards are exact; Parquet is about its size before compression."""

    def member(size: int) -> int:  # a tar member: a header block, then whole blocks of 512 bytes
        return 512 + -(-size // 512) * 512

    sample = member(128 + 2 * views * tokens) + 2 * member(1)
    return {
        "token_shards": float(images * sample),
        "entropies": float(images * views * tokens * 4),
        "patch_maps": images * views * (tokens / 8 + patches / 4),
    }


_ROWS = [
    ("parameters", "parameters", ",.0f"),
    ("GFLOPs per image: forward", "forward_gflops", ",.2f"),
    ("  and the entropy model, to generate", "generation_gflops_with_entropy_model", ",.2f"),
    ("  forward and backward", "training_gflops_per_image", ",.2f"),
    ("  generation with cfg", "generation_cfg_gflops", ",.2f"),
    ("  and the entropy model, once", "generation_cfg_gflops_with_entropy_model", ",.2f"),
    ("training, EFLOPs", "training_exaflops", ",.4g"),
    ("  entropies of all views", "exaflops_for_all_views", ",.4g"),
    ("  with entropy model and entropies", "training_exaflops_with_entropy_model", ",.4g"),
    ("epochs", "epochs", ",.4g"),
    ("GPU-hours", "gpu_hours", ",.4g"),
    ("hours on its GPUs, one per worker", "hours_on_its_workers", ",.4g"),
    ("price", "price", ",.2f"),
    ("GB per worker: weights, AdamW", "state_gb_per_worker", ",.3g"),
    ("  activations, about", "activations_gb_per_worker", ",.3g"),
    ("  together", "memory_gb_per_worker", ",.3g"),
    ("images per worker at a time", "micro_batch", ",.0f"),
    ("  most that fit in its GPU", "largest_micro_batch", ",.0f"),
    ("GB of a checkpoint", "checkpoint_gb", ",.3g"),
]


def cost(
    preset: Annotated[str | None, typer.Argument(help="A preset of params/, or a params file; else params.yaml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    patches: Annotated[float | None, typer.Option(help="Patches per image, where they depend on the data.")] = None,
    images: Annotated[int | None, typer.Option(help="Training images; ImageNet's when left out.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes; ImageNet's when left out.")] = None,
    gpu: Annotated[str, typer.Option(help="GPU, as H200 or A100.")] = "A100",
    utilisation: Annotated[float, typer.Option(help="Share of the GPU's peak that training reaches.")] = 0.4,
    price: Annotated[float, typer.Option(help="Price of a GPU-hour.")] = 2.0,
    currency: Annotated[str, typer.Option(help="Currency of the price.")] = "USD",
) -> None:
    """Estimate what a preset costs before it is started.

    Reads a params file only. Prints parameters, FLOPs with and without the entropy model, memory, checkpoints, disk,
    GPU-hours and wall time for DPAR, its LlamaGen baseline and the entropy model, then the rest of a run: tokenizing,
    entropies, sampling, scoring. To go on: `dpar-cli params use PRESET`.
    """
    from stages.params import load_params

    params = load_params(_params_file(preset))
    estimate = costs(
        params, prices=Prices(gpu, utilisation, price, currency), patches=patches, images=images, classes=classes
    )
    print(json.dumps(estimate, indent=2, sort_keys=True) if as_json else _table(preset or "params.yaml", estimate))


def _params_file(preset: str | None) -> Path:
    if preset is None:
        return Path("params.yaml")
    if Path(preset).suffix == ".yaml":
        return Path(preset)
    from pipeline.presets.use import preset_file

    return preset_file(Path.cwd(), preset)


def _table(name: str, estimate: dict[str, Any]) -> str:
    """Lay the costs out for reading, for the terminal's width."""
    from pipeline.terminal import table, wrapped

    models, prices, disk, whole = estimate["models"], estimate["prices"], estimate["disk_gb"], estimate["whole_run"]
    order = ("dpar", "llamagen", "entropy_model")
    money = f"{prices['price_per_gpu_hour']:g} {prices['currency']}"
    lines = [
        wrapped(
            f"{name}: {estimate['tokens_per_image']} tokens and {estimate['patches_per_image']:.4g} patches per image, "
            f"{estimate['training_images']:,} images in {estimate['views']} views"
        ),
        wrapped(f"{prices['gpu']} at an assumed MFU of {prices['utilisation']:.0%} (share of its peak), {money} per hour"),
        "",
    ]
    rows = [
        [label.replace("price", f"price, {prices['currency']}"), *(_cell(models[one], key, form) for one in order)]
        for label, key, form in _ROWS
    ]
    lines += [table(("", "DPAR", "LlamaGen", "entropy model"), rows), ""]
    lines.append(wrapped(f"DPAR saves {models['dpar']['saved_percent']:.1f} % of its baseline's FLOPs."))
    if prices["memory_gb"] is not None:
        lines += [wrapped(_advice(one, models[one], prices), rest="  ") for one in order if _is_too_large(models[one])]
    rows = [
        [work, f"{one['images']:,}", f"{one['exaflops']:,.4g}", f"{one['gpu_hours']:,.4g}", f"{one['share_of_peak']:.1%}"]
        for work, one in estimate["other_work"].items()
    ]
    lines += ["", table(("beside training", "images", "EFLOPs", "GPU-hours", "of the peak"), rows)]
    days, workers = whole["days_on_its_workers"], whole["workers"]
    span = f"{days:,.3g} days" if days >= 1 else f"{24 * days:,.3g} hours"
    lines.append(
        wrapped(
            f"The whole run: {whole['gpu_hours']:,.4g} GPU-hours, {whole['price']:,.2f} {prices['currency']}, {span} on "
            f"{workers or 1} x {prices['gpu']}. Shares of the peak beside training were measured on one H200, for scoring "
            "assumed."
        )
    )
    sizes = [f"{key.replace('_', ' ')} {value:.4g}" for key, value in disk.items()]
    return "\n".join([*lines, wrapped(f"GB on disk: {', '.join(sizes)}")])


def _cell(model: dict[str, Any], key: str, form: str) -> str:
    return format(model[key], form) if key in model else ""


def _is_too_large(model: dict[str, Any]) -> bool:
    return bool(model["micro_batch"] > model["largest_micro_batch"])


def _advice(name: str, model: dict[str, Any], prices: dict[str, Any]) -> str:
    """Say how a model whose micro-batch does not fit can be trained.

    It is advice only: another number of micro-batches changes the dropout masks, so the run would be a different one.
    """
    section = "entropy_model.train" if name == "entropy_model" else "train"
    fits = model["accumulate_that_fits"]
    way_out = f"set {section}.accumulate to {fits}" if fits else f"set {section}.strategy to fsdp, or use more workers"
    return (
        f"{name.replace('_', ' ')}: {model['micro_batch']} images at a time need about "
        f"{model['memory_gb_per_worker']:.3g} GB of the {prices['memory_gb']:.3g} GB of {prices['gpu']}: {way_out}."
    )
