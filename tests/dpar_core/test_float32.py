"""Whole float32: who sets it, who restores it, and that features are computed inside."""

import numpy as np
import torch

from dpar_core.evaluation.features import FeatureNetwork
from dpar_core.float32 import Float32Products


def test_features_are_computed_without_tf32_and_the_settings_come_back(tmp_path):
    seen = []

    def compute(images):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return images.mean(dim=(2, 3)), None, None

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        FeatureNetwork("x", "0" * 16, tmp_path, compute, "cpu")(np.zeros((2, 4, 4, 3), np.uint8))
        assert seen == [("highest", False)]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_an_error_inside_restores_the_settings():
    whole, before = Float32Products(tf32=False), torch.backends.cudnn.allow_tf32
    try:
        with whole:
            raise KeyError("x")
    except KeyError:
        pass
    assert torch.backends.cudnn.allow_tf32 == before
