"""What several tests of stages share."""

import pytest
import torch

from dpar_core.evaluation.features import DemoClassifier, FeatureNetwork, demo_network
from dpar_core.files import save_weights
from stages import terminal


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> FeatureNetwork:
    """The demo's classifier with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "c.safetensors"
    save_weights(path, DemoClassifier(9).state_dict(), kind="demo_classifier", config={"num_classes": 9}, meta={})
    return demo_network(path, "cpu")


@pytest.fixture(autouse=True)
def long_lines(monkeypatch):
    """Sentences are printed as they are; tests/pipeline/commands/test_columns.py has their lines."""
    monkeypatch.setattr(terminal, "WIDTH", 9999)
    monkeypatch.setenv("COLUMNS", "9999")
