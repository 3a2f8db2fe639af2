"""Freed blocks stay with a process that asks for it."""

import os
import subprocess
import sys

import pytest

from dpar_core.training.allocator import ENVIRONMENT

FAULTS = """
import resource, sys, threading
from dpar_core.training.allocator import keep_freed_blocks
if sys.argv[1] == "asked": assert keep_freed_blocks()
def fill():
    first = None
    for _ in range(8):
        b"x" * (64 << 20)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        first = first or faults
    print(faults - first)
if sys.argv[1] == "thread":
    one = threading.Thread(target=fill); one.start(); one.join()
else:
    fill()
"""


def page_faults(how, **environment):
    words = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(words, env={**os.environ, **environment}, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's switches")
def test_blocks_are_touched_anew_only_when_they_are_handed_back():
    pages_of_seven_blocks = 7 * (64 << 20) // 4096
    fresh = page_faults("not")
    if fresh < pages_of_seven_blocks // 2:
        pytest.skip("this system does not hand blocks back page by page")
    assert page_faults("asked") < fresh / 20
    assert page_faults("thread", **ENVIRONMENT) < fresh / 20
