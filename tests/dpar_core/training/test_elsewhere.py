"""Training steps on a stand-in for a GPU (tests/helpers/training_elsewhere.py)."""

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


def test_a_training_step_on_another_device_reads_nothing_back_and_copies_nothing_but_its_batch():
    command = [sys.executable, "-m", "tests.helpers.training_elsewhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3
    for case in found.values():
        assert case["waits"] == case["copies"] == 0 and case["kernels"] > 100
        assert case["losses"] == pytest.approx(case["expected"], rel=1e-4)  # sums in another order, over three steps
        assert case["losses"][2] < case["losses"][0]
