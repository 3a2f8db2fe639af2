"""The house: pipeline -> stages -> dpar_core, never back. Imports are read from the source, not run."""

import ast
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

WORKFLOW = {"ray", "mlflow", "dvc", "typer", "pydantic"}
FORBIDDEN = {
    "dpar_core": {"stages", "pipeline", *WORKFLOW},
    "stages": {"pipeline", "mlflow", "dvc", "typer"},
}
GROUND = {"torch", "numpy", "pyarrow", "PIL", "safetensors", "fsspec", "dpar_core"}


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("floor", sorted(FORBIDDEN))
def test_a_floor_never_imports_what_stands_above_it(floor):
    files = sorted((ROOT / floor).rglob("*.py"))
    assert len(files) > 5
    wrong = {str(file.relative_to(ROOT)): imports(file) & FORBIDDEN[floor] for file in files}
    assert not {file: names for file, names in wrong.items() if names}


def test_nobody_imports_the_top_floor():
    files = [file for floor in ("dpar_core", "stages") for file in (ROOT / floor).rglob("*.py")]
    assert not [file for file in files if "pipeline" in imports(file)]


def test_the_ground_floor_needs_five_packages_alone():
    import sys

    known = GROUND | set(sys.stdlib_module_names)
    strangers = {f.name: imports(f) - known for f in (ROOT / "dpar_core").rglob("*.py") if imports(f) - known}
    assert not strangers


def test_the_command_line_imports_nothing_heavy_before_a_command_runs():
    heavy = {"torch", "ray", "mlflow", "dvc", "sklearn", "skimage", "matplotlib", "pyarrow", "numpy", "dpar_core", "stages"}
    assert not imports(ROOT / "pipeline" / "cli.py", top_level_only=True) & heavy
