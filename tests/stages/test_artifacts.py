"""The catalog of artifacts: dvc.yaml and the runner agree with it, and no other module spells its paths."""

import re

import pytest
from ruamel.yaml import YAML

from pipeline.runner import STAGES
from stages import artifacts
from stages.artifacts import INPUTS, OUTPUTS, Artifact, maker_of
from tests.helpers.paths import ROOT

DVC = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def test_the_catalog_the_runner_and_dvc_know_the_same_stages():
    assert set(OUTPUTS) == set(INPUTS) == set(STAGES) == set(DVC)


@pytest.mark.parametrize("stage", OUTPUTS)
def test_dvc_declares_what_the_catalog_says_a_stage_makes(stage):
    declared = [entry for kind in ("outs", "metrics", "plots") for entry in DVC[stage].get(kind) or []]
    paths = [entry if isinstance(entry, str) else next(iter(entry)) for entry in declared]
    assert sorted(paths) == sorted(one.path for one in OUTPUTS[stage].values())
    assert {one.stage for one in OUTPUTS[stage].values()} == {stage}


def test_every_artifact_of_the_catalog_is_or_lies_in_an_output_of_its_stage():
    named = [one for one in vars(artifacts).values() if isinstance(one, Artifact) and one not in folders()]
    assert len(named) > 15
    for one in named:
        assert maker_of(ROOT / one.path, ROOT) == one.stage, one


def folders() -> list[Artifact]:
    """What holds artifacts of several stages."""
    return [one for one in vars(artifacts).values() if isinstance(one, Artifact) and maker_of(ROOT / one.path, ROOT) is None]


def test_a_missing_artifact_names_the_stage_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.safetensors is missing: run `dpar-cli run tokenizer`"):
        artifacts.TOKENIZER.require(tmp_path)
    assert maker_of(tmp_path / "elsewhere", tmp_path) is None


def test_no_other_module_spells_a_path_below_artifacts():
    names = {part for outputs in OUTPUTS.values() for one in outputs.values() for part in one.name.split("/")}
    files = sorted(name for name in names if "." in name and name not in ("report", "index.html"))
    spelled = re.compile("|".join(rf'"{re.escape(name)}"' for name in files) + r'|"artifacts"|artifacts / "')
    # The last two write folders of their own, below work/ and sweeps/.
    allowed = {"stages/artifacts.py", "stages/tools/calibrate.py", "stages/tools/sweep_models.py"}
    found = []
    for floor in ("stages", "pipeline"):
        for path in sorted((ROOT / floor).rglob("*.py")):
            if path.relative_to(ROOT).as_posix() not in allowed and "sweep" not in path.parts:
                found += [
                    f"{path.relative_to(ROOT)}: {line.strip()}"
                    for line in path.read_text().splitlines()
                    if spelled.search(line)
                ]
    assert not found
