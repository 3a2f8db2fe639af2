"""dvc.yaml, the runner and each stage's own Params, Inputs and Outputs say the same."""

import dataclasses

import pytest
from ruamel.yaml import YAML

from pipeline.presets.paper import paper_presets
from pipeline.presets.use import preset_file, preset_names, use_preset
from pipeline.runner import STAGES, StageError, load_stage, params_of, run_stage
from stages.params import ParamsError, load_params, select
from tests.helpers.paths import ROOT

DVC = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def paths(entries) -> set[str]:
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries or []}


def test_dvc_runs_the_stages_that_the_runner_knows():
    assert set(DVC) == set(STAGES)
    assert all(stage["cmd"] == f"dpar-cli stage {name}" for name, stage in DVC.items())


@pytest.mark.parametrize("name", STAGES)
def test_deps_outs_and_params_are_those_of_the_code(name):
    stage, declared = load_stage(name), DVC[name]
    assert {field.name for field in dataclasses.fields(stage.inputs)} == set(stage.spec.inputs)
    assert {field.name for field in dataclasses.fields(stage.outputs)} == set(stage.spec.outputs)
    deps, inputs = paths(declared.get("deps")), set(stage.spec.inputs.values())
    assert deps == inputs if name != "report" else deps < inputs
    written = paths(declared.get("outs")) | paths(declared.get("metrics")) | paths(declared.get("plots"))
    assert written == set(stage.spec.outputs.values())
    assert paths(declared["params"]) == set(params_of(stage))


def test_every_input_is_made_by_an_earlier_stage():
    made = [path for spec in STAGES.values() for path in spec.outputs.values()]
    for spec in STAGES.values():
        for path in spec.inputs.values():
            assert any(path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/") for out in made), path


def makers(paths_: set[str]) -> set[str]:
    """The stages that make `paths_`, files or folders."""
    outs = {(f"{out}/", name) for name, spec in STAGES.items() for out in spec.outputs.values()}
    wanted = [f"{path}/" for path in paths_]
    return {name for out, name in outs for path in wanted if out.startswith(path) or path.startswith(out)}


def test_whatever_the_report_reads_lies_above_what_it_names():
    above = set()
    nearer = makers(paths(DVC["report"]["deps"]))
    while nearer:
        above |= nearer
        nearer = set().union(*(makers(paths(DVC[name].get("deps"))) for name in nearer)) - above
    assert makers(set(STAGES["report"].inputs.values())) <= above
    assert above == set(STAGES) - {"report"}, (
        "nothing above the report reads this stage: name its output in the report's deps"
    )


def test_a_threshold_or_sampling_value_moves_only_what_comes_after_it():
    reads = {name: set(paths(stage["params"])) for name, stage in DVC.items()}
    # A new stage that reads one of these sections takes its place in the list.
    assert [name for name in DVC if "patching" in reads[name]] == ["patch_maps", "report"]
    assert [name for name in DVC if "sample" in reads[name]] == ["time_sampling", "sample_dpar", "sample_llamagen", "report"]
    assert [name for name in DVC if "score" in reads[name]] == ["score_dpar", "score_llamagen", "report"]
    assert not paths(DVC["train_llamagen"]["deps"]) & {"artifacts/patch_maps"}


@pytest.mark.parametrize("name", preset_names(ROOT))
def test_every_preset_is_valid_and_serves_every_stage(name):
    params = load_params(ROOT / "params" / f"{name}.yaml")
    for stage in STAGES:
        select(params, load_stage(stage).params)


def test_the_demo_preset_is_params_yaml():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "params" / "demo.yaml").read_text()


def test_the_paper_presets_are_those_of_the_table():
    texts = paper_presets((ROOT / "params" / "demo.yaml").read_text())
    assert len([name for name in texts if name.startswith("imagenet")]) == 16
    for name, text in texts.items():
        assert (ROOT / "params" / f"{name}.yaml").read_text() == text, f"{name}: run python -m pipeline.presets.paper"
    assert set(preset_names(ROOT)) == {"demo", "smoke", *texts}


def test_a_preset_is_taken_and_own_changes_are_not_lost(tmp_path):
    (tmp_path / "params").mkdir()
    for name in ("demo", "smoke"):
        (tmp_path / "params" / f"{name}.yaml").write_text((ROOT / "params" / f"{name}.yaml").read_text())
    use_preset(tmp_path, "demo")
    mine = (tmp_path / "params.yaml").read_text().replace("seed: 0 ", "seed: 5 ")
    (tmp_path / "params.yaml").write_text(mine)
    with pytest.raises(ValueError, match="has changes of yours"):
        use_preset(tmp_path, "smoke")
    assert (tmp_path / "params.yaml").read_text() == mine
    use_preset(tmp_path, "smoke", force=True)
    assert (tmp_path / "params.yaml.bak").read_text() == mine
    with pytest.raises(ValueError, match=r"no preset .imagenet.: did you mean imagenet256-dpar-b or imagenet256-dpar-l"):
        preset_file(ROOT, "imagenet")
    with pytest.raises(ValueError, match="no preset 'smok': did you mean smoke"):
        use_preset(tmp_path, "smok")


def test_a_stage_whose_input_is_missing_says_what_to_run(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with pytest.raises(StageError, match="run `dpar-cli run data` first"):
        run_stage("tokenizer", root=tmp_path, params_file=tmp_path / "params.yaml")


def test_wrong_params_stop_a_stage_before_anything_is_written(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("seed: 0 ", "seed: -1 ")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError, match="`seed` is -1"):
        run_stage("data", root=tmp_path, params_file=tmp_path / "params.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
