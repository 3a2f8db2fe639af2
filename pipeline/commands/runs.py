"""`dpar-cli runs`: what MLflow has of the runs, and what it is still to get."""

from __future__ import annotations

from pathlib import Path

import typer

runs_app = typer.Typer(no_args_is_help=True, help="Look after the MLflow runs.")


@runs_app.command("sync")
def sync_runs() -> None:
    """Send to MLflow what it missed while it was away.

    Reads the journals in work/tracking/ of processes that are gone, and removes those that are delivered. The next run
    does the same by itself. Exit 1 with the reason when MLflow cannot be written.
    """
    from pipeline.tracking import outbox

    root = Path.cwd()
    if not (root / "dvc.yaml").exists():
        raise FileNotFoundError(f"no dvc.yaml in {root}: go to the project's folder first")
    sender = outbox.Outbox(root, print)
    waiting = len(outbox.journals(root))
    count = outbox.sync(sender)
    left = len(outbox.journals(root))
    if not waiting:
        print(f"nothing waits for MLflow at {sender.uri}")
        return
    print(f"sent {count} records of {waiting - left} processes to MLflow at {sender.uri}")
    if left:
        print(f"{left} more belong to processes that are still at work, which send them themselves")
