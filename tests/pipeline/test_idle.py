"""Values of params.yaml that have no effect beside the others are named, and no preset as shipped has one."""

import shutil

import pytest
from ruamel.yaml import YAML

from pipeline.doctor import examine
from pipeline.idle import idle_values
from stages.params import load_params, parse_params
from tests.helpers.paths import ROOT

NO_ENTROPIES = "patching.target_mean_length 1.81 has no effect: patching.mode {} reads no entropies"
WEIGHTS = {"tokenizer.weights": "vq.pt"}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"patching.mode": "static"}, [NO_ENTROPIES.format("static")]),
        ({"patching.mode": "token"}, [NO_ENTROPIES.format("token")]),
        ({"patching.mode": "entropy"}, []),
        ({"patching.mode": "static", "patching.target_mean_length": None}, []),
        (
            {"patching.mode": "token", "patching.target_mean_length": None, "patching.threshold": 3.0},
            ["patching.threshold 3.0 has no effect: patching.mode token reads no entropies"],
        ),
        (
            {"patching.mode": "static", "patching.target_mean_length": None, "sample.gate": "decoder"},
            ["sample.gate decoder has no effect: patching.mode static reads no entropies"],
        ),
        ({"sample.gate": "decoder"}, []),
        (
            {"patching.mode": "static", "patching.target_mean_length": None, "patching.static_length": 8},
            ["patching.static_length 8 has no effect: patching.max_patch_length 4 cuts every patch"],
        ),
        ({"sample.cfg_interval": [0.2, 0.8], "sample.cfg_schedule": "interval"}, []),
        (
            {"sample.cfg_interval": [0.2, 0.8]},
            ["sample.cfg_interval [0.2, 0.8] has no effect: sample.cfg_schedule constant guides every token"],
        ),
        (
            {"sample.cfg_scale": 1.0, "sample.cfg_schedule": "linear"},
            ["sample.cfg_schedule linear has no effect: sample.cfg_scale 1.0 guides nothing"],
        ),
        (WEIGHTS, []),
        (WEIGHTS | {"tokenizer.lr": 0.5}, ["tokenizer.lr 0.5 has no effect: tokenizer.weights vq.pt is not trained here"]),
    ],
)
def test_a_value_without_effect_is_named_with_what_stands_in_its_way(changes, found):
    raw = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    for name, value in changes.items():
        section, key = name.split(".")
        raw[section][key] = value
    assert [one.found for one in idle_values(parse_params(raw), ROOT)] == found


@pytest.mark.parametrize(
    "name", ["smoke", "ablation-static2", "ablation-token", "imagenet256-dpar-l", "imagenet384-llamagen-xl"]
)
def test_a_preset_as_shipped_has_none(name):
    assert not list(idle_values(load_params(ROOT / "params" / f"{name}.yaml"), ROOT))


def test_the_doctor_and_the_check_of_params_warn_of_it(tmp_path, monkeypatch, capsys):
    from pipeline.cli import params_check

    text = (ROOT / "params.yaml").read_text().replace("mode: entropy_rows ", "mode: token ")
    (tmp_path / "params.yaml").write_text(text)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    warned = [check for check in examine(tmp_path) if check.name == "params.yaml" and check.verdict == "warn"]
    assert [(one.found, one.fix) for one in warned] == [
        (NO_ENTROPIES.format("token"), "set it to null, or change patching.mode")
    ]
    params_check()
    assert "has no effect: patching.mode token" in " ".join(capsys.readouterr().out.split())
