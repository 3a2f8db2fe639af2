"""Stage features where scores come from a file: nothing is trained, and the outputs say so."""

import json
from types import SimpleNamespace

import pytest

import stages.features as stage
from dpar_core.evaluation.features import feature_network
from stages.params import load_params, select
from tests.helpers.paths import ROOT


def test_no_classifier_is_trained_where_features_are_inceptions(tmp_path):
    params = select(load_params(ROOT / "params" / "imagenet256-dpar-b.yaml"), stage.Params)
    outputs = stage.Outputs(tmp_path / "classifier.safetensors", tmp_path / "metrics.json")
    # No manifest is there: reading one image of ImageNet would fail.
    stage.run(params, stage.Inputs(tmp_path / "none"), outputs, SimpleNamespace(), device="cpu", work=tmp_path)
    assert json.loads(outputs.metrics.read_text()) == {}
    with pytest.raises(ValueError, match="kind 'no_classifier', expected 'demo_classifier'"):
        feature_network("demo", outputs.weights, "cpu")
