"""Where `dpar-cli` begins: nothing is imported yet, so that Ctrl-C gives no traceback during the other imports."""

from __future__ import annotations

from pipeline.boundary import guarded


def main() -> None:
    """Run dpar-cli; pipeline/boundary.py determines how it ends."""
    guarded(_start)


def _start() -> None:
    from pipeline.cli import start

    start()
