"""A project outside git, commands from below its folder, and homes that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipeline import project
from tests.helpers.paths import ROOT


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "ä b%20?#1"
    (root / ".dvc").mkdir(parents=True)
    (root / "dvc.yaml").touch()
    return root


def test_the_project_is_found_from_any_folder_below_it(folder):
    below = folder / "work" / "x"
    below.mkdir(parents=True)
    assert project.find_project(below) == project.find_project(folder) == folder
    assert project.find_project(folder.parent) is None
    sweep = folder / "sweeps" / "threshold"
    sweep.mkdir(parents=True)
    (sweep / "dvc.yaml").touch()
    assert project.find_project(sweep) == folder


def test_dvc_is_configured_outside_git_and_set_back_when_git_comes(folder, capsys):
    local = folder / project.DVC_LOCAL
    project.configure_dvc(folder)
    assert "no_scm = true" in local.read_text()
    assert "outside git" in capsys.readouterr().err
    project.configure_dvc(folder)
    assert not capsys.readouterr().err
    (folder / ".git").mkdir()
    project.configure_dvc(folder)
    assert not local.exists()


def test_what_a_user_wrote_into_the_local_configuration_stays(folder):
    local = folder / project.DVC_LOCAL
    mine = "[core]\n    remote = store\n['remote \"store\"']\n    url = /data/ü\n"
    local.write_text(mine, encoding="utf-8")
    project.configure_dvc(folder)
    assert local.read_text(encoding="utf-8") != mine
    (folder / ".git").mkdir()
    project.configure_dvc(folder)
    assert local.read_text(encoding="utf-8") == mine


def test_a_choice_of_the_user_about_git_is_kept(folder):
    local = folder / project.DVC_LOCAL
    local.write_text("[core]\n    no_scm = false\n")
    project.configure_dvc(folder)
    assert local.read_text() == "[core]\n    no_scm = false\n"


def test_a_configuration_that_cannot_be_written_stops_no_command_that_only_reads(folder, monkeypatch, capsys):
    (folder / ".dvc" / "config.local").mkdir()
    monkeypatch.chdir(folder)
    assert project.enter_project() == folder
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("config.local cannot be written (Is a directory): outside git DVC does not work so")


def test_paths_on_the_command_line_are_those_of_the_folder_the_user_is_in(tmp_path):
    app, seen = typer.Typer(), {}

    @app.command()
    def one(image: Path, many: list[Path], out: Path = Path("grid.png"), models: Path = Path("artifacts/models")) -> None:
        seen.update(image=image, many=many, out=out, models=models)

    project.follow_paths(app, tmp_path / "sub")
    app(["a.jpg", "b", "/c"], standalone_mode=False)
    sub = tmp_path / "sub"
    assert seen == {
        "image": sub / "a.jpg",
        "many": [sub / "b", Path("/c")],
        "out": sub / "grid.png",
        "models": Path("artifacts/models"),
    }


def test_a_home_that_cannot_be_written_sends_caches_elsewhere_once(tmp_path, monkeypatch, capsys):
    for name in project._CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    monkeypatch.setattr(project.tempfile, "gettempdir", lambda: str(tmp_path))
    project.keep_caches_writable()
    assert str(tmp_path / "missing") in capsys.readouterr().err
    assert Path(os.environ["DPAR_CACHE"]).is_relative_to(tmp_path)
    project.keep_caches_writable()
    assert not capsys.readouterr().err


def test_a_home_that_can_be_written_is_left_alone(tmp_path, monkeypatch, capsys):
    for name in project._CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    project.keep_caches_writable()
    assert not capsys.readouterr().err
    assert "DPAR_CACHE" not in os.environ


def test_commands_work_below_the_project_in_a_plain_locale(folder):
    (folder / "params.yaml").write_bytes((ROOT / "params" / "smoke.yaml").read_bytes())
    below = folder / "sub"
    below.mkdir()
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "params", "check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "LANG": "C"}
    done = subprocess.run(command, cwd=below, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "params.yaml is valid\n"), done.stderr
    assert "working in" in done.stderr and "outside git" in done.stderr
