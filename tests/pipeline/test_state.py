"""What is up to date, computed from dvc.yaml, dvc.lock and params.yaml alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.dvc_cache import cache_folder, put_back
from pipeline.state import LAST, changed, project_state, with_needs

DVC = """
stages:
  tokens:
    cmd: dpar-cli stage tokens
    params: [seed, data]
    outs: [artifacts/tokens.bin]
  model:
    cmd: dpar-cli stage model
    deps: [artifacts/tokens.bin]
    params: [train]
    outs: [artifacts/models/one.bin]
    metrics:
      - artifacts/models/metrics.json: {cache: false}
  report:
    cmd: dpar-cli stage report
    deps: [artifacts/models]
    outs: [artifacts/report]
"""
LOCK = """
schema: '2.0'
stages:
  tokens:
    cmd: dpar-cli stage tokens
    params: {params.yaml: {seed: 0, data: {size: 8, source: builtin}}}
    outs: [{path: artifacts/tokens.bin, md5: aa, size: 4}]
  model:
    cmd: dpar-cli stage model
    deps: [{path: artifacts/tokens.bin, md5: aa, size: 4}]
    params: {params.yaml: {train: {steps: 480, lr: 0.003}}}
    outs: [{path: artifacts/models/one.bin, md5: bb, size: 3}, {path: artifacts/models/metrics.json, md5: cc, size: 2}]
  report:
    cmd: dpar-cli stage report
    deps: [{path: artifacts/models, md5: dd.dir, size: 5, nfiles: 2}]
    outs: [{path: artifacts/report, md5: ee.dir, size: 9, nfiles: 1}]
"""
PARAMS = "seed: 0\ndata: {size: 8, source: builtin}\ntrain: {steps: 480, lr: 3.0e-3}\n"


@pytest.fixture
def project(tmp_path):
    for name, text in (("dvc.yaml", DVC), ("dvc.lock", LOCK), ("params.yaml", PARAMS)):
        (tmp_path / name).write_text(text)
    (tmp_path / "artifacts/models").mkdir(parents=True)
    (tmp_path / "artifacts/report").mkdir()
    (tmp_path / "artifacts/tokens.bin").write_text("abcd")
    (tmp_path / "artifacts/models/one.bin").write_text("abc")
    (tmp_path / "artifacts/models/metrics.json").write_text("{}")
    return tmp_path


def states(project) -> dict:
    return {state.name: (state.state, state.why) for state in project_state(project)}


def edit(project, name, old, new):
    path = project / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def ran(project, stage, finished):
    (project / "work" / stage).mkdir(parents=True)
    (project / "work" / stage / LAST).write_text(json.dumps({"finished": finished, "seconds": 3.0}))


def test_nothing_changed_is_fresh_and_needs_follow_the_files(project):
    found = project_state(project)
    assert {state.state for state in found} == {"fresh"}
    assert [state.needs for state in found] == [(), ("tokens",), ("model",)]
    assert [state.size for state in found] == [4, 5, 9]


def test_a_changed_value_is_named_and_what_follows_waits_for_it(project):
    edit(project, "params.yaml", "steps: 480", "steps: 8")
    assert states(project) == {
        "tokens": ("fresh", ""),
        "model": ("stale", "train.steps 480 -> 8"),
        "report": ("stale", "model has to run first"),
    }


def test_missing_resized_and_replaced_files_are_seen(project):
    (project / "artifacts/models/one.bin").write_text("longer")
    assert states(project)["model"] == ("stale", "artifacts/models/one.bin was changed")
    (project / "artifacts/models/one.bin").unlink()
    assert states(project)["model"] == ("stale", "artifacts/models/one.bin is missing")
    (project / "artifacts/models/one.bin").write_text("abc")
    edit(
        project,
        "dvc.lock",
        "artifacts/tokens.bin, md5: aa, size: 4}]\n  model",
        "artifacts/tokens.bin, md5: zz, size: 4}]\n  model",
    )
    assert states(project)["model"] == ("stale", "artifacts/tokens.bin is another than it read")


def test_a_stage_that_ran_after_its_reader_makes_it_stale(project):
    ran(project, "model", 200.0)
    ran(project, "report", 100.0)
    assert states(project)["report"] == ("stale", "model has run since")
    assert [state.seconds for state in project_state(project)] == [None, 3.0, 3.0]


def test_a_file_inside_an_output_folder_is_compared_by_its_content(project):
    for name in ("dvc.yaml", "dvc.lock"):
        text = (project / name).read_text().replace("artifacts/tokens.bin", "artifacts/tokens/rule.json")
        text = text.replace("outs: [artifacts/tokens/rule.json]", "outs: [artifacts/tokens]")
        text = text.replace("outs: [{path: artifacts/tokens/rule.json", "outs: [{path: artifacts/tokens")
        (project / name).write_text(text)
    (project / "artifacts/tokens").mkdir()
    (project / "artifacts/tokens.bin").rename(project / "artifacts/tokens/rule.json")
    assert states(project)["model"] == ("stale", "artifacts/tokens/rule.json is another than it read")
    edit(project, "dvc.lock", "rule.json, md5: aa", "rule.json, md5: e2fc714c4727ee9395f324cd2e7f331f")  # of "abcd"
    ran(project, "tokens", 200.0)
    ran(project, "model", 100.0)
    assert states(project)["model"] == ("fresh", "")


def test_a_stage_that_stands_before_what_it_needs_is_refused(project):
    text = (project / "dvc.yaml").read_text()
    first, rest = text.index("  tokens:"), text.index("  model:")
    (project / "dvc.yaml").write_text(text[:first] + text[rest:] + text[first:rest])
    with pytest.raises(ValueError, match="stage model stands before tokens, whose output it reads"):
        project_state(project)


def test_a_stage_that_ran_again_and_gave_the_same_file_leaves_its_reader_fresh(project):
    ran(project, "tokens", 200.0)
    ran(project, "model", 100.0)
    assert {state for state, _ in states(project).values()} == {"fresh"}


def test_outputs_that_the_cache_lacks_are_put_back_and_nothing_runs_again(tmp_path):
    def dvc(*words):
        return subprocess.run(
            [sys.executable, "-m", "dvc", *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )

    def uncached():
        return [state.name for state in project_state(tmp_path) if state.uncached]

    dvc("init", "--no-scm", "-q")
    write = "mkdir many; echo a > many/a; echo b > many/b; echo c > metrics.json; echo ran >> ran"
    (tmp_path / "dvc.yaml").write_text(
        f"stages:\n  one:\n    cmd: {write}\n    outs: [many]\n    metrics: [metrics.json: {{cache: false}}]\n"
        "  two:\n    cmd: echo two > two\n    deps: [many]\n    outs: [two]\n"
    )
    dvc("repro", "-q")
    assert uncached() == []
    shutil.rmtree(tmp_path / ".dvc/cache")
    assert uncached() == ["one", "two"]
    (tmp_path / "two").write_text("owt\n")  # of the same size, so that only DVC sees it
    assert put_back(tmp_path, ["one", "two"]) == ["two"]
    assert uncached() == ["two"]
    dvc("repro", "-q")
    assert uncached() == [] and (tmp_path / "two").read_text() == "two\n" and (tmp_path / "ran").read_text() == "ran\n"


def test_the_cache_is_where_the_settings_say(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    assert cache_folder(tmp_path) == tmp_path / ".dvc/cache/files/md5"
    for folder, named, found in (("home/dvc", "/shared", "/shared"), (".dvc", "../beside", f"{tmp_path}/.dvc/../beside")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config").write_text(f"[cache]\n    dir = {named}\n")
        assert cache_folder(tmp_path) == Path(found) / "files/md5"


def test_without_a_lock_nothing_has_run(project):
    (project / "dvc.lock").unlink()
    assert {state for state, _ in states(project).values()} == {"never run"}


def test_targets_bring_what_they_need(project):
    found = project_state(project)
    assert [state.name for state in with_needs(found, ["model"])] == ["tokens", "model"]
    assert len(with_needs(found, [])) == 3
    with pytest.raises(ValueError, match=r"no stage 'modle': did you mean model\? \(all: `dpar-cli status`\)"):
        with_needs(found, ["modle"])


def test_changes_are_named_to_the_value():
    assert changed("a", {"b": 1, "c": None}, {"b": 2, "d": True}) == ["a.b 1 -> 2", "a.d null -> true"]


def test_a_broken_file_is_named(project):
    (project / "params.yaml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"params\.yaml is not text in UTF-8$"):
        project_state(project)


def test_any_part_of_a_lock_file_is_read_or_refused_with_the_way_out(project):
    """As a kill leaves it while DVC writes; what it lacks has never run."""
    lock = project / "dvc.lock"
    whole, refused = lock.read_bytes(), 0
    for end in (*range(0, len(whole), 23), *("a: [1\nb: 2", "stages: [3]", "stages: {model: {outs: [{path: }]}}")):
        lock.write_bytes(whole[:end] if isinstance(end, int) else end.encode())
        try:
            assert len(project_state(project)) == 3
        except ValueError as error:
            assert "; take it from git (`git restore dvc.lock`) or remove it" in str(error)
            refused += 1
    assert refused > 3
