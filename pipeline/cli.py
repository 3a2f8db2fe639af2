"""dpar-cli: the commands. Nothing heavy is imported before a command runs, so help is there at once."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.boundary import carry_errors, guarded
from pipeline.commands.data import data_app, patches_app
from pipeline.commands.init import init
from pipeline.commands.probe import probe
from pipeline.commands.runs import runs_app
from pipeline.commands.score import calibrate, compare, fetch, score
from pipeline.commands.sweep import sweep_app
from pipeline.commands.workflow import doctor, metrics, run, status
from pipeline.cost import cost
from pipeline.project import enter_project, follow_paths, keep_caches_writable, project_folder

app = typer.Typer(
    name="dpar-cli",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"dpar {version('dpar')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Dynamic patchification for autoregressive image generation (DPAR), as one reproducible workflow.

    Begin with `dpar-cli run`: it makes everything from the built-in photographs to the report.
    Then open artifacts/report/index.html, or compare runs with `dpar-cli ui`. `dpar-cli COMMAND -h` has examples.
    """


params_app = typer.Typer(no_args_is_help=True, help="Look at params.yaml, check it, or take a preset of params/.")
app.add_typer(params_app, name="params")
app.add_typer(data_app, name="data")
app.add_typer(patches_app, name="patches")
app.add_typer(sweep_app, name="sweep")
app.add_typer(runs_app, name="runs")
for command in (init, run, status, metrics, doctor, cost):
    app.command()(command)
app.command()(probe)
for scoring in (score, compare, fetch, calibrate):
    app.command()(scoring)

PARAMS = Path("params.yaml")
ParamsFile = Annotated[Path, typer.Option("--params", help="Params file to read.")]


@app.command()
def stage(name: Annotated[str, typer.Argument(help="Stage of dvc.yaml, as data, tokenizer or train_dpar.")]) -> None:
    """Run one stage, as `dvc repro` does.

    Reads params.yaml and the artifacts of earlier stages; writes the stage's outputs under artifacts/ (dvc.yaml lists
    them). Long work continues where an interrupted run stopped. Next: `dpar-cli run`, which runs what is out of date.
    """
    from pipeline.runner import run_stage

    run_stage(name, root=project_folder(), params_file=PARAMS)


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on the loopback address.")] = 5000,
    browser: Annotated[bool, typer.Option(help="Open the page once it is there.")] = True,
) -> None:
    """Serve the MLflow pages that compare runs, on 127.0.0.1 only, and open them. Reads the store; stop with Ctrl-C."""
    from dpar_core.secrets import redacted
    from pipeline.tracking.outbox import opened
    from pipeline.tracking.store import store_root, tracking_uri
    from pipeline.tracking.ui import APP, check_port, check_server, open_when_there, runs_address
    from stages.terminal import print_fitted

    root = project_folder()
    check_port(port)
    check_server()
    uri, address = tracking_uri(root), runs_address(opened(root)[1], port)
    print_fitted(f"runs        {address}  (there in about 15 s; Ctrl-C stops it)\nstore       {redacted(uri)}")
    artifacts = (store_root(root) / "mlartifacts").as_uri()
    environment = {
        **os.environ,
        # Through the environment: the address may hold a password.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        **({} if "MLFLOW_TRACKING_URI" in os.environ else {"MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts}),
    }
    environment |= {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    # Not the code of the current folder, which uvicorn would take as well.
    ours = str(Path(__file__).resolve().parents[1])
    options = shlex.join(["--app-dir", ours, "--no-access-log", "--log-level", "warning"])
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--app-name", APP, "--uvicorn-opts", options]
    if browser and sys.stdout.isatty():
        open_when_there(address, port)
    os.execve(sys.executable, command, environment)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder in the format of tests/golden.")] = Path("tests/golden"),
) -> None:
    """Compare our networks and metrics with recorded outputs of the published code.

    Reads .npz and .safetensors of the folder; prints the largest difference and the tolerance of every case. Exit 1 when
    one fails.
    """
    from dpar_core.evaluation.golden import verify_folder
    from stages.terminal import table

    cases = verify_folder(folder)
    rows = [
        (one.name, f"{one.difference:.3g}", f"{one.tolerance:.3g}", "agrees" if one.passed else "DIFFERS") for one in cases
    ]
    print(table(("case", "difference", "tolerance", "verdict"), rows))
    failed = sum(not case.passed for case in cases)
    print(f"{len(cases) - failed} of {len(cases)} cases agree")
    if failed:
        raise SystemExit(1)


@app.command()
def sample(
    classes: Annotated[str, typer.Option(help="Class ids or names, separated by commas; a row of the grid each.")],
    seed: Annotated[int, typer.Option(help="Image i depends on seed + i alone.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("grid.png"),
    model: Annotated[str, typer.Option(help="dpar, or llamagen: the baseline.")] = "dpar",
    count: Annotated[int, typer.Option(help="Images per class.")] = 4,
    cfg_scale: Annotated[
        float | None, typer.Option(help="Guidance: 1 is off, 2 is usual; sample.cfg_scale of params.yaml when left out.")
    ] = None,
    borders: Annotated[bool, typer.Option("--borders", help="Draw the borders of the patches (dpar).")] = False,
    given: Annotated[
        Path | None,
        typer.Option(help="Image file; the first rows of its centre crop are kept and continued downwards."),
    ] = None,
    keep_rows: Annotated[int, typer.Option(help="Rows of tokens of --given to keep: 1 to all but one.")] = 0,
) -> None:
    """Sample a few images with the trained models.

    Reads the models under artifacts/ and the sample section of params.yaml; writes one PNG. The same seed gives the same
    pictures. A whole set with its scores: `dpar-cli run score_dpar`.

        dpar-cli sample --classes 1,2,3 --seed 7 --out grid.png
        dpar-cli sample --classes 1,2,3 --borders
        dpar-cli sample --classes cat --given photo.png --keep-rows 4
    """
    from pipeline.commands.sample import sample_grid
    from stages.terminal import print_fitted

    line = sample_grid(
        classes,
        seed,
        out,
        model=model,
        count=count,
        cfg_scale=cfg_scale,
        borders=borders,
        given=given,
        keep_rows=keep_rows,
        root=project_folder(),
        params_file=PARAMS,
    )
    print_fitted(line)


@params_app.command("show")
def params_show(name: Annotated[str | None, typer.Argument(help="A preset; params.yaml when left out.")] = None) -> None:
    """Print a preset, or params.yaml, with every value and its unit."""
    from pipeline.presets.use import preset_file
    from stages.params import params_text

    print(params_text(preset_file(project_folder(), name) if name else PARAMS), end="")


@params_app.command("use")
def params_use(
    name: Annotated[str, typer.Argument(help="Name of a preset in params/.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite a params.yaml that differs from every preset.")] = False,
) -> None:
    """Write a preset to params.yaml.

    A params.yaml that you have changed is kept as params.yaml.bak. Next: `dpar-cli run`.
    """
    from pipeline.presets.use import use_preset
    from stages.terminal import print_fitted

    print_fitted(use_preset(project_folder(), name, force=force))


@params_app.command("check")
def params_check(params: ParamsFile = PARAMS) -> None:
    """List everything that is wrong with params.yaml, one sentence each; exit 1 when something is.

    Values that have no effect beside the others are named as well, and are no error.
    """
    from pipeline.idle import idle_values
    from stages.params import load_params
    from stages.terminal import print_fitted

    checked = load_params(params)
    print_fitted(f"{params} is valid")
    for one in idle_values(checked, Path()):
        print_fitted(f"{one.found}: {one.way_out}")


@params_app.command("list")
def params_list() -> None:
    """List the presets, each with what it is for."""
    from pipeline.presets.use import preset_lines

    print("\n".join(preset_lines(project_folder())))


def main() -> None:
    """Run dpar-cli; pipeline/boundary.py determines how it ends."""
    guarded(start)


def start() -> None:
    """Enter the project and run the command line's command; errors come out as they are."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("COLUMNS", "LINES"):  # rich shows nothing on a terminal of 0 columns, and no other size than a plain number
        if name in os.environ and not re.fullmatch("[1-9][0-9]{0,5}", os.environ[name]):
            del os.environ[name]
    keep_caches_writable()
    started = enter_project()
    if started not in (None, Path.cwd()):
        follow_paths(app, started)
    carry_errors(app)
    app()
