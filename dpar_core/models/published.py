"""Published checkpoints in: LlamaGen's GPT and VQ weights, and DPAR weights under the authors' names.

Our parameter names are theirs, so reading is a check of names and shapes, not a translation.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpar_core.choices import PositionEncoding
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.vq import VQ, VQConfig, config_of
from dpar_core.models.weights import read_checkpoint


def read_state(path: Path | str, *, holder: str | None = None) -> dict[str, Tensor]:
    """Read tensors by name, as `read_checkpoint` does; warns where one of several sets of weights was taken.

    Raises FileNotFoundError, ValueError in one sentence.
    """
    found = read_checkpoint(path, holder=holder)
    if found.note is not None and holder is None:
        warnings.warn(f"{path} {found.note}", stacklevel=3)
    return found.state


def check_state(state: Mapping[str, Tensor], model: nn.Module, *, what: str) -> None:
    """Raise ValueError, listing all that is missing, strange or of another shape, unless `state` fits the model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    both = expected.keys() & found.keys()
    parts = [
        ("missing", sorted(expected.keys() - found.keys())),
        ("unknown", sorted(found.keys() - expected.keys())),
        ("of another shape", [f"{n} {found[n]} for {expected[n]}" for n in sorted(both) if found[n] != expected[n]]),
    ]
    wrong = [f"{len(n)} {word} ({', '.join(n[:3])}{', ...' if len(n) > 3 else ''})" for word, n in parts if n]
    if wrong:
        raise ValueError(f"{what} does not fit the expected network: {'; '.join(wrong)}")


def _refuse_zeros(state: Mapping[str, Tensor], path: Path | str) -> None:
    """Raise ValueError for matrices and convolutions of zeros alone, as a network has that was not trained or not saved."""
    zeros = [name for name, tensor in state.items() if tensor.ndim > 1 and not tensor.any()]
    if zeros:
        raise ValueError(
            f"{path} holds nothing but zeros in {len(zeros)} of its weights ({', '.join(zeros[:3])}"
            f"{', ...' if len(zeros) > 3 else ''}): it was not trained, or not saved whole; take another checkpoint"
        )


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(match[1]) for match in map(pattern.match, state) if match), default=-1)


def _common(state: Mapping[str, Tensor], path: Path | str, *, heads: int, row_width: int) -> dict[str, Any]:
    what = f"{path} holds no weights of a GPT or DPAR"
    try:
        codebook_size, width = state["tok_embeddings.weight"].shape
        hidden = state["layers.0.feed_forward.w1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{what}: {error} is missing among {', '.join(sorted(state)[:3])}, ...") from None
    except (ValueError, IndexError):
        raise ValueError(f"{what}: tables and matrices have two dimensions there") from None
    table = state.get("cls_embedding.embedding_table.weight")
    if table is not None and len(table) < 2:
        raise ValueError(f"{path} has a class table of {tuple(table.shape)}: expected a row per class and one for no class")
    if width % heads:
        raise ValueError(
            f"{path}: {heads} attention heads do not divide the width of {width}: give the number this model has"
        )
    rounded = {multiple for multiple in (256, 128, 64, 32) if multiple * -(-int(8 * width / 3) // multiple) == hidden}
    if not rounded:
        raise ValueError(f"{path}: FFN width {hidden} is not int(8 x {width} / 3) rounded up to 256, 128, 64 or 32")
    shape = {"codebook_size": codebook_size, "row_width": row_width, "width": width, "heads": heads}
    return {**shape, "ffn_multiple": max(rounded)}


def read_gpt(path: Path | str, *, heads: int, row_width: int) -> tuple[dict[str, Tensor], GPTConfig]:
    """Read a LlamaGen GPT; its shape is inferred except for heads and grid, which do not follow from weights.

    Without a class table it is an unconditional one (an entropy model). Raises ValueError when names or shapes differ.
    """
    state = read_state(path)
    table = state.get("cls_embedding.embedding_table.weight")
    classes = None if table is None else table.shape[0] - 1
    common = _common(state, path, heads=heads, row_width=row_width)
    config = GPTConfig(**common, layers=_layers(state, "layers."), num_classes=classes)
    with torch.device("meta"):
        check_state(state, GPT(config), what=str(path))
    _refuse_zeros(state, path)
    return state, config


def read_dpar(
    path: Path | str, *, heads: int, row_width: int, position_encoding: PositionEncoding = "4d"
) -> tuple[dict[str, Tensor], DPARConfig]:
    """Read DPAR weights; weights do not hold position_encoding either. Raises ValueError when names or shapes differ."""
    state = read_state(path)
    table = state.get("cls_embedding.embedding_table.weight")
    if table is None or "decoder_start_embedding.weight" not in state:
        raise ValueError(f"{path} holds no DPAR: class table or decoder_start_embedding is missing")
    config = DPARConfig(
        **_common(state, path, heads=heads, row_width=row_width),
        encoder_layers=_layers(state, "local_encoder.layers."),
        patch_layers=_layers(state, "layers."),
        decoder_layers=_layers(state, "local_decoder.layers."),
        num_classes=table.shape[0] - 1,
        position_encoding=position_encoding,
    )
    with torch.device("meta"):
        check_state(state, DPAR(config), what=str(path))
    _refuse_zeros(state, path)
    return state, config


def read_vq(path: Path | str, *, expected: VQConfig | None = None, holder: str | None = None) -> dict[str, Tensor]:
    """Read LlamaGen VQ weights. Raises ValueError when they differ from `expected` or belong to another network.

    holder: the key to read where there are several sets of weights.
    """
    state = read_state(path, holder=holder)
    try:
        config = config_of(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    table = state["quantize.embedding.weight"]
    if (table == table[:1]).all():
        raise ValueError(
            f"{path} holds one code {len(table):,} times, so it is not a trained tokenizer: take another checkpoint"
        )
    if expected is not None:
        names: tuple[str, ...] = (
            "codebook_size",
            "codebook_dim",
            "base_width",
            "channel_multipliers",
            "z_channels",
            "residual_blocks",
        )
        names += ("norm_groups",)  # weights do not determine it: LlamaGen's are 32, and others would load and decode wrongly
        wrong = [
            f"tokenizer.{name} is {getattr(expected, name)} but the weights have {getattr(config, name)}"
            for name in names
            if getattr(expected, name) != getattr(config, name)
        ]
        if wrong:
            raise ValueError(f"{path} is another tokenizer than params.yaml describes: {'; '.join(wrong)}")
    with torch.device("meta"):
        check_state(state, VQ(config), what=str(path))
    _refuse_zeros(state, path)
    return state
