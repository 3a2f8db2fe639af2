"""The short form of `make faults`: some faults of the cheap kinds in four stages that start no other process."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

STAGES, KINDS = "sources,data,tokenizer,tokenize_images", "kill,stop,disk,file limit,input,output,work,clock"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted by a call of Linux")
def test_after_a_fault_a_rerun_gives_the_undisturbed_bytes_and_nothing_is_left():
    words = [sys.executable, "-m", "tests.faults", "--count", "12", "--seed", "2582", "--stages", STAGES, "--kinds", KINDS]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert "12 faults, 0 with problems" in done.stdout
