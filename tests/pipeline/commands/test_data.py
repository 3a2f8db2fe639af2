"""`dpar-cli data inspect`, `data check` and `patches stats`: exit codes, what they print, one sentence for errors."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image

from dpar_core.data.manifest import read_manifest
from pipeline.cli import main
from stages import terminal
from tests.helpers.tiny_data import as_artifacts, make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    torch.set_num_threads(1)
    return make_project(tmp_path_factory.mktemp("project")).tokenize().entropies().patch_maps()


@pytest.fixture
def place(project, tmp_path, monkeypatch):
    """A project's folder with everything made, to stand in."""
    as_artifacts(project, tmp_path / "artifacts")
    (tmp_path / "dvc.yaml").write_text("")
    (tmp_path / "params.yaml").write_text(json.dumps(project.params.model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPAR_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `dpar-cli WORDS`: exit code, lines on stdout, lines on stderr, as wide as they come."""
    monkeypatch.setattr(terminal, "WIDTH", 9999)
    monkeypatch.setenv("COLUMNS", "9999")

    def call(*words: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["dpar-cli", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return stopped.value.code or 0, said.out.splitlines(), said.err.splitlines()

    return call


def refused(result: tuple[int, list[str], list[str]], sentence: str) -> None:
    code, _, errors = result
    assert code == 1 and len(errors) == 2 and errors[1] == "(DPAR_DEBUG=1 shows where this was raised)"
    assert sentence in errors[0]


@pytest.mark.parametrize(
    "words", [("data", "inspect", "a"), ("data", "check"), ("data", "check", "--repair"), ("patches", "stats")]
)
def test_outside_a_project_each_says_where_to_go(tmp_path, monkeypatch, run, words):
    monkeypatch.chdir(tmp_path)
    refused(run(*words), f"no dvc.yaml in {tmp_path} nor above it: go to the project's folder first")
    assert list(tmp_path.iterdir()) == []


def test_check_of_a_whole_data_set_ends_with_0(place, run):
    code, lines, _ = run("data", "check")
    assert code == 0 and len(lines) == 1
    assert lines[0].startswith("16 files, ") and lines[0].endswith(" bytes read, 0 problems")


def test_check_names_damage_ends_with_1_and_repair_mends_it(place, run):
    shard, map_ = place / "artifacts" / "tokens" / "train-000001.tar", place / "artifacts" / "patch_maps" / "rule.json"
    before = shard.read_bytes(), map_.read_bytes()
    shard.unlink()
    map_.write_bytes(b"{")
    code, lines, _ = run("data", "check")
    assert code == 1 and len(lines) == 4
    assert lines[0] == "tokens/train-000001.tar is missing" and lines[1].startswith(
        "patch_maps/rule.json is damaged (digest "
    )
    assert lines[2].endswith(", 2 problems") and "`dpar-cli data check --repair`" in lines[3]
    code, lines, _ = run("data", "check", "--repair")
    assert code == 0 and lines[:2] == ["tokens/train-000001.tar made again", "patch_maps/rule.json made again"]
    assert lines[-1].endswith(", 0 problems") and (shard.read_bytes(), map_.read_bytes()) == before


def test_what_a_repair_cannot_mend_names_the_stage_and_ends_with_1(place, run):
    shutil.rmtree(place / "artifacts" / "entropies")
    for words in (("data", "check"), ("data", "check", "--repair")):
        code, lines, _ = run(*words)
        assert code == 1 and len(lines) == 2
        assert lines[0].startswith("entropies/summary.json is missing: ") and "run `dpar-cli run entropies`" in lines[0]
        assert lines[1].endswith(", 1 problems")
    (place / "artifacts" / "tokens" / "train-000001.tar").unlink()
    (place / "params.yaml").unlink()
    refused(run("data", "check", "--repair"), "no params file at params.yaml")


def test_inspect_prints_what_is_known_and_draws_it(place, run):
    key = read_manifest(place / "artifacts" / "data" / "manifest.parquet").rows[0].key
    code, lines, _ = run("data", "inspect", key, "--out", "one.png")
    assert code == 0 and lines[0].split() == ["key", key] and lines[-1] == "one.png"
    words = [line.split()[0] for line in lines[:-1]]
    assert words == ["key", "split", "class", "source", "pixels", "shard", "tokens", "entropies", "patches"]
    with Image.open("one.png") as picture:
        assert picture.format == "PNG" and picture.width > 5 * 200


def test_inspect_refuses_what_it_cannot_find_and_writes_nothing(place, run):
    refused(run("data", "inspect", "nobody"), "no image 'nobody' in the manifest: expected a key, as ")
    refused(run("data", "inspect", ".png"), "no image '.png' in the manifest")  # a name is no part of another
    refused(run("data", "inspect", "000.png"), " images end with '000.png': give a key, as one of ")
    (place / "artifacts" / "data" / "manifest.parquet").unlink()
    refused(run("data", "inspect", "nobody"), "run `dpar-cli run data`")
    assert not (place / "inspect.png").exists()


def test_patch_statistics_are_a_table_and_a_picture(place, run):
    code, lines, _ = run(
        "patches", "stats", "--thresholds", "2:2.4:0.2", "--max-lengths", "1,none", "--maps", "9", "--out", "s.png"
    )
    assert code == 0 and lines[0] == "entropy_rows, a sample of 9 train views of 16 tokens" and lines[-1] == "s.png"
    cells = [line.split() for line in lines[2:-1]]
    # At most 1 token: as many as tokens, whatever the threshold.
    assert [cell[:2] for cell in cells] == [["any", "1"], *([number, "none"] for number in ("2", "2.2", "2.4"))]
    assert cells[0][2:6] == ["1.00", "16.0", "16", "to"]
    with Image.open("s.png") as picture:
        assert picture.format == "PNG"


def test_patch_statistics_try_quantiles_of_the_entropies_by_themselves(place, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, lines, _ = run("patches", "stats", "--max-lengths", "none", "--maps", "9")
    assert code == 0 and max(map(len, lines)) <= 40
    lengths = [float(line.split()[1]) for line in lines if line.startswith("  length ")]
    assert len(lengths) == 5 and lengths == sorted(lengths) and lengths[0] < lengths[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--thresholds", "1:2"), "'1:2' is not a range: expected FIRST:LAST:STEP"),
        (("--max-lengths", "0"), "maximum length '0': expected a number of tokens from 1, or none"),
        (("--mode", "rows"), "--mode rows has no threshold: give --mode entropy_rows or --mode entropy"),
        (("--mode", "static"), "--mode static has no threshold: give --mode entropy_rows or --mode entropy"),
        (("--split", "test"), "holds no test samples"),
    ],
)
def test_patch_statistics_refuse_bad_options(place, run, words, sentence):
    refused(run("patches", "stats", *words), sentence)
    assert not (place / "patch_stats.png").exists()


def test_patch_statistics_follow_the_rule_of_the_params(place, run):
    params = json.loads((place / "params.yaml").read_text())
    params["patching"] |= {"mode": "entropy", "max_patch_length": 3}
    (place / "params.yaml").write_text(json.dumps(params))
    code, lines, _ = run("patches", "stats", "--thresholds", "2", "--maps", "9")
    assert code == 0 and lines[0].startswith("entropy, ")
    assert [line.split()[1] for line in lines[2:-1]] == ["1", "2", "3", "4", "8"]
    params["patching"] |= {"mode": "token", "target_mean_length": None}
    (place / "params.yaml").write_text(json.dumps(params))
    refused(run("patches", "stats"), "patching.mode token of params.yaml has no threshold: give --mode entropy_rows or")


def test_patch_statistics_of_no_maps_are_a_wrong_use(place, run):
    code, _, errors = run("patches", "stats", "--maps", "0")
    assert code == 2 and any("--maps" in line for line in errors)


def test_patch_statistics_without_entropies_name_the_stage(place, run):
    shutil.rmtree(place / "artifacts" / "entropies")
    refused(run("patches", "stats"), "run `dpar-cli run entropies`")
