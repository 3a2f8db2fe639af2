"""No traceback above dpar-cli: a sentence, an exit status, and the details in a file."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.client import IncompleteRead
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer
from safetensors import safe_open

from dpar_core.secrets import redacted
from pipeline import boundary, cli
from stages import crash, terminal
from tests.helpers.paths import ROOT


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPAR_DEBUG", raising=False)
    monkeypatch.setattr(terminal, "WIDTH", 9999)  # sentences as they are; test_columns.py has their lines
    monkeypatch.setenv("COLUMNS", "9999")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["dpar-cli", "stage", "s3://KEY:hunter2@bucket"])
    return tmp_path


def ended(run, capsys) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(run)
    boundary.carry_errors(app)
    with pytest.raises(SystemExit) as caught:
        boundary.guarded(lambda: app([], standalone_mode=True))
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Aborted" not in said and "hunter2" not in said
    return caught.value.code, said


def raises(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError(), ZeroDivisionError("division by zero"), IncompleteRead(b"ab")]
)
def test_an_error_that_nobody_foresaw_is_one_sentence_and_a_file(project, capsys, monkeypatch, error):
    monkeypatch.setattr(crash, "_ROOMS", (str(ROOT / "stages"),))  # this test is not one of our rooms
    status, said = ended(raises(error), capsys)
    (file,) = (project / "work").glob("crash-*.txt")
    assert status == 70 and len(said.splitlines()) == 1
    assert type(error).__name__ in said and str(file) in said
    details = file.read_text()
    assert "Traceback" in details and "in command" in details and "hunter2" not in details


def test_what_a_library_says_is_not_taken_for_our_sentence(project, capsys):
    def command():
        np.zeros(3) + np.zeros(4)

    status, said = ended(command, capsys)
    assert status == 70 and "operands could not be broadcast" in said


@pytest.mark.parametrize("number", crash.DISK, ids=errno.errorcode.get)
def test_what_a_disk_says_comes_with_the_file_and_the_way_out(project, capsys, number):
    status, said = ended(raises(OSError(number, os.strerror(number), "artifacts/x.json")), capsys)
    assert status == 1 and said.startswith("artifacts/x.json: ") and "run the same command again" in said
    assert not (project / "work").exists()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), TimeoutError("no answer")])
def test_a_connection_that_fails_is_no_unexpected_error(project, capsys, monkeypatch, error):
    monkeypatch.setattr(crash, "_ROOMS", (str(ROOT / "stages"),))
    status, said = ended(raises(error), capsys)
    assert status == 1 and said.startswith("a connection failed (") and str(error) in said


def test_a_sentence_of_ours_is_shown_as_it_is_without_its_passwords(project, capsys, monkeypatch):
    monkeypatch.setattr(crash, "_ROOMS", (str(Path(__file__).parent),))
    status, said = ended(raises(ValueError("cannot read http://me:hunter2@host/x: set another address")), capsys)
    assert status == 1 and said.startswith("cannot read http://***@host/x: set another address\n")
    assert not (project / "work").exists()


@pytest.mark.parametrize(
    ("name", "content", "read", "words"),
    [
        ("a.npz", b"PK\x03\x04 cut short", lambda path: zipfile.ZipFile(path), "is not an intact zip file"),
        ("b.json", b"", lambda path: json.loads(path.read_text()), "is not intact JSON"),
        ("c.safetensors", b"\x08", lambda path: safe_open(path, framework="pt"), "is not an intact safetensors file"),
        ("d.txt", b"\xff\xfe\xfa", lambda path: path.read_text(encoding="utf-8"), "is not text in UTF-8"),
    ],
)
def test_a_damaged_file_is_named(project, capsys, monkeypatch, name, content, read, words):
    monkeypatch.setattr(crash, "_ROOMS", (str(Path(__file__).parent),))
    path = project / name
    path.write_bytes(content)

    def command():
        reader(path)

    def reader(path: Path):
        return read(path)

    status, said = ended(command, capsys)
    assert status == 1 and said.startswith(f"{path} {words} (")


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (boundary.Terminated(), 143), (EOFError("cut"), 70), (MemoryError(), 1)],
)
def test_what_stops_a_command_has_its_exit_status(project, capsys, monkeypatch, error, status):
    monkeypatch.setattr(crash, "_ROOMS", (str(ROOT / "stages"),))
    assert ended(raises(error), capsys)[0] == status


def test_what_a_library_raises_when_it_is_interrupted_is_an_interruption(project, capsys):
    def command():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise UnboundLocalError("cannot access local variable 'node'")  # noqa: B904

    assert ended(command, capsys)[0] == 130


def test_a_crash_file_that_cannot_be_written_does_not_hide_the_error(project, capsys):
    (project / "work").write_text("no folder")
    status, said = ended(raises(KeyError("lost shard")), capsys)
    assert status == 70 and "lost shard" in said and "could not be written" in said


def test_a_reader_of_our_output_that_leaves_is_no_error():
    line = f"{sys.executable} -P -c 'from pipeline.main import main; main()' cost --help"
    pipe = f"set -o pipefail; {line} | head -c1"
    found = subprocess.run(["bash", "-c", pipe], capture_output=True, cwd=ROOT)
    assert b"Traceback" not in found.stderr and b"Broken" not in found.stderr


def test_sigterm_ends_a_command_with_a_sentence(tmp_path):
    code = "from pipeline import main\nimport time\n"
    code += "def start():\n    print('ready', flush=True)\n    time.sleep(60)\nmain._start = start\nmain.main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", code], text=True, cwd=tmp_path, **pipes)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=120)[1]
    assert child.returncode == 143 and "stopped; run the same command again" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:hunter2@bucket/x", "s3://***@bucket/x"),
        ("s3://KEY:hun/ter2@bucket/x", "s3://***@bucket/x"),
        ("postgresql://u:hunter2@host:5432/db?password=hunter2&a=1", "postgresql://***@host:5432/db?password=***&a=1"),
        ("https://hunter2@host/x", "https://***@host/x"),
        ("read http://a:hunter2@c/d, then s3://e:hunter2@g: why", "read http://***@c/d, then s3://***@g: why"),
        ("https://host/x?X-Amz-Signature=hunter2&part=1", "https://host/x?X-Amz-Signature=***&part=1"),
        ("no file at s3:/KEY:hunter2@bucket/x", "no file at s3:/***@bucket/x"),
        ("http://127.0.0.1:5000/#/runs", "http://127.0.0.1:5000/#/runs"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("git@github.com:a/b", "git@github.com:a/b"),
    ],
)
def test_credentials_of_addresses_are_redacted_and_nothing_else(text, shown):
    assert redacted(text) == shown


@pytest.mark.parametrize("value", ["nan", "1e400", "-inf"])
def test_a_number_that_is_none_is_refused_with_its_option(capsys, monkeypatch, value):
    app = typer.Typer()

    @app.command()
    def read(cfg_scale: Annotated[float, typer.Option()]) -> None:
        print("read")

    boundary.carry_errors(app)
    monkeypatch.setattr(sys, "argv", ["dpar-cli", f"--cfg-scale={value}"])
    with pytest.raises(SystemExit) as ended:
        boundary.guarded(app)
    assert ended.value.code == 1 and f"--cfg-scale is {float(value)}, expected a finite number" in capsys.readouterr().err


def test_a_group_that_does_something_by_itself_ends_as_a_command_does(project, capsys):
    app, group = typer.Typer(), typer.Typer()
    group.callback(invoke_without_command=True)(raises(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    app.add_typer(group, name="runs")
    boundary.carry_errors(app)
    with pytest.raises(SystemExit) as ended:
        boundary.guarded(lambda: app(["runs"], standalone_mode=True))
    assert ended.value.code == boundary.PIPE_CLOSED and capsys.readouterr().err.strip() == ""


@pytest.mark.parametrize("columns", ["0", "²", "1" * 30])
def test_a_terminal_of_a_size_that_cannot_be_hides_no_error(project, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", ["dpar-cli", "ui", "--port=x"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "Invalid value for '--port'" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_refused_with_their_option(capsys, monkeypatch):
    app = typer.Typer()

    @app.command()
    def read(key: Annotated[str, typer.Option()]) -> None:
        print(f"read {key}")

    boundary.carry_errors(app)
    for value, status, expected in (("\udcff", 1, r"--key is '\udcff', expected text"), ("ä😀", 0, "read ä😀")):
        monkeypatch.setattr(sys, "argv", ["dpar-cli", f"--key={value}"])
        with pytest.raises(SystemExit) as ended:
            boundary.guarded(app)
        said = capsys.readouterr()
        assert ended.value.code == status and expected in said.out + said.err


UNREADABLE = {
    "pipe": (os.mkfifo, "a device, a pipe or a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device, a pipe or a socket"),
    "loop": (lambda path: path.symlink_to(path.name), "a link that leads to itself"),
}


@pytest.mark.parametrize(("make", "what"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_path_whose_reading_never_ends_is_refused(project, capsys, monkeypatch, make, what):
    make(project / "params.yaml")
    app = typer.Typer()

    @app.command()
    def read(params: Path) -> None:
        params.read_bytes()

    boundary.carry_errors(app)
    monkeypatch.setattr(sys, "argv", ["dpar-cli", "params.yaml"])
    with pytest.raises(SystemExit) as ended:
        boundary.guarded(app)
    assert ended.value.code == 1 and f"params.yaml is {what}" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["s3://KEY:SECRET@bucket/x.png", "http://u:SECRET@host/x"])
def test_an_address_in_place_of_a_path_is_refused_and_nothing_is_written(project, capsys, monkeypatch, address):
    app = typer.Typer()

    @app.command()
    def write(out: Path) -> None:
        out.parent.mkdir(parents=True)

    boundary.carry_errors(app)
    before = sorted(project.iterdir())
    monkeypatch.setattr(sys, "argv", ["dpar-cli", address])
    with pytest.raises(SystemExit) as ended:
        boundary.guarded(app)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "is an address, expected a path of this machine" in said and "SECRET" not in said
    assert sorted(project.iterdir()) == before


def test_names_with_brackets_are_printed_as_they_are():
    from stages.terminal import table

    text = table(("cat [/b]", "[red]x"), [(":dog: [/b]", "[bold]1[/bold]")])
    assert all(name in text for name in ("cat [/b]", "[red]x", ":dog: [/b]", "[bold]1[/bold]"))


def test_ctrl_c_while_the_program_starts_is_no_traceback():
    child = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-c", "from pipeline.main import main; main()", "--help"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    lines = []
    for line in child.stderr:
        lines.append(line)
        if line.split("|")[-1].strip() == "pipeline.boundary":
            time.sleep(0.05)
            child.send_signal(signal.SIGINT)
            break
    rest = child.stderr.read()
    assert child.wait() in (130, 0)
    assert "Traceback" not in rest


def test_what_a_kill_left_half_published_is_removed_by_the_next_start(tmp_path, monkeypatch):
    from contextlib import nullcontext

    from pipeline import runner
    from stages.tracker import NullTracker

    monkeypatch.chdir(tmp_path)
    stage = runner.load_stage("data")
    for file in vars(stage.bind(tmp_path)[0]).values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    for output in vars(stage.bind(tmp_path)[1]).values():
        output.parent.mkdir(parents=True, exist_ok=True)
        left = output.with_name(f".{output.name}.abc123.tmp")
        left.mkdir()
        (left / "copy").write_bytes(b"half")
    (tmp_path / "artifacts" / "data" / "keep.tmp").write_text("a user's own")
    monkeypatch.setattr(runner, "open_tracker", lambda *_, **__: nullcontext(NullTracker()))
    monkeypatch.setattr(
        runner, "load_stage", lambda name: runner.LoadedStage(**{**vars(stage), "run": lambda *_, **__: None})
    )
    runner.run_stage("data", root=tmp_path, params_file=ROOT / "params.yaml")
    assert [path.name for path in (tmp_path / "artifacts").rglob("*.tmp")] == ["keep.tmp"]


STARTS_DVC = """
import subprocess, sys
dvc = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(dvc.pid, flush=True)
input()
"""


@pytest.mark.parametrize(("killed", "heard"), [("dvc repro", True), ("dpar-cli run", True), ("dpar-cli run", False)])
def test_a_stage_stops_when_its_dvc_or_what_started_that_is_gone(tmp_path, monkeypatch, capfd, killed, heard):
    import psutil

    from pipeline import runner

    above = subprocess.Popen(
        [sys.executable, "-c", STARTS_DVC, "/bin/dpar-cli"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    dvc, stopped = psutil.Process(int(above.stdout.readline())), threading.Event()
    kill = os.kill
    monkeypatch.setattr(runner, "_WATCH_SECONDS", 0.02)
    monkeypatch.setattr(runner, "pass_identity", lambda _: ("a run", "at noon", dvc))
    monkeypatch.setattr(os, "kill", lambda *what: what == (os.getpid(), signal.SIGTERM) and stopped.set())
    runner._end_with_dvc(tmp_path)
    assert not stopped.wait(0.1)
    if not heard:  # who would read it is the one that is gone
        reading, writing = os.pipe()
        os.close(reading)
        monkeypatch.setattr(sys, "stderr", os.fdopen(writing, "w"))
    kill(dvc.pid if killed == "dvc repro" else above.pid, signal.SIGKILL)
    assert stopped.wait(120) and (not heard or f"{killed} (process" in capfd.readouterr().err)
    for process in (above, dvc):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            kill(process.pid, signal.SIGKILL)
    above.communicate()


def test_a_pipeline_of_somebody_else_is_not_run(tmp_path):
    for name in ("pipeline.py", "stages.py"):
        (tmp_path / name).write_text("raise SystemExit('code of somebody else')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    words = [sys.executable, "-c", "import sys; sys.argv[1:] = ['--help']; import dpar_start; dpar_start.main()"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "doctor" in done.stdout and "somebody else" not in done.stderr
