"""MLflow stores that work, and servers that do not."""

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.tracking import outbox, store


def delivered(root: Path, seconds: float = 300.0) -> None:
    """Wait until no journal of a project waits any more."""
    until = time.monotonic() + seconds
    while outbox.journals(root):
        assert time.monotonic() < until, f"not delivered: {outbox.journals(root)}"
        time.sleep(0.05)


def runs(root: Path):
    """Return (client, run by name) of a project's store."""
    delivered(root)
    client, experiment = store.connect(root)
    return client, {run.info.run_name: run for run in client.search_runs([experiment])}


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def failing_server(status: int = 500) -> Iterator[str]:
    """Answer everything with one HTTP status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(status)
            self.end_headers()

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def closed_port() -> str:
    """Return an address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def headline_of_a_run() -> dict[str, Any]:
    """Return what the report says in short of a run whose sampling was timed on a busy machine."""
    return {
        "badge": "Demo: nine photographs, one seed.",
        "headline": "No clear difference at equal steps.",
        "verdicts": [
            {
                "title": "No clear difference at equal steps",
                "sentence": "All overlap.",
                "rows": [
                    {
                        "words": "validation loss",
                        "dpar": {"value": 2.791, "interval": [2.7, 2.9]},
                        "baseline": {"value": 2.862, "interval": [2.8, 2.95]},
                    },
                    {
                        "words": "recall",
                        "dpar": {"value": 0.5, "interval": None},
                        "baseline": {"value": 0.4, "interval": None},
                    },
                ],
            }
        ],
        "training_speed": {"ratio": 1.07, "doubt": ""},
        "sampling_speed": {"ratio": None, "doubt": "the machine was busy"},
    }
