"""Where `dpar-cli` begins: nothing is imported yet, so that Ctrl-C gives no traceback during the other imports."""

from __future__ import annotations

import os

from pipeline.boundary import guarded


def main() -> None:
    """Run dpar-cli; pipeline/boundary.py determines how it ends."""
    # Threads of torch wait for each other asleep, here and in all that is started. Awake, as is the default, two of them on
    # two cores that other programs use made steps eight times slower than so, and took eight times the CPU (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    guarded(_start)


def _start() -> None:
    from pipeline.cli import start

    start()
