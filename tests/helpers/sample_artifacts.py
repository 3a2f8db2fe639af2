"""Artifacts of a tiny trained pipeline, made in a folder: tokenizer, entropy model, DPAR, baseline, patch rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dpar_core.files import load_weights, save_weights
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.vq import VQ, VQConfig
from dpar_core.patches.maps import MadeBy, write_rule
from dpar_core.patches.rule import PatchRule
from stages import params as P
from stages.shared.sampler import Files
from tests.helpers.paths import ROOT

CODES, GRID, CLASSES = 16, 4, 3


@dataclass(frozen=True)
class Artifacts:
    tokenizer: Path
    entropy_model: Path
    dpar: Path
    baseline: Path
    equal_time: Path
    rule: Path

    @property
    def dpar_files(self) -> Files:
        return Files(self.dpar, self.tokenizer, self.entropy_model, self.rule)


@torch.no_grad()
def _random(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(parameter.mean() + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


def write_artifacts(folder: Path, *, gate_trained_on: str | None = None, dpar_meta: dict | None = None) -> Artifacts:
    """Write all files; gate_trained_on: digest that the entropy model claims as its tokenizer's. dpar_meta: of DPAR too."""
    vq = VQConfig(CODES, 4, 32, (1, 2), 32, 1)
    tokenizer = save_weights(
        folder / "tokenizer.safetensors", _random(VQ(vq), 1), kind="vq", config=asdict(vq), meta={"image_size": 8}
    )
    meta = {"tokenizer": tokenizer, "classes": ["ape", "bee", "cow"]}

    def save(name: str, model: torch.nn.Module, kind: str, seed: int, meta: dict) -> Path:
        save_weights(folder / name, _random(model, seed), kind=kind, config=asdict(model.config), meta=meta)
        return folder / name

    gate = GPT(GPTConfig(CODES, GRID, 16, 1, 1, ffn_multiple=16))
    baseline = GPTConfig(CODES, GRID, 32, 2, 3, ffn_multiple=32, num_classes=CLASSES)
    dpar = DPAR(DPARConfig(CODES, GRID, 32, 2, 1, 1, 1, CLASSES, 32))
    gate_file = save("gate.safetensors", gate, "gpt", 2, {"tokenizer": gate_trained_on or tokenizer})
    made_by = MadeBy("0" * 16, load_weights(gate_file, kind="gpt").digest)
    write_rule(folder / "rule.json", PatchRule("entropy_rows", GRID, 1.8, 4), made_by=made_by)
    return Artifacts(
        folder / "tokenizer.safetensors",
        gate_file,
        save("dpar.safetensors", dpar, "dpar", 3, {**meta, **(dpar_meta or {})}),
        save("baseline.safetensors", GPT(baseline), "gpt", 4, meta),
        save("equal_time.safetensors", GPT(baseline), "gpt", 5, meta),
        folder / "rule.json",
    )


def sample_section(**changes) -> P.Sample:
    """The sample section of the default params, with some values changed."""
    section = P.load_params(ROOT / "params.yaml").sample.model_dump()
    return P.Sample.model_validate({**section, "images": 11, "batch_size": 4, **changes})
