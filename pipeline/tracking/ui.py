"""The pages of MLflow: their address, is the port free, and a browser that opens once they are there."""

from __future__ import annotations

import socket
import subprocess
import sys
from importlib.metadata import entry_points

# At the runs of whole pipelines, in this order (see summary.py).
HEADLINE_METRICS = ("dpar_loss", "baseline_loss", "dpar_distance", "baseline_distance", "training_speed", "sampling_speed")
APP = "dpar"  # name of server.py in pyproject.toml

# A process of its own, as the one that asks becomes the server. It gives up after a minute.
_OPENER = """
import socket, sys, time, webbrowser
for _ in range(240):
    time.sleep(0.25)
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[2])), 1).close()
    except OSError:
        continue
    webbrowser.open(sys.argv[1])
    break
"""


def runs_address(experiment: str, port: int) -> str:
    """Return the address of the runs. The page /dpar of server.py goes on to them, with their headline metrics as columns.

    `workflowType` is for a browser that has chosen otherwise before.
    """
    return f"http://127.0.0.1:{port}/dpar#/experiments/{experiment}/runs?workflowType=machine_learning"


def check_server() -> None:
    """Raise RuntimeError in a sentence where MLflow would not find server.py."""
    if not any(one.name == APP for one in entry_points(group="mlflow.app")):
        raise RuntimeError(
            f"dpar was installed before its code changed (MLflow knows no app {APP!r}): run `make environment`"
        )


def check_port(port: int) -> None:
    """Raise ValueError in a sentence when something else listens on a port of the loopback address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None


def open_when_there(address: str, port: int) -> None:
    """Open an address in the user's browser as soon as something answers on the port."""
    subprocess.Popen(
        [sys.executable, "-P", "-c", _OPENER, address, str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
