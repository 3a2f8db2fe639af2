"""Batches encoded side by side on CPUs: the bytes of one after the other, and settings put back."""

from pathlib import Path

import pytest
import torch

from dpar_core.data.manifest import read_manifest
from dpar_core.float32 import Float32Products
from stages import tokenize_images
from tests.helpers.tiny_data import make_project


def shard_bytes(project, work: Path, threads: int) -> list[bytes]:
    inputs = tokenize_images.Inputs(project.root / "manifest.parquet", project.root / "tokenizer.safetensors")
    params = tokenize_images.Params(project.params.data, project.params.tokenize_images)
    work.mkdir()
    make = tokenize_images.ShardTokenizer(inputs, params, work, "cpu", project.root, threads)
    assert make.streams == min(threads, 4)
    plan = tokenize_images.plan_shards(read_manifest(inputs.manifest), 50)
    for shard in plan:
        make(shard)
    return [(work / shard.name).read_bytes() for shard in plan]


def test_batches_side_by_side_make_the_same_shards(tmp_path):
    project = make_project(tmp_path / "p", tokenize_images={"batch_size": 2})  # one image a batch
    alone = shard_bytes(project, tmp_path / "1", 1)
    assert shard_bytes(project, tmp_path / "3", 3) == alone
    assert shard_bytes(project, tmp_path / "8", 8) == alone


def test_an_error_in_a_stream_reaches_the_stage(tmp_path, monkeypatch):
    project = make_project(tmp_path / "p", tokenize_images={"batch_size": 2})

    def fails(*_, **__):
        raise RuntimeError("no memory for a batch")

    monkeypatch.setattr(tokenize_images.ShardTokenizer, "encode", fails)
    with pytest.raises(RuntimeError, match="no memory for a batch"):
        shard_bytes(project, tmp_path / "w", 2)
    assert not list((tmp_path / "w").glob("*.tar"))


def test_the_last_of_several_streams_puts_settings_back():
    whole = Float32Products(tf32=False)
    try:
        torch.set_float32_matmul_precision("high")
        with whole:
            with whole:
                pass
            assert torch.get_float32_matmul_precision() == "highest"  # another stream has left, this one has not
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
