"""The house: pipeline -> stages -> dpar_core, never back. Imports are read from the source, not run."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpar_core.files import RUN_FILES
from stages import artifacts
from tests.helpers.paths import ROOT

FLOORS = ("dpar_core", "stages", "pipeline")

WORKFLOW = {"ray", "mlflow", "dvc", "typer", "pydantic"}
FORBIDDEN = {
    "dpar_core": {"stages", "pipeline", *WORKFLOW},
    "stages": {"pipeline", "mlflow", "dvc", "typer"},
}
GROUND = {"torch", "numpy", "pyarrow", "PIL", "safetensors", "fsspec", "dpar_core"}
GROUND |= {"triton"}  # comes with torch for CUDA, imported there alone
WRITES_SHARDS = ROOT / "dpar_core" / "data" / "shards.py"  # which imports webdataset where a shard is written, never to read


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
    known = GROUND | set(sys.stdlib_module_names)
    strangers = {f: imports(f) - known for f in (ROOT / "dpar_core").rglob("*.py") if imports(f) - known}
    assert strangers == {WRITES_SHARDS: {"webdataset"}}
    assert "webdataset" not in imports(WRITES_SHARDS, top_level_only=True)


def test_the_command_line_imports_nothing_heavy_before_a_command_runs():
    heavy = {"torch", "ray", "mlflow", "dvc", "sklearn", "skimage", "matplotlib", "pyarrow", "numpy", "dpar_core", "stages"}
    assert not imports(ROOT / "pipeline" / "cli.py", top_level_only=True) & heavy


@functools.cache
def own_imports(file: Path) -> frozenset[str]:
    """Return what a file imports of this project, as dotted names: of modules, or of names in them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(name for name in found if name.split(".")[0] in FLOORS)


def test_status_and_cost_need_nothing_heavy():
    files = [ROOT / "pipeline" / name for name in ("state.py", "results.py", "headline.py", "dvc_cache.py")]
    modules = {name.rsplit(".", 1)[0] for file in files for name in own_imports(file)} - set(FLOORS)
    check = "import sys; sys.exit(', '.join({'torch', 'ray', 'mlflow', 'dvc', 'pyarrow'} & set(sys.modules)) or None)"
    cost = "from pipeline.cost import Prices, costs; from stages.params import load_params; from pathlib import Path"
    cost += "; costs(load_params(Path('params.yaml')), prices=Prices('A100', 0.4, 2.0))"
    code = f"import {', '.join(sorted(modules))}; {cost}; {check}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def rooms(floor: str) -> dict[str, dict[str, list[str]]]:
    """Return which room of a floor imports which: {room: {imported room: [modules that do]}}; a module is a room itself."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted((ROOT / floor).rglob("*.py")):
        path = file.relative_to(ROOT).with_suffix("").parts
        if len(path) == 2 and path[1] == "__init__":
            continue  # the names that a floor offers come from its rooms
        mine = found.setdefault(path[1], {})
        for parts in (name.split(".") for name in own_imports(file)):
            if parts[0] == floor and len(parts) > 1 and parts[1] != path[1]:
                mine.setdefault(parts[1], []).append(".".join(path))
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_rooms_import_each_other_without_circles(floor):
    left = rooms(floor)
    assert sum(len(imported) for imported in left.values()) > 5
    while done := [room for room, imported in left.items() if not set(imported) & set(left)]:
        for room in done:
            del left[room]
    assert not left, {room: {name: who for name, who in imported.items() if name in left} for room, imported in left.items()}


def sources(*folders: str) -> Iterator[Path]:
    """Yield the Python files of some folders of the project."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


# Packages that are run in a process of their own, and where; and the names packages are imported by, where those differ.
RUN_ELSEWHERE = {
    "dvc": ("pipeline/commands/workflow.py", '"-m", "dvc"'),
    "scipy": ("stages/synset_lists.py", "from scipy.io import loadmat"),
}
IMPORTED_AS = {"pillow": "PIL", "ruamel.yaml": "ruamel", "scikit-image": "skimage", "scikit-learn": "sklearn"}


def test_every_dependency_is_used_by_what_runs():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w.-]+", line).group() for line in named}
    used = set().union(*(imports(file) for file in sources(*FLOORS)))
    assert {name for name in names if IMPORTED_AS.get(name, name) not in used} == set(RUN_ELSEWHERE)
    assert all(words in (ROOT / file).read_text() for file, words in RUN_ELSEWHERE.values())


ONE_PLACE = {
    r"\bray\.(wait|remote|kill)\(": {"stages/workers/tasks.py"},
    r"\b(flock|lockf)\(|\bFileLock\(": {"stages/workers/lock.py", "dpar_core/files.py"},
    r"\bsys\.path\.(insert|append)": set(),
}


@pytest.mark.parametrize("pattern", ONE_PLACE)
def test_what_has_one_way_is_done_in_one_place(pattern):
    found = {file for file in sources(*FLOORS, "benchmarks", "tests") if re.search(pattern, file.read_text())}
    known = {ROOT / name for name in ONE_PLACE[pattern]}
    tests_of_ray = {ROOT / "tests" / "test_architecture.py", ROOT / "tests" / "stages" / "workers" / "test_cluster.py"}
    assert known <= found and found - known <= tests_of_ray


def words_of(file: Path) -> Iterator[str]:
    """Yield the strings of a file that stand for one word, as paths do; sentences and docstrings are left out."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield node.value


def test_no_path_below_artifacts_is_spelled_outside_the_catalog():
    made = {one.name for outputs in artifacts.OUTPUTS.values() for one in outputs.values()}
    paths = {name for name in made if "/" in name}
    assert len(paths) > 20 and set(RUN_FILES.values()) <= paths | {artifacts.PATCH_RULE.name}
    catalog = {ROOT / "stages" / "artifacts.py", ROOT / "dpar_core" / "files.py"}
    spelled = [
        (str(file.relative_to(ROOT)), word)
        for file in sources(*FLOORS, "benchmarks")
        if file not in catalog
        for word in words_of(file)
        if word.startswith(f"{artifacts.FOLDER}/") or word == artifacts.FOLDER or word.strip("/") in paths
    ]
    assert not spelled


# Modules of the core whose tests are in a file of another name.
HOMES = {
    "choices": "stages/test_params.py",
    "data.contents": "stages/test_sources.py",
    "data.fingerprint": "stages/test_sources.py",
    "data.folders": "dpar_core/data/test_sources.py",
    "data.image_parquet": "dpar_core/data/test_world_files.py",
    "data.image_tars": "dpar_core/data/test_world_files.py",
    "data.listing": "dpar_core/data/test_sources.py",
    "data.manifest": "dpar_core/data/test_sources.py",
    "data.remote": "dpar_core/data/test_shards.py",
    "data.synsets": "dpar_core/data/test_sources.py",
    "evaluation.arrays": "dpar_core/evaluation/test_image_sets.py",
    "evaluation.block_features": "stages/tools/test_probe.py",
    "evaluation.measure": "stages/shared/test_scoring.py",
    "evaluation.reconstruction": "stages/test_tokenizer_stage.py",
    "evaluation.reference": "dpar_core/evaluation/test_scores.py",
    "evaluation.sample_files": "stages/test_sample.py",
    "generation.lanes": "dpar_core/generation/test_generate.py",
    "generation.static_ops": "dpar_core/generation/test_static.py",
    "generation.stepping": "dpar_core/generation/test_kv_cache.py",
    "generation.triton_ops": "dpar_core/generation/test_static.py",
    "models.configs": "pipeline/test_cost.py",
    "models.flops": "dpar_core/training/test_loop.py",
    "models.gpt": "dpar_core/models/test_load.py",
    "models.published": "dpar_core/models/test_weights.py",
    "models.rope": "dpar_core/models/test_dpar.py",
    "models.sizes": "pipeline/test_cost.py",
    "patches.layout": "dpar_core/models/test_dpar.py",
    "patches.maps": "stages/test_token_stages.py",
    "secrets": "pipeline/test_boundary.py",
    "signatures": "dpar_core/models/test_weights.py",
    "training.codebook": "stages/test_tokenizer_stage.py",
    "training.meters": "dpar_core/training/test_loop.py",
    "training.object_store": "dpar_core/training/test_checkpoint.py",
    "training.optim": "dpar_core/training/test_loop.py",
    "training.prefetch": "dpar_core/training/test_loop.py",
}


def test_every_module_of_the_core_has_a_test_of_its_name_or_a_stated_home():
    modules = {file.relative_to(ROOT): file for file in sources("dpar_core") if file.name != "__init__.py"}
    nameless = {path for path in modules if not (ROOT / "tests" / path.with_name(f"test_{path.name}")).exists()}
    assert {".".join(path.with_suffix("").parts[1:]) for path in nameless} == set(HOMES)

    def reached(file: Path, steps: int) -> set[str]:
        found = own_imports(file) | {name.rpartition(".")[0] for name in own_imports(file)}
        files = {ROOT / f"{name.replace('.', '/')}.py" for name in found} if steps else set()
        return found.union(*(reached(one, steps - 1) for one in files if one.exists()))

    lost = {name: home for name, home in HOMES.items() if f"dpar_core.{name}" not in reached(ROOT / "tests" / home, 2)}
    assert not lost


def test_contributing_names_files_that_are_there_and_quotes_a_diff_that_applies():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    paths = set(re.findall(r"`(\w+(?:/[\w.]*)+)`", text))
    assert len(paths) > 10 and not [path for path in paths if not (ROOT / path).exists()]
    before = [line[1:] for line in re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1].splitlines() if line[0] in " -"]
    source = (ROOT / before[0].removeprefix("-- a/")).read_text("utf-8").splitlines()
    assert len(before) > 4 and not [line for line in before[1:] if line not in source]


def test_stages_print_through_the_terminal_which_wraps_lines():
    """But for one line of progress, which fits already, and an answer in JSON to the process that asked."""
    found = {
        file.relative_to(ROOT / "stages").as_posix()
        for file in (ROOT / "stages").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert found == {"terminal.py", "tracker.py", "workers/cluster.py"}
