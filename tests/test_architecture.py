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
GROUND |= {"triton"}  # comes with torch for CUDA, imported there alone


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


def rooms(floor: str) -> dict[str, dict[str, list[str]]]:
    """Return which room of a floor imports which: {room: {imported room: [modules that do]}}; a module is a room itself."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted((ROOT / floor).rglob("*.py")):
        path = file.relative_to(ROOT).with_suffix("").parts
        if len(path) == 2 and path[1] == "__init__":
            continue  # the names that a floor offers come from its rooms
        mine = found.setdefault(path[1], {})
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module] if "." in node.module else [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == floor and len(parts) > 1 and parts[1] != path[1]:
                    mine.setdefault(parts[1], []).append(".".join(path))
    return found


@pytest.mark.parametrize("floor", ["dpar_core", "stages", "pipeline"])
def test_rooms_import_each_other_without_circles(floor):
    left = rooms(floor)
    assert sum(len(imported) for imported in left.values()) > 5
    while done := [room for room, imported in left.items() if not set(imported) & set(left)]:
        for room in done:
            del left[room]
    assert not left, {room: {name: who for name, who in imported.items() if name in left} for room, imported in left.items()}
