"""A tiny data set and models with random weights: a folder of images, 16 codes, a 4 x 4 grid; every stage up to maps."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ruamel.yaml import YAML

from dpar_core.files import save_weights
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.vq import VQ, VQConfig
from stages import data, entropies, patch_maps, tokenize_images
from stages.params import Params, parse_params
from stages.tracker import NullTracker
from tests.helpers.paths import ROOT

SIZE, CODES = 8, 16
VQ_CONFIG = VQConfig(CODES, 4, 8, (1, 1), 8, residual_blocks=1, norm_groups=4)
GPT_CONFIG = GPTConfig(CODES, SIZE // VQ_CONFIG.downsample, 32, 2, 2, ffn_multiple=32)


def photo(number: int, height: int = 11, width: int = 14) -> np.ndarray:
    random = np.random.default_rng(number)
    small = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def put_images(root: Path, *, train: int = 14, validation: int = 5) -> Path:
    """Write PNGs of two classes: root/train/a/000.png and so on."""
    for split, count in (("train", train), ("validation", validation)):
        for number in range(count):
            path = root / split / "ab"[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(number + 1000 * (split == "validation"))).save(path)
    return root


def tiny_params(images: Path | None = None, **changes: dict) -> Params:
    """Return the demo's params with sizes cut; `changes` are merged into sections, as tokenize_images={"workers": 2}."""
    raw = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    raw["data"] |= {"image_size": SIZE, "max_bad_share": 0.2}
    if images is not None:
        raw["data"] |= {"source": "imagefolder", "train": str(images / "train"), "validation": str(images / "validation")}
    raw["tokenizer"] |= {"codebook_size": CODES, "channel_multipliers": [1, 1]}
    raw["tokenize_images"] |= {"shard_images": 5, "batch_size": 6}
    raw["entropies"] |= {"batch_size": 7}
    raw["patching"] |= {"threshold": None, "target_mean_length": 1.8, "max_patch_length": 4}
    for section, values in changes.items():
        raw[section] |= values
    return parse_params(raw)


def save_tokenizer(path: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = VQ(VQ_CONFIG)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3) if value.dim() > 1 else torch.nn.init.uniform_(value, 0.2, 1.0)
    save_weights(path, model.state_dict(), kind="vq", config=asdict(VQ_CONFIG), meta={})
    return path


def save_entropy_model(path: Path, tokenizer: str, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = GPT(GPT_CONFIG)
    torch.nn.init.normal_(model.output.weight, std=0.5)
    save_weights(path, model.state_dict(), kind="gpt", config=asdict(GPT_CONFIG), meta={"tokenizer": tokenizer})
    return path


@dataclass
class Project:
    """The artifacts of a run in a folder, and the calls that make them."""

    root: Path
    params: Params

    @property
    def work(self) -> Path:
        return self.root / "work"

    def _run(self, name: str, module, inputs, outputs, tracker: NullTracker | None) -> None:
        work = self.work / name
        work.mkdir(parents=True, exist_ok=True)
        chosen = module.Params(**{field: getattr(self.params, field) for field in module.Params.__dataclass_fields__})
        for path in vars(outputs).values():
            path.parent.mkdir(parents=True, exist_ok=True)
        module.run(chosen, inputs, outputs, tracker or NullTracker(), device="cpu", work=work)

    def data(self) -> Project:
        outputs = data.Outputs(self.root / "manifest.parquet", self.root / "data.json")
        self._run("data", data, data.Inputs(self.root / "images.json"), outputs, None)
        save_tokenizer(self.root / "tokenizer.safetensors")
        return self

    def tokenize(self, tracker: NullTracker | None = None) -> Project:
        inputs = tokenize_images.Inputs(self.root / "manifest.parquet", self.root / "tokenizer.safetensors")
        outputs = tokenize_images.Outputs(self.root / "tokens", self.root / "tokens.json")
        self._run("tokenize_images", tokenize_images, inputs, outputs, tracker)
        return self

    def entropies(self, tracker: NullTracker | None = None) -> Project:
        if not (self.root / "entropy_model.safetensors").exists():
            meta = json.loads((self.root / "tokens" / "summary.json").read_text())["meta"]
            save_entropy_model(self.root / "entropy_model.safetensors", meta["tokenizer"])
        inputs = entropies.Inputs(self.root / "tokens", self.root / "entropy_model.safetensors")
        self._run("entropies", entropies, inputs, entropies.Outputs(self.root / "entropies"), tracker)
        return self

    def patch_maps(self, tracker: NullTracker | None = None) -> Project:
        inputs = patch_maps.Inputs(self.root / "tokens", self.root / "entropies")
        outputs = patch_maps.Outputs(self.root / "patch_maps", self.root / "patch_maps.json", self.root / "lengths.csv")
        self._run("patch_maps", patch_maps, inputs, outputs, tracker)
        return self

    def bytes(self, *names: str) -> dict[str, bytes]:
        """Return all files of artifacts, by name."""
        found = {}
        for name in names:
            path = self.root / name
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            found |= {str(file.relative_to(self.root)): file.read_bytes() for file in files if file.is_file()}
        return found


def make_project(root: Path, **changes: dict) -> Project:
    """Return a project with images, manifest and tokenizer made."""
    return Project(root, tiny_params(put_images(root / "images"), **changes)).data()


def run_stage(root: Path, images: Path, stage: str, **changes: dict) -> None:
    """Run one stage as a process of its own. It is here as such a process would import pytest for a function of a test."""
    os.setsid()
    torch.set_num_threads(1)
    getattr(Project(root, tiny_params(images, **changes)), stage)()


def copy_of(project: Project, root: Path, **changes: dict) -> Project:
    """A project with the same images, manifest and models, and nothing made yet."""
    root.mkdir()
    for name in ("manifest.parquet", "tokenizer.safetensors", "entropy_model.safetensors"):
        shutil.copy(project.root / name, root / name)
    return Project(root, tiny_params(project.root / "images", **changes))


def as_artifacts(project: Project, root: Path) -> Path:
    """Lay a project out as the workflow does."""
    for source, target in (
        ("manifest.parquet", "data/manifest.parquet"),
        ("tokenizer.safetensors", "tokenizer/tokenizer.safetensors"),
        ("entropy_model.safetensors", "entropy_model/model.safetensors"),
    ):
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project.root / source, root / target)
    for name in ("tokens", "entropies", "patch_maps"):
        shutil.copytree(project.root / name, root / name)
    return root
