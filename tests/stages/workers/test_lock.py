"""The one lock: who waits is told for whom, and a lock ends with its process however that ends."""

import os
import subprocess
import sys
import threading

import pytest

from stages.workers.lock import locked

HOLDS = """
import sys
from pathlib import Path
from stages.workers.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "a" / ".lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_names_its_holder_and_ends_when_that_is_killed(tmp_path, holder):
    named, begun = [], threading.Event()

    def kill(who: str) -> None:
        named.append(who)
        holder.kill()
        begun.set()

    with locked(tmp_path / "a" / ".lock", busy=kill):
        assert begun.is_set() and named == [str(holder.pid)]
        assert (tmp_path / "a" / ".lock").read_text() == str(os.getpid())


def test_who_does_not_want_to_wait_raises(tmp_path, holder):
    def refuse(who: str) -> None:
        raise ValueError(f"held by {who}")

    with pytest.raises(ValueError, match=f"held by {holder.pid}"), locked(tmp_path / "a" / ".lock", busy=refuse):
        pass
    with locked(tmp_path / "b" / ".lock", busy=refuse):
        pass
