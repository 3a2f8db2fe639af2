"""Linux-only calls have another branch: hidden here, as they are on macOS."""

import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from dpar_core import system
from dpar_core.generation.stepping import Matrix, can_pack


def hide(monkeypatch):
    """Take away what macOS does not have."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(system, "_STATM", Path("/nowhere/statm"))
    monkeypatch.setattr(system.platform, "machine", lambda: "arm64")


def test_without_affinity_all_cpus_count(monkeypatch):
    hide(monkeypatch)
    assert system.cpus() == os.cpu_count()


def test_memory_is_measured_without_proc_in_the_unit_of_each_system(monkeypatch):
    assert 2**20 < system.resident_bytes() < 2**40
    hide(monkeypatch)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2048))
    assert system.resident_bytes() == 2048 * 1024  # Linux counts KiB
    monkeypatch.setattr(sys, "platform", "darwin")
    assert system.resident_bytes() == 2048


def test_matrices_give_the_same_without_packing_on_another_cpu(monkeypatch):
    weight, x = torch.randn(24, 16), torch.randn(3, 16)
    here = Matrix(weight, torch.float32)(x)
    hide(monkeypatch)
    assert not can_pack(torch.device("cpu"))
    torch.testing.assert_close(Matrix(weight, torch.float32)(x), here)
