"""Stage features: labels of what is trained on; where scores come from a file nothing is trained, and the outputs say so."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import stages.features as stage
from dpar_core.evaluation.features import feature_network
from stages.params import load_params, select
from stages.tracker import NullTracker
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import Project, put_images, tiny_params


def test_no_classifier_is_trained_where_features_are_inceptions(tmp_path):
    params = select(load_params(ROOT / "params" / "imagenet256-dpar-b.yaml"), stage.Params)
    outputs = stage.Outputs(tmp_path / "classifier.safetensors", tmp_path / "metrics.json")
    # No manifest is there: reading one image of ImageNet would fail.
    stage.run(params, stage.Inputs(tmp_path / "none"), outputs, SimpleNamespace(), device="cpu", work=tmp_path)
    assert json.loads(outputs.metrics.read_text()) == {}
    with pytest.raises(ValueError, match="kind 'no_classifier', expected 'demo_classifier'"):
        feature_network("demo", outputs.weights, "cpu")


@pytest.mark.parametrize("labels", [[n // 750 for n in range(1500)], [n % 9 for n in range(2250)]])
def test_accuracy_is_that_of_all_classes_however_many_images_there_are(labels):
    """Rows class by class, and nine classes in turns as the demo has them; a network that knows the first class alone."""
    rows = [SimpleNamespace(label=label) for label in labels]
    images = stage.CenterCrops(rows, lambda row: np.full((4, 4, 3), row.label, np.uint8), 4)

    class FirstClass(torch.nn.Module):
        def forward(self, pixels):
            return torch.eye(9)[:1].expand(len(pixels), 9)

    assert stage._accuracy(FirstClass(), images, device="cpu") == pytest.approx(labels.count(0) / len(labels), abs=0.03)


def test_an_image_in_place_of_an_unreadable_one_keeps_its_own_class(tmp_path, capsys, monkeypatch):
    """Class a is black and class b white; most images of a are damaged, and each is followed by one of b."""
    root = put_images(tmp_path / "images", train=8, validation=4)
    for path in root.rglob("*.png"):
        Image.new("RGB", (8, 8), "black" if path.parent.name == "a" else "white").save(path)
    for number in (2, 4, 6):
        (root / "train" / "a" / f"{number:03d}.png").write_bytes(b"damaged")
    (root / "validation" / "a" / "000.png").write_bytes(b"damaged")
    project = Project(tmp_path, tiny_params(root)).data()
    seen = []

    def loss_of(logits, labels):
        seen.append(labels)
        return torch.nn.functional.nll_loss(logits.log_softmax(1), labels)

    monkeypatch.setattr(stage.F, "cross_entropy", loss_of)
    batches = stage.CenterCrops.batch

    def batch_of(self, *args):
        crops = batches(self, *args)
        seen.append(crops.images)
        return crops

    monkeypatch.setattr(stage.CenterCrops, "batch", batch_of)
    params = select(project.params, stage.Params)
    settings = params.demo_classifier.model_copy(update={"steps": 4, "batch_size": 8})
    params = stage.Params(params.seed, params.data, params.features, settings)
    outputs = stage.Outputs(tmp_path / "classifier.safetensors", tmp_path / "metrics.json")
    stage.run(params, stage.Inputs(tmp_path / "manifest.parquet"), outputs, NullTracker(), device="cpu", work=tmp_path)
    for images, labels in zip(seen[::2], seen[1::2]):
        assert np.array_equal(images[:, 0, 0, 0] > 127, labels.numpy() == 1)
    assert "3 training images cannot be read and are left out" in capsys.readouterr().out
