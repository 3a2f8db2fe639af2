"""Pictures of the report and of MLflow's pages for the docs and for looking at: `python -m tests.browser.screenshots`.

Reads artifacts/report/index.html (made by `dpar-cli run`) and writes docs/report.png; with --all FOLDER the whole page at
390, 768 and 1440 pixels, light and dark, and as it is printed. With --mlflow it starts `dpar-cli ui` in the current project
and writes docs/mlflow-*.png of its newest pipeline run and, where there is one, its newest sweep.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser.chromium import Browser

PORT, PATIENCE = 5017, 120.0  # seconds until MLflow answers, and until a page of it has what it shows
DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("artifacts/report/index.html"))
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    parser.add_argument("--mlflow", action="store_true")
    options = parser.parse_args()
    page = options.report.resolve(strict=True)
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        if options.mlflow:
            with pages_of_mlflow() as runs:
                pictures_of_mlflow(browser, runs)
            return
        if options.all is None:
            browser.show(page, width=1180, height=1010)
            browser.picture(DOCS / "report.png")
            return
        options.all.mkdir(parents=True, exist_ok=True)
        for width in (390, 768, 1440):
            for dark in (False, True):
                browser.show(page, width=width, dark=dark)
                browser.picture(options.all / f"{width}-{'dark' if dark else 'light'}.png", whole=True)
        browser.printed(options.all / "printed.pdf")


@contextmanager
def pages_of_mlflow() -> Iterator[list[Any]]:
    """Serve the project's store; yield its runs, newest first."""
    from pipeline.tracking.outbox import opened

    client, experiment = opened(Path.cwd())
    runs = client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=1000)
    command = [sys.executable, "-c", "from pipeline.main import main; main()", "ui", "--no-browser", "--port", str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait("MLflow", _listens)
            yield runs
        finally:
            server.terminate()


def pictures_of_mlflow(browser: Browser, runs: list[Any]) -> None:
    """Write docs/mlflow-*.png: the table of runs, a pipeline run, a model, a stage's machine, a sweep and its trials."""
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trained = next(run for run in parents if "dpar.pass" in run.data.tags)
    train = next(run for run in runs if run.data.tags.get("dpar.stage") == "train_dpar")
    experiment = f"http://127.0.0.1:{PORT}/dpar#/experiments/{trained.info.experiment_id}"
    table = f"{experiment}/runs?workflowType=machine_learning"

    def take(name: str, address: str, words: str, *, width: int = 1280, height: int = 900, press: str = "") -> None:
        browser.show("about:blank", width=width, height=height)
        browser.show(address, width=width, height=height)
        _wait(f"{words!r} on {name}", lambda: words in browser.ask("document.body.innerText"))
        if press:
            browser.ask(press)
        time.sleep(4)  # charts are drawn after their words
        assert "Evaluation runs" not in browser.ask("document.body.innerText"), "the pages for language models"
        path = DOCS / f"mlflow-{name}.png"
        browser.picture(path)
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)

    take("runs", table, trained.info.run_name[:4], width=1440, height=420)
    click = f"[...document.querySelectorAll('a')].find(one => one.textContent === {trained.info.run_name!r}).click()"
    take("run", table, trained.info.run_name, height=1100, press=click)
    take("system", f"{experiment}/runs/{train.info.run_id}/system-metrics", "disk_usage_percentage")
    take("model", f"{experiment}/models/{train.outputs.model_outputs[0].model_id}", "Model ID")
    sweep = next((run for run in parents if "dpar.sweep" in run.data.tags), None)
    if sweep is not None:
        take("sweep", f"{experiment}/runs/{sweep.info.run_id}", "Description", height=670)
        below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == sweep.info.run_id]
        trials = [run for run in below if not run.info.run_name.startswith("final")]
        listed = ",".join(f'"{run.info.run_id}"' for run in trials)
        query = f'runs=[{listed}]&experiments=["{sweep.info.experiment_id}"]'
        take("trials", f"http://127.0.0.1:{PORT}/dpar#/compare-runs?{query}", "Run details")


def _listens() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) == 0


def _wait(what: str, there: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < until, f"no {what} after {PATIENCE:g} s"
        time.sleep(0.5)


if __name__ == "__main__":
    main()
