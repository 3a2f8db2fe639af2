"""Ray Train's local mode in a process of its own: one worker on this machine, and no cluster beside it.

A cluster's processes wake up some thousand times per second even when they have nothing to do; where training has all cores
of a small machine that costs 6 % of a step (docs/log.md), and starting them takes seconds. One worker needs none of them.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpar_core.files import write_json
from dpar_core.training import allocator
from stages.workers.child import command


@dataclass(frozen=True)
class Call:
    """What the process is asked for.

    function: importable by name, without arguments.
    returned: JSON file for its result.
    """

    name: str
    function: Callable[[], Any]
    returned: Path


class LocalFit(threading.Thread):
    """Ray Train's `fit` with one worker, in a child process that ends with this one."""

    def __init__(self, call: Call) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._call = call
        call.returned.unlink(missing_ok=True)
        # A session of its own: Ctrl-C reaches this process alone, which then ends the other.
        self._process = subprocess.Popen(
            command(__name__),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **allocator.ENVIRONMENT},
            start_new_session=True,
        )
        self.start()

    def run(self) -> None:
        assert self._process.stdin is not None  # a pipe, as asked for
        try:
            pickle.dump(self._call, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:  # it died at once; its exit status shows it
            pass
        self._process.wait()

    def stop(self) -> None:
        """End the process if it is still there."""
        self._process.kill()
        self._process.wait()

    def outcome(self) -> dict[str, Any]:
        """Return what the function returned. Raises RuntimeError when the process died before that."""
        if self._call.returned.exists():
            returned: dict[str, Any] = json.loads(self._call.returned.read_text("utf-8"))
            return returned
        status = self._process.returncode
        if status == -signal.SIGKILL:
            raise RuntimeError(
                "the training process was killed (signal 9): if that was for want of memory, raise `accumulate` or free "
                "memory; the same command goes on from the last checkpoint (a smaller `batch_size` helps as well, but "
                "starts the run afresh)"
            )
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        raise RuntimeError(
            f"the training process ended with {how}, its output is above; the same command goes on from the last checkpoint"
        )


def main() -> None:
    """Do what standard input asks for, and leave when it closes: whoever asked is gone then."""
    call = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    logging.getLogger("ray").setLevel(logging.ERROR)  # Ray sets it when it is imported
    trainer = DataParallelTrainer(
        call.function, scaling_config=ScalingConfig(num_workers=0), run_config=RunConfig(name=call.name)
    )
    value = trainer.fit().return_value
    write_json(call.returned, value)


def _leave_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through sys.stdin, whose lock Python asks for when it ends
    os._exit(1)
