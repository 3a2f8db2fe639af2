"""What a run costs before it is started: parameters, FLOPs, memory, disk, GPU-hours.

N tokens and M patches per image. Training costs three forward passes; numbers are those of the paper's own accounting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpar_core.choices import READ_ENTROPIES

if TYPE_CHECKING:
    from dpar_core.models.configs import DPARConfig, GPTConfig
    from stages.params import Params, Patching

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


@dataclass(frozen=True)
class ModelCost:
    """What training and running one model takes; FLOPs without a duration are of one image.

    workers: GPUs that train it together.
    state_gb_per_worker: of weights, gradients and AdamW's moments.
    fixed_gb_per_worker: of logits, and of the GPU's runtime, whatever the model.
    micro_batch, largest_micro_batch: images at a time on a worker, as set and as fit in its memory.
    accumulate_that_fits: None where no number of micro-batches fits: another strategy, or a smaller batch.
    The fields that default to None are given for the models that they concern.
    """

    parameters: int
    forward_gflops: float
    training_gflops_per_image: float
    training_exaflops: float
    epochs: float
    gpu_hours: float
    price: float
    workers: int
    hours_on_its_workers: float
    state_gb_per_worker: float
    fixed_gb_per_worker: float
    activations_gb_per_worker: float
    memory_gb_per_worker: float
    micro_batch: int
    largest_micro_batch: int
    accumulate: int
    accumulate_that_fits: int | None
    checkpoint_gb: float
    weights_gb: float
    generation_gflops: float | None = None
    generation_gflops_with_entropy_model: float | None = None
    generation_cfg_gflops: float | None = None
    generation_cfg_gflops_with_entropy_model: float | None = None
    generation_cfg_gflops_encoder_once: float | None = None
    training_exaflops_with_entropy_model: float | None = None
    saved_percent: float | None = None
    exaflops_for_all_views: float | None = None


@dataclass(frozen=True)
class WorkCost:
    """What a part of a run beside training takes. share_of_peak: of the GPU, that it reaches."""

    images: float
    exaflops: float
    share_of_peak: float
    gpu_hours: float


@dataclass(frozen=True)
class WholeRun:
    """What all of a run takes. days_on_its_workers: as if all of it ran on the GPUs that train DPAR."""

    gpu_hours: float
    price: float
    workers: int
    days_on_its_workers: float


@dataclass(frozen=True)
class CostEstimate:
    """What `dpar-cli cost` prints: models and other work by name, disk space by artifact. memory_gb: of a known GPU."""

    tokens_per_image: int
    patches_per_image: float
    training_images: int
    views: int
    models: dict[str, ModelCost]
    other_work: dict[str, WorkCost]
    whole_run: WholeRun
    disk_gb: dict[str, float]
    prices: Prices
    memory_gb: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as JSON data, without the fields that do not concern a model."""
        optional = {one.name for one in fields(ModelCost) if one.default is None}
        content = asdict(self)
        for model in content["models"].values():
            for name in optional & {name for name, value in model.items() if value is None}:
                del model[name]
        prices = content["prices"]
        content["prices"] = {
            "gpu": prices["gpu"],
            "utilisation": prices["utilisation"],
            "price_per_gpu_hour": prices["price"],
            "currency": prices["currency"],
            "memory_gb": content.pop("memory_gb"),
        }
        return content


def patches_an_image(patching: Patching, tokens: int) -> float:
    """Return M for the patching section of params. Raises ValueError where M depends on the data."""
    if patching.mode not in READ_ENTROPIES:
        import numpy as np

        from dpar_core.patches.rule import PatchRule, patch_starts_numpy

        row = math.isqrt(tokens)
        rule = PatchRule(patching.mode, row, None, patching.max_patch_length, patching.static_length)
        return int(patch_starts_numpy(np.zeros((1, tokens), np.float32), rule).sum())
    if patching.target_mean_length is not None:
        return tokens / patching.target_mean_length
    from pipeline.presets.published import PATCHES

    published = None if patching.threshold is None else PATCHES.get((tokens, patching.threshold))
    if published and patching.mode == "entropy_rows" and patching.max_patch_length == 4:
        return published
    raise ValueError(
        f"how many patches threshold {patching.threshold} leaves of {tokens} tokens depends on the data: give --patches "
        "(`dpar-cli patches stats` counts them from stored entropies)"
    )


def other_work(
    params: Params, prices: Prices, *, views: float, gate: float, asked: float, sampled: Mapping[str, float]
) -> dict[str, WorkCost]:
    """Return what a whole run does besides training DPAR, its baseline and the entropy model.

    views: encoded views of the training images.
    gate: FLOPs of one image through the entropy model.
    asked: the same where it is asked while sampling, else 0.
    sampled: FLOPs of sampling one image from each model, with guidance and without the entropy model.
    The baseline is sampled twice, at equal steps and at equal training time.
    """
    from dpar_core.models.flops import vq_flops
    from stages.shared.configs import vq_config

    encode, decode = vq_flops(vq_config(params.tokenizer), params.data.image_size)
    images = params.sample.images
    trained = 0 if params.tokenizer.weights else params.tokenizer.steps * params.tokenizer.batch_size
    each = sampled["dpar"] + 2 * sampled["llamagen"] + asked + 3 * decode
    exact = "entropies in fp32" if params.entropies.precision == "fp32" else "entropies"
    work = {
        "training the tokenizer": (trained, 3 * (encode + decode) * trained, prices.utilisation),
        "tokenizing": (views, encode * views, SHARES["tokenizing"]),
        "entropies": (views, gate * views, SHARES[exact]),
        "sampling": (3 * images, each * images, SHARES["sampling"]),
    }
    if params.score.features == "inception":
        work["scoring"] = (3 * images, INCEPTION_FLOPS * 3 * images, SHARES["scoring"])
    return {
        name: WorkCost(count, total / 1e18, share, prices.hours(total, share))
        for name, (count, total, share) in work.items()
        if count
    }


def costs(
    params: Params, *, prices: Prices, patches: float | None = None, images: int | None = None, classes: int | None = None
) -> CostEstimate:
    """Return what a run costs.

    params: the whole of a params file.
    patches, images, classes: M, training images and classes where the defaults (published or measured M; ImageNet's, or the
        built-in photographs') do not fit. Raises ValueError where the params name other data and they are not given.
    """
    from dpar_core.data.images import VIEW_COUNTS
    from dpar_core.models.flops import (
        dpar_forward_flops,
        dpar_parts,
        gpt_forward_flops,
        guidance_passes,
        published_memory,
        training_flops,
    )
    from dpar_core.models.memory import training_memory
    from stages.shared.configs import dpar_config, entropy_config, llamagen_config

    builtin = params.data.source == "builtin"
    if not builtin and params.data.classes != "imagenet" and None in (images, classes):
        raise ValueError(
            "how many images and classes data.train has is known once stage data ran in this project (`dpar-cli run data`): "
            "give --images and --classes"
        )
    images = images or (params.data.builtin.train_crops if builtin else IMAGENET_IMAGES)
    classes = classes or (BUILTIN_CLASSES if builtin else IMAGENET_CLASSES)
    shape = {
        "codebook_size": params.tokenizer.codebook_size,
        "row_width": params.data.image_size // params.tokenizer.downsample,
    }
    tokens = shape["row_width"] ** 2
    patches = patches or patches_an_image(params.patching, tokens)
    if not 1 <= patches <= tokens:
        raise ValueError(f"--patches {patches:g} must lie between 1 and the {tokens} tokens of an image")
    dpar = dpar_config(params.model, **shape, num_classes=classes)
    plain = {
        "llamagen": llamagen_config(params.model, **shape, num_classes=classes),
        "entropy_model": entropy_config(params.entropy_model, **shape),
    }
    models: dict[str, DPARConfig | GPTConfig] = {"dpar": dpar, **plain}
    forward = {"dpar": dpar_forward_flops(dpar, patches)}
    forward |= {name: gpt_forward_flops(config) for name, config in plain.items()}
    gate = forward["entropy_model"]
    how, reads = params.sample, params.patching.mode in READ_ENTROPIES
    asked = gate if reads and how.gate == "entropy_model" else None
    passes = guidance_passes(how.cfg_scale, how.cfg_schedule, how.cfg_interval, tokens=tokens)
    again = 0.0
    if (
        how.gate == "decoder" and params.patching.mode in READ_ENTROPIES
    ):  # at most: patches cut for their length are not asked
        rows = shape["row_width"] - 1 if params.patching.mode == "entropy_rows" else 0
        again = max(patches - 2 - rows, 0)
    guided = sum(dpar_parts(dpar, patches, passes=2, again=again).values())
    sampled = {
        "dpar": sum(dpar_parts(dpar, patches, passes=passes, again=again).values()),
        "llamagen": passes * forward["llamagen"],
    }
    trainings = {"dpar": params.train, "llamagen": params.train, "entropy_model": params.entropy_model.train}
    trained = {
        name: training_flops(forward[name]) * training.steps * training.batch_size for name, training in trainings.items()
    }
    views = VIEW_COUNTS[params.data.views]
    gpu = published_memory(prices.gpu)
    only: dict[str, dict[str, float | None]] = {
        "dpar": {
            "generation_gflops": forward["dpar"] / GIGA,
            "generation_gflops_with_entropy_model": None if asked is None else (forward["dpar"] + asked) / GIGA,
            # As published counts have it, the whole model twice; then as generate.py runs it.
            "generation_cfg_gflops": 2 * forward["dpar"] / GIGA,
            "generation_cfg_gflops_with_entropy_model": None if asked is None else (2 * forward["dpar"] + asked) / GIGA,
            "generation_cfg_gflops_encoder_once": (guided + (asked or 0.0)) / GIGA,
            "training_exaflops_with_entropy_model": trained["dpar"] / 1e18
            + trained["entropy_model"] / 1e18
            + gate * images * views / 1e18,
            "saved_percent": 100 * (1 - forward["dpar"] / forward["llamagen"]),
        },
        "llamagen": {
            "generation_gflops": forward["llamagen"] / GIGA,
            "generation_cfg_gflops": 2 * forward["llamagen"] / GIGA,
        },
        "entropy_model": {"exaflops_for_all_views": gate * images * views / 1e18},
    }
    priced = {}
    for name, config in models.items():
        training, hours = trainings[name], prices.hours(trained[name])
        memory = training_memory(
            config,
            patches if name == "dpar" else None,
            bf16=training.precision != "fp32",
            checkpointing=training.activation_checkpointing,
            shards=training.workers if training.strategy == "fsdp" else 1,
        )
        share = training.batch_size // training.workers
        micro_batch = share // training.accumulate
        priced[name] = ModelCost(
            parameters=config.num_parameters,
            forward_gflops=forward[name] / GIGA,
            training_gflops_per_image=training_flops(forward[name]) / GIGA,
            training_exaflops=trained[name] / 1e18,
            epochs=training.steps * training.batch_size / images,
            gpu_hours=hours,
            price=hours * prices.price,
            workers=training.workers,
            hours_on_its_workers=hours / training.workers,
            state_gb_per_worker=memory.state / GIGA,
            fixed_gb_per_worker=(memory.fixed + memory.loss) / GIGA,
            activations_gb_per_worker=micro_batch * memory.activations / GIGA,
            memory_gb_per_worker=memory.total(micro_batch) / GIGA,
            micro_batch=micro_batch,
            largest_micro_batch=memory.largest_batch(gpu or 0.0),
            accumulate=training.accumulate,
            accumulate_that_fits=memory.micro_batches(share, gpu or 0.0, at_least=training.accumulate),
            checkpoint_gb=config.num_parameters * CHECKPOINT_BYTES / GIGA,
            weights_gb=config.num_parameters * 4 / GIGA,
            **only[name],
        )
    others = other_work(params, prices, views=images * views, gate=gate, asked=asked or 0.0, sampled=sampled)
    hours = sum(one.gpu_hours for one in priced.values()) + sum(one.gpu_hours for one in others.values())
    workers = params.train.workers
    return CostEstimate(
        tokens,
        patches,
        images,
        views,
        models=priced,
        other_work=others,
        whole_run=WholeRun(hours, hours * prices.price, workers, hours / workers / 24),
        disk_gb={name: size / GIGA for name, size in _disk_bytes(tokens, patches, images, views).items()},
        prices=prices,
        memory_gb=None if gpu is None else gpu / GIGA,
    )


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
    ("  and the patch encoder, once", "generation_cfg_gflops_encoder_once", ",.2f"),
    ("training, EFLOPs", "training_exaflops", ",.4g"),
    ("  entropies of all views", "exaflops_for_all_views", ",.4g"),
    ("  with entropy model and entropies", "training_exaflops_with_entropy_model", ",.4g"),
    ("epochs", "epochs", ",.4g"),
    ("GPU-hours", "gpu_hours", ",.4g"),
    ("hours on its GPUs, one per worker", "hours_on_its_workers", ",.4g"),
    ("price", "price", ",.2f"),
    ("GB per worker: weights, AdamW", "state_gb_per_worker", ",.3g"),
    ("  logits, the GPU's runtime", "fixed_gb_per_worker", ",.3g"),
    ("  activations, about", "activations_gb_per_worker", ",.3g"),
    ("  together", "memory_gb_per_worker", ",.3g"),
    ("images per worker at a time", "micro_batch", ",.0f"),
    ("  most that fit in its GPU", "largest_micro_batch", ",.0f"),
    ("GB of a checkpoint", "checkpoint_gb", ",.3g"),
]


def cost(
    preset: Annotated[str | None, typer.Argument(help="A preset of params/, or a params file; else params.yaml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    patches: Annotated[float | None, typer.Option(min=1, help="Patches per image, where they depend on the data.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Training images; else stage data's, or ImageNet's.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes; else stage data's, or ImageNet's.")] = None,
    gpu: Annotated[str, typer.Option(help="GPU, as H200 or A100.")] = "A100",
    utilisation: Annotated[float, typer.Option(help="Share of the GPU's peak that training reaches.")] = 0.4,
    price: Annotated[float, typer.Option(min=0, help="Price of a GPU-hour.")] = 2.0,
    currency: Annotated[str, typer.Option(help="Currency of the price.")] = "USD",
) -> None:
    """Estimate what a preset costs before it is started.

    Reads a params file, and of params.yaml's images what stage data listed. Prints parameters, FLOPs with and without the
    entropy model, memory, checkpoints, disk, GPU-hours and wall time for DPAR, its LlamaGen baseline and the entropy model,
    then the rest of a run: tokenizing, entropies, sampling, scoring. Next: `dpar-cli params use PRESET`.

        dpar-cli cost imagenet256-dpar-l --gpu H100 --price 2.5
    """
    from stages.artifacts import MANIFEST
    from stages.params import load_params

    if not 1 <= len(currency) <= 8 or not currency.isprintable():
        raise ValueError(f"--currency has {len(currency)} characters, expected a short name, as EUR")
    params = load_params(_params_file(preset))
    if preset is None and params.data.train is not None and Path(MANIFEST.path).exists():
        from dpar_core.data.manifest import read_manifest

        manifest = read_manifest(Path(MANIFEST.path))
        if manifest.roots.get("train") == str(Path(params.data.train)):  # else of other data, as of the preset before
            images, classes = images or len(manifest.split("train")), classes or len(manifest.classes)
    estimate = costs(
        params, prices=Prices(gpu, utilisation, price, currency), patches=patches, images=images, classes=classes
    )
    print(json.dumps(estimate.to_json(), indent=2, sort_keys=True) if as_json else _table(preset or "params.yaml", estimate))


def _params_file(preset: str | None) -> Path:
    if preset is None:
        return Path("params.yaml")
    if Path(preset).suffix == ".yaml":
        return Path(preset)
    from pipeline.presets.use import preset_file

    return preset_file(Path.cwd(), preset)


def _table(name: str, estimate: CostEstimate) -> str:
    """Lay the costs out for reading, for the terminal's width."""
    from stages.terminal import table, wrapped

    models, prices, whole = estimate.models, estimate.prices, estimate.whole_run
    order = ("dpar", "llamagen", "entropy_model")
    money = f"{prices.price:g} {prices.currency}"
    lines = [
        wrapped(
            f"{name}: {estimate.tokens_per_image} tokens and {estimate.patches_per_image:.4g} patches per image, "
            f"{estimate.training_images:,} images in {estimate.views} views"
        ),
        wrapped(f"{prices.gpu} at an assumed MFU of {100 * prices.utilisation:.0f} % (share of its peak), {money} per hour"),
        "",
    ]
    rows = [
        [label.replace("price", f"price, {prices.currency}"), *(_cell(getattr(models[one], key), form) for one in order)]
        for label, key, form in _ROWS
        if any(getattr(models[one], key) is not None for one in order)
    ]
    lines += [table(("", "DPAR", "LlamaGen", "entropy model"), rows), ""]
    lines.append(wrapped(f"DPAR saves {models['dpar'].saved_percent:.1f} % of its baseline's FLOPs."))
    if estimate.memory_gb is not None:
        large = [one for one in order if models[one].micro_batch > models[one].largest_micro_batch]
        lines += [
            wrapped(_advice(one, models[one], f"{estimate.memory_gb:.3g} GB of {prices.gpu}"), rest="  ") for one in large
        ]
    rows = [
        [
            work,
            f"{one.images:,}",
            _cell(one.exaflops, ",.4g"),
            _cell(one.gpu_hours, ",.4g"),
            f"{100 * one.share_of_peak:.1f} %",
        ]
        for work, one in estimate.other_work.items()
    ]
    lines += ["", table(("beside training", "images", "EFLOPs", "GPU-hours", "of the peak"), rows)]
    days, workers = whole.days_on_its_workers, whole.workers
    span = f"{days:,.3g} days" if days >= 1 else f"{_cell(24 * days, ',.3g')} hours"
    lines.append(
        wrapped(
            f"The whole run: {_cell(whole.gpu_hours, ',.4g')} GPU-hours, {whole.price:,.2f} {prices.currency}, {span} on "
            f"{workers or 1} x {prices.gpu}. Shares of the peak beside training were measured on one H200, for scoring "
            "assumed."
        )
    )
    sizes = [f"{key.replace('_', ' ')} {_cell(value, ',.4g')}" for key, value in estimate.disk_gb.items()]
    return "\n".join([*lines, wrapped(f"GB on disk: {', '.join(sizes)}")])


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return "<0.001" if form.endswith("g") and 0 < value < 0.001 else format(value, form)


def _advice(name: str, model: ModelCost, memory: str) -> str:
    """Say how a model whose micro-batch does not fit can be trained.

    It is advice only: another number of micro-batches changes the dropout masks, so the run would be a different one.
    """
    section = "entropy_model.train" if name == "entropy_model" else "train"
    fits = model.accumulate_that_fits
    way_out = f"set {section}.accumulate to {fits}" if fits else f"set {section}.strategy to fsdp, or use more workers"
    return (
        f"{name.replace('_', ' ')}: {model.micro_batch} images at a time need about "
        f"{model.memory_gb_per_worker:.3g} GB of the {memory}: {way_out}."
    )
