"""Trained models are read in one way: kind, config, digests and what they were made with are checked."""

from dataclasses import asdict

import pytest
import torch

from dpar_core.files import Damaged, save_weights
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.load import read_trained, role_of

UNCONDITIONAL = GPTConfig(16, 4, 16, 1, 1, ffn_multiple=16)
CONDITIONAL = GPTConfig(16, 4, 16, 1, 1, ffn_multiple=16, num_classes=3)


def save(path, shape=UNCONDITIONAL, *, config=None):
    """Write a model of a shape; config: what the file claims instead."""
    model = GPT(shape)
    meta = {"tokenizer": "a" * 16, "tokens": "b" * 16}
    save_weights(path, model.state_dict(), kind="gpt", config=config or asdict(shape), meta=meta)
    return model


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    model = save(tmp_path / "m.safetensors")
    found = read_trained(tmp_path / "m.safetensors", "entropy_model", made_with={"tokenizer": "a" * 16})
    built = found.build("cpu", dtype=torch.bfloat16)
    assert not built.training and not any(p.requires_grad for p in built.parameters())
    assert all((value == model.state_dict()[name].bfloat16()).all() for name, value in built.state_dict().items())
    assert found.meta["tokens"] == "b" * 16 and role_of(found.path) == "entropy_model"


@pytest.mark.parametrize(
    "role, made_with, sentence",
    [
        ("entropy_model", {"tokenizer": "c" * 16}, "on tokens of tokenizer a{16}, but .*: run `dpar-cli run"),
        ("entropy_model", {"tokens": "c" * 16}, "was trained on token shards b{16}, but"),
        ("dpar", {}, "holds weights of kind 'gpt', expected 'dpar'"),
        ("llamagen", {}, "is an entropy model, which knows no classes"),
    ],
)
def test_what_does_not_belong_together_is_refused_with_what_to_run(tmp_path, role, made_with, sentence):
    save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=sentence):
        read_trained(tmp_path / "m.safetensors", role, made_with=made_with)


def test_a_conditional_model_is_no_entropy_model(tmp_path):
    save(tmp_path / "m.safetensors", CONDITIONAL)
    assert role_of(tmp_path / "m.safetensors") == "llamagen"
    with pytest.raises(ValueError, match="is conditioned on classes, an entropy model has none"):
        read_trained(tmp_path / "m.safetensors", "entropy_model")


def test_a_config_that_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "m.safetensors"
    save(file, config=asdict(UNCONDITIONAL) | {"layers": 2})
    with pytest.raises(ValueError, match=r"does not fit its own config \(\d+ tensors, first layers\.1"):
        read_trained(file, "entropy_model").build()
    save(file, config={"no": 1})
    with pytest.raises(ValueError, match=r"has a config of another version .* run `dvc repro -sf entropy_model`"):
        read_trained(file, "entropy_model")
    with pytest.raises(FileNotFoundError, match=r"no trained model at .*: run `dpar-cli run entropy_model`"):
        read_trained(tmp_path / "none.safetensors", "entropy_model")


def test_a_flipped_bit_in_the_tensors_is_refused(tmp_path):
    file = tmp_path / "m.safetensors"
    save(file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(Damaged, match="its tensors are not what its digest says"):
        read_trained(file, "entropy_model")


def test_a_model_that_diverged_is_refused(tmp_path):
    model = GPT(UNCONDITIONAL)
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    meta = {"tokenizer": "a" * 16, "tokens": "b" * 16}
    save_weights(tmp_path / "m.safetensors", model.state_dict(), kind="gpt", config=asdict(UNCONDITIONAL), meta=meta)
    with pytest.raises(ValueError, match=r"not finite in 1 of \d+ tensors \(norm\.weight\)"):
        read_trained(tmp_path / "m.safetensors", "entropy_model").build()
