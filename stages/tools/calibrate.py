"""Calibration: a published LlamaGen checkpoint sampled and scored here, its scores set beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dpar_core.files import save_weights, sha256_file
from dpar_core.models.published import read_gpt, read_vq
from dpar_core.models.sizes import MODEL_SIZES
from dpar_core.models.vq import config_of
from stages.shared.sampler import Files

ABSOLUTE = ("eval/precision", "eval/recall")


@dataclass(frozen=True)
class ScoreCheck:
    """A score against its published value. tolerance: in the score's own unit."""

    name: str
    expected: float
    got: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return abs(self.got - self.expected) <= self.tolerance


def import_checkpoint(gpt: Path, vq: Path, *, size: str, heads: int, grid: int, folder: Path) -> Files:
    """Write published weights as files that the sampler reads, once for each pair of them; return these.

    gpt: class-conditional LlamaGen weights.
    vq: its tokenizer's.
    size: whose width and layers they must have, where it is one of MODEL_SIZES: heads do not follow from weights, so those
        of another size, or with layers missing at the end, would be read as well.
    Raises ValueError when names or shapes do not fit.
    """
    state, config = read_gpt(gpt, heads=heads, row_width=grid)
    if config.num_classes is None:
        raise ValueError(f"{gpt} has no class table: give class-conditional weights of LlamaGen")
    known = MODEL_SIZES.get(size)
    if known is not None and (config.width, config.layers) != (known.width, known.layers):
        raise ValueError(
            f"{gpt} has width {config.width} and {config.layers} layers, LlamaGen-{size} has {known.width} and "
            f"{known.layers}: give --size of these weights, or fetch the file again"
        )
    digests = {"gpt": sha256_file(gpt)[:16], "vq": sha256_file(vq)[:16]}
    cell = folder / f"{digests['gpt']}-{digests['vq']}"
    cell.mkdir(parents=True, exist_ok=True)
    files = Files(cell / "model.safetensors", cell / "tokenizer.safetensors")
    tokens = read_vq(vq)
    shape = config_of(tokens)
    if shape.codebook_size != config.codebook_size:
        raise ValueError(f"{gpt} predicts {config.codebook_size} codes, {vq} has {shape.codebook_size}: they are not a pair")
    tokenizer = save_weights(files.tokenizer, tokens, kind="vq", config=asdict(shape), meta={"published": digests["vq"]})
    meta = {"tokenizer": tokenizer, "classes": [], "published": digests["gpt"]}
    save_weights(files.model, state, kind="gpt", config=asdict(replace(config, dropout=0.0)), meta=meta)
    return files


def checks(scores: Mapping[str, float], expected: Mapping[str, float], *, tolerance: float) -> list[ScoreCheck]:
    """Set scores beside published ones.

    tolerance: share of the published value for distances and IS; precision and recall may differ by 0.01 times as many
    twentieths (0.05 -> 0.01). Raises ValueError when one of them was not measured.
    """
    missing = [name.removeprefix("eval/") for name in expected if name not in scores]
    if missing:
        measured = ", ".join(name.removeprefix("eval/") for name in scores)
        raise ValueError(
            f"{', '.join(missing)} {'was' if len(missing) == 1 else 'were'} not measured, but {measured}: calibrate with "
            "the features those were published for and a reference that holds images, or name what to expect with --expect"
        )
    return [
        ScoreCheck(name, value, scores[name], 0.2 * tolerance if name in ABSOLUTE else tolerance * value)
        for name, value in expected.items()
    ]
