"""`dpar-cli sample`: a few pictures for a person who wants to see them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from dpar_core.data.images import BadImage, center_crop, decode_image
from dpar_core.files import atomic_path
from dpar_core.models.vq import to_float
from dpar_core.pictures import draw_borders, enlarge, labelled_grid, save_png
from stages import artifacts
from stages import params as P
from stages.sample import check_memory
from stages.shared.sampler import Files, Sampler


def files_of(model: str, root: Path) -> Files:
    """Return the artifacts that a model ("dpar", "llamagen") is sampled with. Raises ValueError, FileNotFoundError.

    root: the project's folder.
    """
    if model not in STAGES:
        raise ValueError(f"--model is {model!r}, expected dpar or llamagen")
    wanted = [artifacts.MODELS[model], artifacts.TOKENIZER]
    if model == "dpar":
        wanted += [artifacts.ENTROPY_MODEL, artifacts.PATCH_RULE]
    return Files(*(one.require(root / artifacts.FOLDER) for one in wanted))


STAGES = {"dpar": "train_dpar", "llamagen": "train_llamagen"}
CELL = 192  # pixels, least side of a picture in the grid
MOST = 256  # pictures in one grid


def sample_grid(
    classes: str,
    seed: int,
    out: Path,
    *,
    model: str,
    count: int,
    cfg_scale: float | None,
    borders: bool,
    given: Path | None,
    keep_rows: int,
    root: Path,
    params_file: Path,
) -> str:
    """Sample `count` images of each class into one PNG and return a line that describes it.

    classes: ids or names, separated by commas.
    borders: draw the patches (DPAR).
    given, keep_rows: an image file whose centre crop keeps its first token rows.
    Raises ValueError or FileNotFoundError in a sentence.
    """
    if model not in STAGES:
        raise ValueError(f"--model is {model!r}, expected dpar or llamagen")
    if count < 1 or seed < 0:
        raise ValueError(f"--count must be at least 1 and --seed at least 0; got {count} and {seed}")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out is {out}, expected a name that ends in .png")
    if borders and model != "dpar":
        raise ValueError("--borders shows patches, and the LlamaGen baseline has none: use --model dpar")
    params = P.load_params(params_file)
    section, device = params.sample, params.compute.device
    if cfg_scale is not None:
        if fault := P.guidance_fault(params.model, cfg_scale):
            raise ValueError(fault)
        section = section.model_copy(update={"cfg_scale": cfg_scale})
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if params.compute.threads:
        torch.set_num_threads(params.compute.threads)
    section = P.settled(section, device)
    files = files_of(model, root)
    with ExitStack() as stack:
        try:
            temporary = stack.enter_context(atomic_path(out))  # now, so that nobody waits for what cannot be written
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from None
        sampler = Sampler(files, section, device=device)
        chosen = [class_id(name, sampler.class_names) for name in classes.split(",")]
        labels = [label for label in chosen for _ in range(count)]
        if len(labels) > MOST:
            raise ValueError(
                f"--classes and --count ask for {len(labels)} pictures, a grid shows at most {MOST}: for more, set "
                "sample.images in params.yaml and run `dpar-cli run sample_dpar sample_llamagen`"
            )
        check_memory(sampler, len(labels), way_out="ask for {} or fewer with --classes and --count")
        rows = _given_tokens(sampler, given, keep_rows) if given is not None or keep_rows else None
        started = time.perf_counter()
        sampled = sampler.generate(
            labels, [seed + i for i in range(len(labels))], given=None if rows is None else rows.repeat(len(labels), 1)
        )
        seconds = time.perf_counter() - started
        images = sampler.pixels(sampled.tokens)
        side = images.shape[1] * max(-(-CELL // images.shape[1]), 1)
        if borders:
            width = sampler.config.row_width
            pictures = [np.asarray(draw_borders(i, n, width, side=side)) for i, n in zip(images, sampled.patch_lengths)]
        else:
            pictures = [enlarge(image, side // images.shape[1]) for image in images]
        grid = [np.stack(pictures[i : i + count]) for i in range(0, len(pictures), count)]
        title = f"{model}, seed {seed}, cfg {section.cfg_scale:g}" + (f", first {keep_rows} rows given" if given else "")
        save_png(labelled_grid(grid, [sampler.class_names[c] for c in chosen], title=title), temporary)
    patches = ""
    if sampled.patch_lengths:
        patches = f", {np.mean([len(one) for one in sampled.patch_lengths]):.0f} patches per image"
    tokens = sampler.config.tokens
    return f"{out}: {len(labels)} images of {tokens} tokens{patches}, {len(labels) / seconds:.2f} images/s"


def class_id(name: str, names: list[str]) -> int:
    """Return the class that an id or a name means. Raises ValueError in a sentence."""
    name = name.strip()
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    known = ", ".join(f"{i} {one}" for i, one in enumerate(names[:12])) + (", ..." if len(names) > 12 else "")
    raise ValueError(f"class {name!r} does not exist: the model knows 0 to {len(names) - 1} ({known})")


def _given_tokens(sampler: Sampler, given: Path | None, keep_rows: int) -> torch.Tensor:
    """Encode an image and return the tokens of its first rows: (1, keep_rows * G) int64."""
    width, size = sampler.config.row_width, sampler.image_size
    if given is None:
        raise ValueError("--keep-rows is the part of an image to keep: name the image with --given")
    if not 1 <= keep_rows < width:
        raise ValueError(f"--keep-rows is {keep_rows}, expected 1 to {width - 1}: the image has {width} rows of tokens")
    if not given.exists():
        raise FileNotFoundError(f"no image at {given}")
    try:
        crop = center_crop(decode_image(given.read_bytes()), size)
    except BadImage as error:
        raise ValueError(f"{given} cannot be read: {error}") from None
    with torch.inference_mode():
        codes = sampler.vq.encode(to_float(torch.from_numpy(np.stack([crop]))).to(sampler.device))
    return codes.flatten(1)[:, : keep_rows * width].cpu()
