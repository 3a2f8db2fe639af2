"""The score stage: what it reads, what it refuses, and that scores carry their protocol."""

import json

import numpy as np
import pytest
import torch

from dpar_core.data.manifest import write_manifest
from dpar_core.evaluation import features
from dpar_core.evaluation.features import DemoClassifier, inception_network, load_script
from dpar_core.evaluation.protocol import ScoreError
from dpar_core.files import Damaged, save_weights, write_record
from stages import params as P
from stages import score
from stages.data import builtin_manifest
from stages.tracker import NullTracker
from tests.helpers.paths import ROOT


@pytest.fixture
def place(tmp_path):
    params = P.load_params(ROOT / "params" / "smoke.yaml")
    torch.manual_seed(0)
    settings = params.data.builtin.model_copy(update={"train_crops": 27, "validation_crops": 9})
    write_manifest(tmp_path / "manifest.parquet", builtin_manifest(settings, seed=0))
    model = DemoClassifier(9)
    save_weights(tmp_path / "c.safetensors", model.state_dict(), kind="demo_classifier", config={"num_classes": 9}, meta={})
    samples = tmp_path / "dpar"
    samples.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(samples / "samples.npz", arr_0=images)
    write_record(samples / "samples.json", {"cfg_scale": 2.0})
    (tmp_path / "work").mkdir()
    return tmp_path, P.select(params, score.Params)


def run(folder, params):
    inputs = score.Inputs(folder / "manifest.parquet", folder / "c.safetensors", folder / "dpar", folder / "seen.json")
    outputs = score.Outputs(folder / "dpar.json", folder / "dpar_metrics.json")
    score.run_dpar(params, inputs, outputs, NullTracker(), device="cpu", work=folder / "work")
    return json.loads((folder / "dpar.json").read_text())


def test_scores_are_named_after_their_features_and_carry_their_protocol(place):
    folder, params = place
    found = run(folder, params)
    assert {"eval/fd_demo", "eval/sfd_demo", "eval/is_demo", "eval/precision", "eval/recall", "eval/kid_demo"} <= set(found)
    assert not [name for name in found if "fid" in name]
    assert found["protocol"]["images"] == 18
    assert found["protocol"]["features"] == "demo"
    low, high = found["intervals"]["eval/fd_demo"]
    assert low <= found["eval/fd_demo"] <= high
    bare = json.loads((folder / "dpar_metrics.json").read_text())
    assert bare == {name: value for name, value in found.items() if name.startswith("eval/")}
    first = (folder / "dpar.json").read_bytes()
    run(folder, params)  # now from the cached reference
    assert (folder / "dpar.json").read_bytes() == first


def test_one_image_too_few_is_an_error(place):
    folder, params = place
    few = params.score.model_copy(update={"images": 21})
    with pytest.raises(ScoreError, match="holds 20 images, the protocol asks for 21"):
        run(folder, score.Params(params.seed, params.data, few))


class Branch(torch.nn.Module):
    """The block whose branch `conv` sFID reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 9, 1)
        self.tower = torch.nn.Conv2d(8, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x), self.tower(x)], 1)


class SmallInception(torch.nn.Module):
    """The interface of the StyleGAN export, small: resize to 299, scale, layers by name, pooled features, class scores."""

    def __init__(self, shift: float = 128.0, scale: float = 128.0) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale
        self.layers = torch.nn.Sequential()
        self.layers.add_module("conv", torch.nn.Conv2d(3, 8, 19, stride=16))
        self.layers.add_module("mixed_6", Branch())
        self.layers.add_module("pool", torch.nn.AdaptiveAvgPool2d(1))
        self.output = torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        # the same resize, written out: pixel i of the result is read at i * height / 299
        rows = torch.arange(299) * (x.shape[2] / 299)
        columns = torch.arange(299) * (x.shape[3] / 299)
        for axis, at in ((2, rows), (3, columns)):
            low = at.floor().long().clamp(max=x.shape[axis] - 1)
            high = (low + 1).clamp(max=x.shape[axis] - 1)
            shape = [1, 1, -1, 1] if axis == 2 else [1, 1, 1, -1]
            part = (at - at.floor()).view(shape)
            x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, high) * part
        pool = self.layers((x - self.shift) / self.scale).flatten(1)
        return pool if return_features else self.output(pool)


@pytest.mark.parametrize("scaling", [(128.0, 128.0), (127.5, 127.5), (0.0, 255.0)])
def test_a_torchscript_of_inceptions_interface_is_loaded_and_named_by_its_digest(tmp_path, scaling, monkeypatch):
    monkeypatch.setattr(features, "_rehearse", lambda path: None)  # a process that takes seconds to import torch
    torch.manual_seed(0)
    model = SmallInception(*scaling)
    torch.jit.script(model).save(str(tmp_path / "inception.pt"))
    network = inception_network(tmp_path / "inception.pt", "cpu")
    images = np.random.default_rng(1).integers(0, 256, (5, 24, 16, 3), dtype=np.uint8)
    found = network(images, batch_size=2)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2).float(), return_features=True)
    np.testing.assert_allclose(found.pool, expected.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert network.name == "inception" and len(network.digest) == 16
    if scaling[0] == 0.0:  # a network whose layers cannot be followed gives no spatial features, rather than wrong ones
        assert found.spatial is None
    else:
        block = {}
        model.layers.mixed_6.conv.register_forward_hook(lambda module, given, out: block.update(out=out))
        with torch.inference_mode():
            model(torch.from_numpy(images).permute(0, 3, 1, 2).float())
        maps = block["out"][:, :7].numpy()
        rows, columns = maps.shape[2:]
        ordered = [maps[:, c, y, x] for y in range(rows) for x in range(columns) for c in range(7)]  # as ADM stores them
        np.testing.assert_allclose(found.spatial, np.stack(ordered, axis=1), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="uint8"):
        network(images.astype(np.float32))


def test_a_file_that_is_no_torchscript_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is a text file; expected a TorchScript file"):
        load_script(tmp_path / "x.pt", "cpu")
    with pytest.raises(FileNotFoundError, match="no feature network"):
        load_script(tmp_path / "y.pt", "cpu")


def test_a_protocol_of_samples_without_its_digest_is_damage(place):
    folder, params = place
    (folder / "dpar" / "samples.json").write_text(json.dumps({"cfg_scale": 1.0}))
    with pytest.raises(Damaged, match=r"samples\.json is damaged"):
        run(folder, params)
