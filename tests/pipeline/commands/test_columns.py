"""What commands print fits the terminal, 80 columns at most, and holds no codes for colours where none are asked for."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import sqlite3
import sys
import threading
import warnings
from contextlib import closing, contextmanager, nullcontext

import click
import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from dpar_core.evaluation.golden import Case
from dpar_core.files import write_json
from pipeline.cli import app, main
from pipeline.results import MEANINGS
from pipeline.tracking.store import EXPERIMENT, PASS_TAG
from pipeline.tracking.ui import HEADLINE_METRICS
from stages.terminal import columns, figures, table, wrapped
from stages.tracker import LineProgress
from tests.helpers.paths import ROOT
from tests.helpers.report_artifacts import SIZE, tiny_params, write_artifacts

SECRET = "s3://AKIA:hunter2@bucket"
CASES = [Case("a network of the published code, logits, largest difference", 1.2e-6, 1e-5), Case("another", 3.0, 0.0)]


def commands(group: click.Group, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of every command and group of commands."""
    found = [before]
    for name, command in group.commands.items():
        found += commands(command, (*before, name)) if hasattr(command, "commands") else [(*before, name)]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory, fresh_store):
    """A project with everything made, outside git, and files of a user in it."""
    folder = tmp_path_factory.mktemp("project") / "of a user"
    params = tiny_params()
    write_artifacts(folder, params)
    for name in ("dvc.yaml", "params", "constraints.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(json.dumps(params.model_dump(mode="json")))
    summary = dict.fromkeys(MEANINGS, 0.12345)
    write_json(folder / "artifacts" / "metrics.json", summary)
    pixels = np.random.default_rng(0).integers(0, 255, (20, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(folder / "a.npz", pixels)
    for number, image in enumerate(pixels):
        path = folder / "own pictures" / ("cat", "a dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (path.parent / "broken.jpg").write_bytes(b"no image")
    write_runs(folder, fresh_store)
    return folder


def write_runs(folder, fresh_store):
    """Write two pipeline runs into the project's store: one with long numbers, one that failed, under other params."""
    shutil.copy(fresh_store, folder)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        (experiment,) = database.execute("SELECT experiment_id FROM experiments WHERE name = ?", (EXPERIMENT,)).fetchone()
        for number, (name, status) in enumerate((("a preset of a long name", "FINISHED"), ("demo", "FAILED"))):
            run = f"{number}" * 32
            columns = "run_uuid, name, status, start_time, lifecycle_stage, experiment_id"
            values = (run, f"{name} · DPAR 12.34 / baseline 23.45 nats", status, 10**12 + number, "active", experiment)
            database.execute(f"INSERT INTO runs ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
            database.execute("INSERT INTO tags (key, value, run_uuid) VALUES (?, 'a', ?)", (PASS_TAG, run))
            for param in ("train.steps", "entropy_model.train.learning_rate", "sample.cfg_scale"):
                database.execute("INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)", (param, str(number), run))
            for metric in HEADLINE_METRICS[: 6 * (1 - number)]:
                row = (metric, 1234.5678, 0, 0, 0, run)
                insert = (
                    "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) VALUES (?, ?, ?, ?, ?, ?)"
                )
                database.execute(insert, row)


@contextmanager
def on_a_terminal():
    """Let both streams be a terminal; yield a list that in the end holds what it was sent."""
    ours, theirs = pty.openpty()
    shown = []

    def listen() -> None:
        sent = b""
        while not sent.endswith(b"\0"):  # closing would take with it what is not read yet
            sent += os.read(ours, 1 << 16)
        shown.append(sent[:-1].decode().replace("\r\n", "\n"))

    listener = threading.Thread(target=listen)
    listener.start()
    with open(theirs, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        try:
            yield shown
        finally:
            print(end="\0", file=stream, flush=True)
            listener.join()
    os.close(ours)


@pytest.fixture
def printed(made, monkeypatch, capsys):
    """Run `dpar-cli WORDS` in the project and return both streams, as a pipe or a file gets them."""
    monkeypatch.chdir(made)
    (made / ".dvc").mkdir(exist_ok=True)
    (made / ".dvc" / "config.local").unlink(missing_ok=True)  # so that each command configures DVC, and prints it
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "DPAR_DEBUG", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM), threading.excepthook, warnings.showwarning

    def call(*words: str, terminal: bool = False) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dpar-cli", *words])
        with pytest.raises(SystemExit) as stopped, on_a_terminal() if terminal else nullcontext([]) as shown:
            main()
        said = capsys.readouterr()
        text = "".join(shown) + said.out + said.err
        assert "Traceback" not in text
        return int(stopped.value.code or 0), text

    yield call
    signal.signal(signal.SIGTERM, before[0])
    threading.excepthook, warnings.showwarning = before[1:]


def test_the_help_of_every_command_fits(monkeypatch):
    monkeypatch.chdir(ROOT)
    for number, words in enumerate(commands(typer.main.get_command(app))):
        width = (40, 80)[number % 2]
        text = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": str(width), "NO_COLOR": "1"}).output
        assert "Usage" in text and max(map(len, text.splitlines())) <= width, words


def test_the_examples_of_every_help_can_be_pasted():
    group = typer.main.get_command(app)
    found = 0
    for words in commands(group):
        command = group
        for word in words:
            command = command.commands[word]
        for line in (command.help or "").replace("\\\n", " ").splitlines():
            if line.startswith("    dpar-cli "):
                parsed = group.make_context("dpar-cli", shlex.split(line, comments=True)[1:])
                while rest := parsed._protected_args + parsed.args:
                    name, _, rest = parsed.command.resolve_command(parsed, rest)
                    parsed = parsed.command.commands[name].make_context(name, list(rest), parent=parsed)
                    if not hasattr(parsed.command, "commands"):
                        break
                assert parsed.command is command, line
                found += 1
    assert found > 10


# Every command that trains nothing and starts neither DVC nor Ray: words, and the status that it ends with.
PRINTED = {
    "status": 0,
    "status --graph": 0,
    "metrics": 0,
    "doctor": 0,
    "--version": 0,
    "params list": 0,
    "params check": 0,
    "params check --params missing/params.yaml": 1,
    "params use imagenet256": 1,
    "params use demo": 1,
    "cost demo": 0,
    "cost imagenet256-dpar-xl --currency EUR": 0,
    "run nothing": 1,
    "stage nothing": 1,
    "stage sources": 0,
    "runs": 0,
    "runs show 0": 0,
    "runs show 5": 1,
    "runs sync": 0,
    "data check": 0,
    "data inspect nobody": 1,
    "data inspect train-0000003": 0,
    "patches own_pictures/cat/0.png": 0,
    "patches missing.png": 1,
    "patches stats": 0,
    "sample --classes 1,2": 0,
    "sample --classes elephant": 1,
    "probe --models other": 1,
    "probe --images 18 --held-out 18": 0,
    "score a.npz --reference train": 1,
    "score a.npz --reference train --features inception": 1,
    "score a.npz --reference train --features demo": 1,
    "compare artifacts/scores/dpar.json artifacts/scores/llamagen.json": 0,
    "compare artifacts/scores/dpar.json missing.json": 1,
    "fetch something": 1,
    "fetch inception --to a.npz --url https://127.0.0.1/weights/of/the/network.pt": 0,
    "calibrate --gpt a.pt --vq b.pt --size B --cfg 2 --reference c.npz": 1,
    "sweep threshold --search hillclimbing": 1,
    "sweep cfg --model other": 1,
    "init --images own_pictures": 1,
    "init --images missing": 1,
    "verify": 1,
    "params use": 2,
    "nonsense": 2,
    "sweep threshold --images many": 2,
}


@pytest.mark.parametrize("words", PRINTED)
def test_what_commands_print_fits_a_pipe_and_a_narrow_terminal(printed, monkeypatch, words):
    monkeypatch.setattr("dpar_core.evaluation.golden.verify_folder", lambda folder: CASES)
    monkeypatch.setattr("pipeline.download.download", lambda url, to, sha256: "f" * 64)
    for width in (80, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        terminal = width == 60
        if terminal:
            monkeypatch.setenv("NO_COLOR", "1")
        arguments = (word.replace("own_pictures", "own pictures") for word in words.split())
        status, text = printed(*arguments, terminal=terminal)
        assert status == PRINTED[words], text
        if terminal:  # NO_COLOR takes colours away; bold may stay
            assert not re.search(r"\033\[(\d+;)*[349]\d", text)
            text = re.sub(r"\033\[[\d;]*m", "", text)
        assert "\033" not in text
        # A path or an address that is longer than the line stands alone on it, so that it can be copied.
        wide = [line for line in text.splitlines() if len(line) > width]
        assert not [line for line in wide if re.search(r"\s", line.strip())], "\n".join(wide)


@pytest.mark.parametrize("words", ["status", "stage nothing", "sweep cfg --model other"])
def test_colours_on_a_terminal_add_nothing_to_the_width(printed, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    text = printed(*words.split(), terminal=True)[1]
    assert "\033[" in text
    assert max(map(len, re.sub(r"\033\[[0-9;]*m", "", text).splitlines())) <= 60


def test_lines_of_progress_fit_and_keep_what_a_run_reads_of_them(monkeypatch, capsys):
    for width in (80, 60, 40):
        monkeypatch.setenv("COLUMNS", str(width))
        progress = LineProgress(1_200_000, "time llamagen_equal_time in turns", done=0, unit="images", interval=0.0)
        progress.advance(7, loss=2.3456)
        line = capsys.readouterr().err.rstrip("\n")
        assert len(line) <= width and re.fullmatch(r"time .* 7/1200000 images 0 % .*ETA \d+:\d\d:\d\d.*", line)


WITH_PASSWORDS = [
    *(f"{words} --params secret.yaml" for words in ("params show", "params list", "params check")),
    "status",
    "doctor",
    "data check",
    "run nothing",
    "stage sources",
    "cost demo",
    f"fetch inception --url {SECRET}/a.pt --to a.pt",
    f"init --images {SECRET}",
    f"patches image {SECRET}/a.png",
    f"sample --classes 1 --out {SECRET}",
    f"score {SECRET}/a.npz --reference {SECRET}/b.npz",
    f"compare {SECRET}/a.json {SECRET}/b.json",
    f"data inspect {SECRET}",
    f"verify {SECRET}",
    f"calibrate --gpt {SECRET}/a.pt --vq b.pt --size B --cfg 2 --reference c.npz",
]


@pytest.mark.parametrize("words", WITH_PASSWORDS)
def test_no_command_prints_a_password(made, printed, monkeypatch, words):
    params = json.loads((made / "params.yaml").read_text())
    params["data"] |= {"train": f"{SECRET}/train", "validation": f"{SECRET}/val"}
    params["tokenizer"] |= {"weights": f"{SECRET}/vq.pt"}
    params["train"] |= {"storage": f"{SECRET}/models"}
    params["score"] |= {"reference": f"{SECRET}/reference.npz"}
    (made / "secret.yaml").write_text(json.dumps(params))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{SECRET}/mlflow")
    monkeypatch.setenv("RAY_ADDRESS", f"{SECRET}/ray")
    text = printed(*words.split())[1]
    if "--params" not in words:
        before = (made / "params.yaml").read_bytes()
        (made / "params.yaml").write_text(json.dumps(params))
        try:
            text += printed(*words.split())[1]
        finally:
            (made / "params.yaml").write_bytes(before)
    assert "hunter2" not in text and text


def test_every_command_is_looked_at():
    apart = {("ui",), ("params", "show"), ()}  # serve, print a file
    known = [tuple(words.split()) for words in PRINTED]
    for words in commands(typer.main.get_command(app)):
        named = words[:-1] if words[-1:] == ("image",) else words
        assert words in apart or any(one[: len(named)] == named for one in known), words


def test_a_table_is_aligned_where_it_fits_and_a_list_where_it_does_not(monkeypatch):
    head, rows = ("case", "difference", "verdict"), [("a long name of a case", "0.5", "agrees"), ("b", "10", "DIFFERS")]
    monkeypatch.setenv("COLUMNS", "80")
    assert table(head, rows).splitlines() == [
        "case                   difference  verdict",
        "a long name of a case         0.5  agrees",
        "b                              10  DIFFERS",
    ]
    monkeypatch.setenv("COLUMNS", "40")
    assert table(head, rows).splitlines()[:4] == ["a long name of a case", "  difference 0.5", "  verdict agrees", "b"]


def test_commands_in_backticks_can_be_copied(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = wrapped("artifacts/tokens is missing: run `dpar-cli run tokenize_images`, which makes it", rest="  ")
    assert text.splitlines()[1] == "  `dpar-cli run tokenize_images`, which"
    assert "dpar-cli\n" in wrapped(f"run `dpar-cli {'x' * 39}`") and "\0" not in text


def test_lines_are_as_wide_as_the_terminal_and_80_columns_at_most(monkeypatch):
    for width, expected in (("40", 40), ("80", 80), ("300", 80), ("5", 30)):
        monkeypatch.setenv("COLUMNS", width)
        assert columns() == expected
        assert max(map(len, wrapped("word " * 60, first="[1/2] a ", rest=" " * 18).splitlines())) <= expected


def test_figures_keep_their_zeros_and_have_no_exponent():
    written = [figures(value, 3) for value in (13.0, 12.957, 999.6, 1234.5, 0.004196, -0.5, 0.0)]
    assert written == ["13.0", "13.0", "1,000", "1,234", "0.00420", "-0.500", "0"]
