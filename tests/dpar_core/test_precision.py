"""Which precision `auto` means, and that no emulated one is ever timed at length."""

import os

import pytest
import torch

from dpar_core import precision
from dpar_core.training.loop import TrainSettings
from dpar_core.training.meters import peak_flops
from dpar_core.training.optim import OptimSettings


@pytest.fixture
def cpu(monkeypatch):
    """Sets what the CPU reports, with no variable that hides it."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    return lambda able: monkeypatch.setattr(precision, "_cpu_reports_bf16", lambda: able)


def test_auto_is_bf16_where_the_cpu_multiplies_it_and_fp32_where_it_emulates_it(cpu):
    cpu(True)
    assert [precision.settle(choice, "cpu") for choice in ("auto", "fp32", "bf16")] == ["bf16", "fp32", "bf16"]
    cpu(False)
    assert [precision.settle(choice, "cpu") for choice in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]


@pytest.mark.parametrize(
    "name, value, hidden",
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", True),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", True),
        ("DNNL_MAX_CPU_ISA", "AVX2", True),
        ("ATEN_CPU_CAPABILITY", "avx2", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", False),
        ("ATEN_CPU_CAPABILITY", "avx512", False),
    ],
)
def test_variables_that_hide_the_instructions_count(cpu, monkeypatch, name, value, hidden):
    cpu(True)
    monkeypatch.setenv(name, value)
    assert precision.multiplies_bf16("cpu") is not hidden


def test_a_torch_without_its_private_questions_means_fp32(cpu, monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Darwin", "mac", "25", "25", "x86_64")))
    assert precision.settle("auto", "cpu") == "fp32"


def test_the_peak_of_an_emulated_precision_is_measured_in_float32(cpu, monkeypatch):
    cpu(False)
    asked = []
    monkeypatch.setattr(precision, "product_seconds", lambda device, dtype, *, size: asked.append((dtype, size)) or 1e-3)
    precision._PEAKS.clear()
    assert peak_flops(torch.device("cpu"), bf16=True) == 2 * 1024**3 / 1e-3
    assert asked == [(torch.float32, 256), (torch.float32, 1024)]
    precision._PEAKS.clear()


def test_a_slow_machine_is_measured_on_a_small_product_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(precision, "product_seconds", lambda device, dtype, *, size: asked.append(size) or 1.0)
    precision._PEAKS.clear()
    assert peak_flops(torch.device("cpu"), bf16=False) == 2 * 256**3
    assert asked == [256]
    precision._PEAKS.clear()


def test_a_peak_measured_while_the_machine_was_busy_gives_way_to_a_larger_one(monkeypatch):
    seconds = iter([1e-2, 2e-3, 2e-3, 5e-3])
    monkeypatch.setattr(precision, "product_seconds", lambda device, dtype, *, size: next(seconds))
    precision._PEAKS.clear()
    found = [peak_flops(torch.device("cpu"), bf16=False, again=again) for again in (False, False, True, True)]
    assert found == [2 * 256**3 / 1e-2, 2 * 256**3 / 1e-2, 2 * 1024**3 / 2e-3, 2 * 1024**3 / 2e-3]
    precision._PEAKS.clear()


def test_the_training_loop_refuses_a_precision_that_is_not_settled():
    with pytest.raises(ValueError, match="precision is 'auto', expected fp32 or bf16"):
        TrainSettings(1, 1, OptimSettings(lr=1e-3), 0, 10.0, precision="auto")
