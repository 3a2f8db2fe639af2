"""Where `dpar-cli` begins: nothing is imported yet, so that Ctrl-C gives no traceback during the other imports."""

from __future__ import annotations

import os

from pipeline.boundary import guarded


def main() -> None:
    """Run dpar-cli; pipeline/boundary.py determines how it ends."""
    # Threads of torch wait for each other awake for microseconds only, here and in all that is started. By the default it is
    # milliseconds, and on two cores that other programs use that made steps four to eight times slower (docs/log.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    guarded(_start)


def _start() -> None:
    from pipeline.cli import start

    start()
