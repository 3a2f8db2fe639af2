"""Weights of strangers: whatever a file really is, it is read under plain names or refused with the true reason."""

import argparse
import gzip
import io
import json
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.published import read_gpt, read_state
from dpar_core.models.weights import read_checkpoint

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(3)}


def saved(content) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def same(found, expected=STATE):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == torch.float32


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "optimizer": {"state": {}}, "steps": 3, "args": argparse.Namespace(lr=1e-4, betas=[0.9, 0.95])},
        {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}, "epoch": 7},
        {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in STATE.items()}},
        {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()},
        {"state_dict": {f"model.{name}": tensor for name, tensor in STATE.items()}, "pytorch-lightning_version": "2.5"},
        {"ema": STATE, "step": 1},
        {**STATE, "freqs_cis": torch.zeros(4, dtype=torch.complex64)},
    ],
    ids=["bare", "training", "ddp", "compiled-ddp", "ddp-compiled", "lightning", "ema-alone", "computed-buffer"],
)
def test_weights_are_found_wherever_training_code_puts_them(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(saved(content))
    same(read_checkpoint(tmp_path / "x.pt").state)


def test_of_two_sets_one_is_read_and_the_choice_is_named(tmp_path):
    ema = {name: tensor + 1 for name, tensor in STATE.items()}
    (tmp_path / "x.pt").write_bytes(saved({"model": STATE, "ema": ema}))
    found = read_checkpoint(tmp_path / "x.pt")
    same(found.state)
    assert (found.holder, found.others) == ("model", ("ema",)) and "holds model and ema: model is read" in found.note
    same(read_checkpoint(tmp_path / "x.pt", holder="ema").state, ema)
    with pytest.warns(UserWarning, match="model is read; to use ema"):
        read_state(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no weights under 'module': it has model, ema"):
        read_checkpoint(tmp_path / "x.pt", holder="module")
    (tmp_path / "x.pt").write_bytes(saved({"generator": STATE, "step": 3}))
    same(read_checkpoint(tmp_path / "x.pt", holder="generator").state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(tmp_path, dtype):
    (tmp_path / "x.pt").write_bytes(saved({name: tensor.to(dtype) for name, tensor in STATE.items()}))
    found = read_checkpoint(tmp_path / "x.pt")
    same(found.state)
    assert found.stored == (str(dtype).removeprefix("torch."),)


def test_the_content_decides_and_not_the_ending(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "renamed.pt")
    same(read_checkpoint(tmp_path / "renamed.pt").state)
    (tmp_path / "renamed.safetensors").write_bytes(saved(STATE))
    same(read_checkpoint(tmp_path / "renamed.safetensors").state)
    torch.save(STATE, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    same(read_checkpoint(tmp_path / "old.bin").state)


def test_tensors_that_share_memory_come_apart(tmp_path):
    table = torch.arange(12.0).reshape(4, 3)
    (tmp_path / "x.pt").write_bytes(saved({"a": table, "b": table, "c": table[1:3], "d": table.T}))
    found = read_checkpoint(tmp_path / "x.pt").state
    same(found, {"a": table, "b": table, "c": table[1:3], "d": table.T})
    safetensors.torch.save_file(found, tmp_path / "y.safetensors")  # refuses tensors that share memory


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, arr_0=np.zeros(3))
    return stream.getvalue()


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "weights are elsewhere")
    return stream.getvalue()


def _script() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: fetch it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "is a Git LFS pointer: fetch the real",
        ),
        (b"<!doctype html><html><head><title>Sign in</title>", "is an HTML page"),
        (b'{"error":"Repository not found"}', "is JSON text, expected weights"),
        (json.dumps({"weight_map": {"a": "x-1.safetensors"}}).encode(), "is the index of a checkpoint in several files"),
        (b"Not Found\n", "is a text file, expected weights"),
        (_npy(), "is a bare NumPy array .*, expected weights"),
        (_npz(), "is an npz of NumPy arrays"),
        (_zip(), r"is a zip archive without weights \(it holds readme.txt\)"),
        (_script(), "is a TorchScript program"),
        (gzip.compress(b"x", mtime=0), "is compressed with gzip: unpack it first"),
        (bytes(4096), "holds zeros only"),
        (b"\x89HDF\r\n\x1a\nabc", "is an HDF5 file"),
        (saved(STATE)[:400], "is damaged or cut short"),
        (safetensors.torch.save(STATE)[:-4], "is not a whole safetensors file"),
        (saved(torch.ones(3)), "holds one Tensor without names"),
        (saved([torch.ones(3)]), "holds one list without names"),
        (saved({"epoch": 3, "generator": STATE}), r"holds no state dict \(it holds epoch, generator\)"),
        (saved({"model": {}}), r"holds no state dict \(it holds model\)"),
        (saved({"a": torch.empty(2, device="meta")}), "a was saved without its values"),
        (saved({"a": torch.tensor([1.0, float("nan")])}), r"not finite in 1 of 1 tensors \(a\)"),
        (saved({"a": torch.tensor([1.0, float("-inf")], dtype=torch.float16)}), "not finite"),
        (saved({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}), "a is a nested tensor"),
        (saved({"a": torch.ones(2, dtype=torch.int8)}), "a is int8, expected one of float32"),
        (saved({"a": torch.ones(2), "module.a": torch.zeros(2)}), "holds a twice"),
        (saved({"a": Path("x")}), "is refused: it wants to run pathlib"),
    ],
)
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_what_is_not_a_checkpoint_is_named_for_what_it_is(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_folder_names_the_files_that_could_be_meant(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a folder, expected weights.*model\.safetensors"):
        read_checkpoint(tmp_path)
    for number in (1, 2):  # neither is a checkpoint by itself
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds a checkpoint in several files: join them"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        read_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("whole", [saved(STATE), safetensors.torch.save(STATE)], ids=["zip", "safetensors"])
def test_flipped_bits_give_weights_or_a_sentence(tmp_path, whole):
    for bit in range(0, 8 * len(whole), 8 * len(whole) // 150):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            read_checkpoint(tmp_path / "x.pt")
        except ValueError as error:
            assert str(tmp_path) in str(error)


def test_weights_of_zeros_alone_and_class_tables_without_classes_are_refused(tmp_path):
    model = GPT(GPTConfig(codebook_size=16, row_width=4, width=32, heads=2, layers=1, ffn_multiple=32, num_classes=3))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}  # output.weight begins as zeros
    table = "cls_embedding.embedding_table.weight"
    for change, words in (
        ({}, r"nothing but zeros in 1 of its weights \(output.weight\): it was not trained"),
        ({table: state[table][:1]}, r"has a class table of \(1, 32\): expected a row per class"),
        ({"output.weight": torch.ones(16, 32)}, None),
    ):
        (tmp_path / "x.pt").write_bytes(saved(state | change))
        with nullcontext() if words is None else pytest.raises(ValueError, match=words):
            read_gpt(tmp_path / "x.pt", heads=2, row_width=4)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    state = {"tok_embeddings.weight": torch.zeros(8, 32), "layers.0.feed_forward.w1.weight": torch.zeros(96, 32)}
    (tmp_path / "x.pt").write_bytes(saved(state))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="5 attention heads do not divide the width of 32"):
        read_gpt(tmp_path / "x.pt", heads=5, row_width=4)
