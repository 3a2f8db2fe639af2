"""Models of a sweep that trains: one for each threshold, taken from where they are when nothing has changed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from dpar_core.data.shards import TokenShards
from dpar_core.files import load_weights
from dpar_core.patches.maps import PatchMaps, read_rule
from stages import train
from stages.shared import jobs
from stages.shared.sampler import Files
from stages.tools.sweep_models import retrain
from stages.tracker import NullTracker
from tests.helpers.tiny_data import make_project
from tests.stages.test_training_stages import in_process

LOW, HIGH = 1.0, 2.6  # nats of 16 codes (at most 2.77)
SMALL = {
    "steps": 3,
    "equal_time_step": None,
    "batch_size": 8,
    "warmup_steps": 1,
    "validate_every": 3,
    "validation_images": 4,
    "checkpoint_every": 3,
    "keep_best": 0,
    "log_every": 1,
    "precision": "fp32",
}


@dataclass
class Sweep:
    """A project with entropies, and the calls of a sweep that trains."""

    project: object
    stages: list[str] = field(default_factory=list)

    def __call__(self, *thresholds: float, **changes: object) -> dict:
        """Train for thresholds; return the models. `stages` names what ran."""
        self.stages.clear()
        root, params = self.project.root, self.project.params.model_copy(update=changes)
        given = Files(root / "given.safetensors", root / "tokenizer.safetensors", root / "entropy_model.safetensors", None)

        def track(stage, _):
            self.stages.append(stage)
            return contextlib.nullcontext(NullTracker())

        return retrain(
            params,
            thresholds,
            given,
            tokens=root / "tokens",
            entropies=root / "entropies",
            folder=root / "models",
            work=root / "work" / "sweep",
            device="cpu",
            track=track,
        )


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Iterator[Sweep]:
    torch.set_num_threads(1)
    model = {"width": 32, "heads": 2, "patch_layers": 1, "decoder_layers": 1, "ffn_multiple": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.ray_train, "fit", in_process)
        yield Sweep(make_project(tmp_path_factory.mktemp("project"), model=model, train=SMALL).tokenize().entropies())


@pytest.fixture(scope="module")
def models(sweep) -> dict:
    made = sweep(LOW, HIGH)
    assert sweep.stages == [f"{stage} {threshold:g}" for threshold in (LOW, HIGH) for stage in ("patch_maps", "train_dpar")]
    return made


def test_each_threshold_has_a_model_trained_on_its_own_patches(sweep, models):
    assert set(models) == {None, LOW, HIGH} and models[None].model.name == "given.safetensors"
    shards = TokenShards(sweep.project.root / "tokens", "train")
    patches = {}
    for threshold in (LOW, HIGH):
        files = models[threshold]
        assert read_rule(files.rule).threshold == threshold
        maps = PatchMaps(files.rule.parent, shards)
        patches[threshold] = maps.starts(range(len(shards)), [0] * len(shards)).sum()
        assert load_weights(files.model, kind="dpar").meta["step"] == SMALL["steps"]
        assert (files.tokenizer, files.entropy_model) == (models[None].tokenizer, models[None].entropy_model)
    assert patches[LOW] > patches[HIGH]
    assert models[LOW].model.read_bytes() != models[HIGH].model.read_bytes()


def test_what_is_there_is_taken_and_a_new_threshold_alone_is_trained(sweep, models):
    assert sweep(LOW, HIGH) == models and sweep.stages == []
    more = sweep(LOW, 2.0, HIGH)
    assert sweep.stages == ["patch_maps 2", "train_dpar 2"] and {name: more[name] for name in models} == models


def test_another_seed_trains_models_of_its_own(sweep, models):
    other = sweep(LOW, seed=sweep.project.params.seed + 1)
    assert sweep.stages == [f"patch_maps {LOW:g}", f"train_dpar {LOW:g}"] and other[LOW] != models[LOW]


def test_a_training_that_was_interrupted_keeps_its_patches(sweep, models, monkeypatch):
    real = train.run_dpar

    def breaks(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_dpar", breaks)
    with pytest.raises(KeyboardInterrupt):
        sweep(1.5)
    monkeypatch.setattr(train, "run_dpar", real)
    assert set(sweep(1.5)) == {None, 1.5} and sweep.stages == ["train_dpar 1.5"]
