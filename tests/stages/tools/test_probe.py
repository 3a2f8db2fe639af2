"""The linear probe of frozen features."""

import numpy as np
import pytest
import torch

from dpar_core.data.shards import TokenShards
from dpar_core.evaluation.block_features import block_features, block_names
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.patches.layout import PatchLayout
from dpar_core.training.prefetch import Batch
from pipeline.commands.probe import plot_accuracies, probe_models, table
from stages.shared import jobs as training
from stages.tools.probe import SplitFeatures, load_model, probe
from tests.stages.test_training_stages import data, in_process, run_stage  # noqa: F401 (data is a fixture)

torch.set_num_threads(1)


def dpar() -> DPAR:
    torch.manual_seed(1)
    return DPAR(DPARConfig(16, 4, 32, 2, 1, 2, 1, num_classes=2, ffn_multiple=32, class_dropout=0.5, dropout=0.5))


def batch(count: int = 3) -> Batch:
    tokens = torch.randint(0, 16, (count, 16), generator=torch.Generator().manual_seed(2))
    lengths = [np.array([1, 3, 4, 4, 4]), np.array([1, 2, 1] * 4), np.array([1] * 16)][:count]
    return Batch(tokens, None, PatchLayout.from_lengths(lengths, row_width=4))


def test_features_of_an_image_do_not_depend_on_its_neighbours():
    together = block_features(dpar(), batch())
    alone = block_features(dpar(), batch(1))
    assert together.shape == (4, 3, 32)
    assert torch.allclose(together[:, :1], alone, atol=1e-6)


def test_packed_rows_are_averaged_image_by_image():
    model, read, kept = dpar(), batch(), []
    model.layers[1].register_forward_hook(lambda module, given, output: kept.append(output))
    features = block_features(model, read)
    rows = kept[0][: read.layout.patches].split(read.layout.offsets.diff().tolist())
    for image, packed in enumerate(rows):
        assert torch.allclose(features[2, image], packed.mean(0), atol=1e-6)


def test_blocks_have_names_in_order():
    assert block_names(dpar()) == ["encoder 0", "patch 0", "patch 1", "decoder 0"]
    assert block_names(GPT(GPTConfig(16, 4, 32, 2, 2, ffn_multiple=32, num_classes=2))) == ["layer 0", "layer 1"]


def test_a_probe_finds_what_is_there_and_nothing_where_nothing_is():
    random = np.random.default_rng(0)
    labels = np.arange(400) % 4
    noise = random.normal(size=(3, 400, 8)).astype(np.float32)
    noise[1, :, :4] += 6 * np.eye(4)[labels]
    train = SplitFeatures(noise[:, :200], labels[:200])
    held_out = SplitFeatures(noise[:, 200:], labels[200:])

    model = GPT(GPTConfig(16, 4, 32, 2, 3, ffn_multiple=32, num_classes=4))
    found = probe(model, train, held_out)
    assert found[1].top1 > 0.98 and found[1].top5 == 1.0
    assert abs(found[0].top1 - 0.25) < 0.12


def test_one_class_alone_cannot_be_probed():
    split = SplitFeatures(np.zeros((1, 4, 8), np.float32), np.zeros(4, np.int64))
    with pytest.raises(ValueError, match="at least two classes, found 1"):
        probe(dpar(), split, split)


def test_trained_models_are_probed_from_their_artifacts(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(training.ray_train, "fit", in_process)
    (tmp_path / "tokens").symlink_to(data / "tokens")
    (tmp_path / "patch_maps").symlink_to(data / "maps")
    for name in ("dpar", "llamagen"):
        run_stage(name, data, tmp_path / "models" / name, tmp_path / "work" / name)
    found = probe_models(["dpar", "llamagen"], 0, 0, device="cpu", artifacts=tmp_path)
    assert found.images == {"train": 36, "held_out": 8, "classes": 2}
    assert all(0 <= one.best.top1 <= one.best.top5 <= 1 for one in found.models.values())
    assert [block.block for block in found.models["dpar"].blocks] == ["encoder 0", "patch 0", "decoder 0"]
    plot_accuracies(found, tmp_path / "probe.png")
    assert (tmp_path / "probe.png").stat().st_size > 5000 and "llamagen" in table(found)


def test_a_model_of_other_tokens_is_refused(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(training.ray_train, "fit", in_process)
    run_stage("entropy_model", data, tmp_path / "e", tmp_path / "work")
    shards = TokenShards(data / "tokens", "train")
    with pytest.raises(ValueError, match="which knows no classes"):
        load_model(tmp_path / "e" / "model.safetensors", shards)
    shards.digest = "0" * 16
    with pytest.raises(ValueError, match="was trained on token shards"):
        load_model(tmp_path / "e" / "model.safetensors", shards)
