"""A project of 26 images of 8 pixels, every stage of which takes about a second, and its undisturbed artifacts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dpar_core.files import digest_of
from tests.faults.processes import run_stage
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import CODES, SIZE, put_images

# What differs between two undisturbed runs of a stage: seconds, and no result follows from them in this project.
TIMED = ("timings.json", "speed/training.json", "speed/sampling.json")


def params(images: Path) -> dict[str, Any]:
    """Return the smoke preset, cut to the smallest that has every part."""
    raw: dict[str, Any] = YAML(typ="safe").load((ROOT / "params" / "smoke.yaml").read_text())
    raw["compute"] |= {"device": "cpu", "threads": 1}
    raw["data"] |= {"source": "imagefolder", "train": str(images / "train"), "validation": str(images / "validation")}
    raw["data"] |= {"image_size": SIZE}
    small = {"codebook_size": CODES, "codebook_dim": 4, "base_width": 8, "channel_multipliers": [1, 1], "z_channels": 8}
    raw["tokenizer"] |= {**small, "norm_groups": 4, "steps": 4, "warmup_steps": 2, "batch_size": 4, "precision": "fp32"}
    raw["tokenize_images"] |= {"shard_images": 6, "batch_size": 8}
    training = {"steps": 6, "batch_size": 4, "validate_every": 2, "validation_images": 4, "checkpoint_every": 2}
    training |= {"log_every": 1, "precision": "fp32", "warmup_steps": 1}
    raw["entropy_model"] |= {"ffn_multiple": 16, "train": raw["entropy_model"]["train"] | training}
    raw["entropies"] |= {"batch_size": 8}
    raw["patching"] |= {"threshold": None, "target_mean_length": 1.6}
    raw["model"] |= {"ffn_multiple": 16}
    raw["train"] |= training | {"equal_time_step": 4}
    raw["sample"] |= {"images": 8, "batch_size": 4}
    raw["score"] |= {"images": 8, "bootstrap": 2, "demo_classifier": raw["score"]["demo_classifier"] | {"steps": 3}}
    raw["report"] |= {"examples": 2}
    return raw


def hurry() -> None:
    """Let stages that time models do so for a moment only; called in the process of a stage."""
    from dpar_core import turns
    from stages import time_sampling, time_training

    turns.SHORTEST, turns.LEAST = 0.01, 2
    for module in (time_training, time_sampling):
        module.SECONDS = 0.1
        module.wait_for_helpers = lambda: None


@dataclass
class World:
    """The undisturbed project. counts: changes to files that each stage makes, by process; seconds: that it takes."""

    root: Path
    files: dict[str, bytes] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def whole(self) -> Path:
        return self.root / "whole"

    def make(self, stages: Sequence[str], say: Callable[[str], None]) -> None:
        """Run stages once, in order, and remember what came out."""
        images = put_images(self.root / "images", train=18, validation=8)
        self.prepare(self.whole, params(images))
        for stage in stages:
            ended = run_stage(stage, self.whole, prepare=hurry)
            if ended.status != 0:
                raise RuntimeError(f"{stage} fails undisturbed:\n{ended.said}")
            self.counts[stage], self.seconds[stage] = ended.counts, ended.seconds
        self.files = contents(self.whole / "artifacts")
        say(f"undisturbed: {len(stages)} stages, {len(self.files)} files, {sum(self.seconds.values()):.1f} s")

    def prepare(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Make a folder a project with params and nothing made yet."""
        (folder / "work").mkdir(parents=True)
        (folder / ".git").mkdir()  # or DVC's configuration would be changed for a folder outside git
        shutil.copy(ROOT / "dvc.yaml", folder)
        with open(folder / "params.yaml", "w") as stream:
            YAML().dump(dict(values), stream)

    def copy(self, folder: Path, stage: str, *, outputs: bool = False, **sections: Mapping[str, Any]) -> Path:
        """Make a project that has what a stage reads, and what it makes if asked. sections: changes to params."""
        from pipeline.runner import STAGES
        from pipeline.state import LAST

        shutil.rmtree(folder, ignore_errors=True)
        values = params(self.root / "images")
        for name, changes in sections.items():
            values[name] = values[name] | changes
        self.prepare(folder, values)
        spec = STAGES[stage]
        for name in [*spec.inputs.values(), *(spec.outputs.values() if outputs else ())]:
            source, target = self.whole / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy2(source, target)
        for name in spec.outputs.values():
            if not outputs and (folder / name).exists():  # the report's folders of inputs hold outputs of other stages
                remove(folder / name)
        for record in (self.whole / "work").glob(f"*/{LAST}"):  # when stages ran, which the report's footer says
            (folder / "work" / record.parent.name).mkdir()
            shutil.copy2(record, folder / "work" / record.parent.name)
        return folder

    def outputs(self, stage: str) -> dict[str, bytes]:
        """Return the undisturbed bytes of what a stage makes, by the path below artifacts/."""
        from stages.artifacts import OUTPUTS

        names = [one.name for one in OUTPUTS[stage].values()]
        return {path: content for path, content in self.files.items() if below(path, names)}

    def inputs(self, stage: str) -> list[str]:
        """Return the files that a stage may read, by the path below artifacts/."""
        from stages.artifacts import INPUTS

        names = [one.name for one in INPUTS[stage].values()]
        return [path for path in self.files if below(path, names) and path not in self.outputs(stage)]


def below(path: str, names: list[str]) -> bool:
    return any(f"{path}/".startswith(f"{name}/") for name in names)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, by relative path."""
    return {path: (folder / path).read_bytes() for path in sorted(walk(folder))}


def walk(folder: Path) -> Iterator[str]:
    for where, _, names in os.walk(folder):
        for name in names:
            yield os.path.relpath(os.path.join(where, name), folder)


def timed(path: str) -> bool:
    """Tell whether a file holds seconds, which differ between two undisturbed runs."""
    return path.endswith(TIMED)


def whole_record(content: bytes) -> bool:
    """Tell whether a file of seconds is a whole record."""
    try:
        found = json.loads(content)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("digest") == digest_of({k: v for k, v in found.items() if k != "digest"})
