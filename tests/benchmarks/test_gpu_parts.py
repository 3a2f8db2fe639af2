"""The training and data parts of the GPU benchmark, on a CPU with tiny models: nothing is tried first on a GPU."""

import json

import pytest
import torch

from benchmarks import gpu_data, gpu_training


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.no_cover  # torch's own Python, of which tracing only costs time
def test_the_training_part_measures_every_row():
    written = []
    found = gpu_training.training("cpu", tiny=True, budget_s=600, write=written.append)
    rows = [(row["model"], row["compiled"]) for row in found["rows"]]
    assert rows == [("llamagen", True), ("dpar", True), ("llamagen", False), ("dpar", False)]
    assert all(row["images_per_s"] > 0 and row["mfu"] > 0 for row in found["rows"])
    assert [row["compiled"] for row in found["ratios"]] == [True, False] and not found["left_out"]
    baseline, dpar = found["profiles"]
    assert list(baseline["parts"]) == [
        *("embeddings", "blocks", "output and loss"),
        *("output and loss, backward", "blocks, backward", "embeddings, backward", "clipping and AdamW"),
    ]
    forward = ["embeddings", "encoder", "pooling", "packing", "patch transformer", "copying", "decoder", "output and loss"]
    assert list(dpar["parts"])[:8] == forward
    assert set(dpar["parts"]) == {*forward, *(f"{part}, backward" for part in forward), "clipping and AdamW"}
    assert dpar["host_waits"] == 0 and all(part["kernels"] and part["longest"] for part in dpar["parts"].values())
    assert found["attention"][0]["largest_difference"] < 1e-5
    kinds = ("rows", "profiles", "ratios", "attention", "loss")
    assert len(written) == sum(len(found[kind]) for kind in kinds)
    assert all(gpu_training.line(row) for row in written) and json.dumps(found)


def test_the_data_part_measures_every_row_and_float32_is_what_others_are_held_against():
    written = []
    found = gpu_data.data("cpu", tiny=True, budget_s=600, write=written.append)
    assert written == found["rows"] and not found["left_out"] and json.dumps(found)
    assert {row["part"] for row in written} == {"tokenizer", "entropies", "decoder"}
    whole = [row for row in written if row["precision"] == "fp32" and not row.get("channels_last")]
    assert all(row.get("codes_that_differ", 0) == row.get("flips", 0) == row.get("bytes_that_differ", 0) for row in whole)


def test_what_a_budget_has_no_room_for_is_named():
    found = gpu_data.data("cpu", tiny=True, budget_s=0, write=lambda row: None)
    assert not found["rows"] and len(found["left_out"]) == 21
