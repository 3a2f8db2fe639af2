"""What commands print fits the terminal, 80 columns at most, and holds no codes for colours where none are asked for."""

import click
import pytest
import typer
from typer.testing import CliRunner

from dpar_core.evaluation.golden import Case
from pipeline.cli import app
from pipeline.terminal import columns, table, wrapped
from tests.helpers.paths import ROOT

CASES = [Case("a network of the published code, logits, largest difference", 1.2e-6, 1e-5), Case("another", 3.0, 0.0)]


def commands(group: click.Group, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of every command and group of commands."""
    found = [before]
    for name, command in group.commands.items():
        found += commands(command, (*before, name)) if hasattr(command, "commands") else [(*before, name)]
    return found


def printed(*words: str, width: int) -> str:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": str(width), "NO_COLOR": "1"})
    assert result.exit_code in ((0, 1) if words in (("verify",), ("doctor",)) else (0,)), result.output
    assert "\033" not in result.output
    return result.output


def test_the_help_of_every_command_fits(monkeypatch):
    monkeypatch.chdir(ROOT)
    for number, words in enumerate(commands(typer.main.get_command(app))):
        width = (40, 80)[number % 2]
        text = printed(*words, "--help", width=width)
        assert max(map(len, text.splitlines())) <= width, words


@pytest.mark.parametrize("width", [40, 200])
@pytest.mark.parametrize(
    "words",
    ["status", "status --graph", "doctor", "params list", "params check", "cost demo", "cost imagenet256-dpar-xl", "verify"],
)
def test_what_commands_print_fits(monkeypatch, width, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if words == "verify":
        monkeypatch.setattr("dpar_core.evaluation.golden.verify_folder", lambda folder: CASES)
    text = printed(*words.split(), width=width)
    assert max(len(line) for line in text.splitlines() if "sqlite:" not in line) <= min(width, 80)


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


def test_lines_are_as_wide_as_the_terminal_and_80_columns_at_most(monkeypatch):
    for width, expected in (("40", 40), ("80", 80), ("300", 80), ("5", 30)):
        monkeypatch.setenv("COLUMNS", width)
        assert columns() == expected
        assert max(map(len, wrapped("word " * 60, first="[1/2] a ", rest=" " * 18).splitlines())) <= expected
