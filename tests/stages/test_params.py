"""params.yaml: what is refused, and that everything is said at once."""

import copy
from dataclasses import dataclass

import pytest
import torch
from pydantic import ValidationError
from ruamel.yaml import YAML

from dpar_core.evaluation.features import DemoClassifier
from stages import params as P
from tests.helpers.paths import ROOT


@pytest.fixture
def demo() -> dict:
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text())


def set_value(raw: dict, name: str, value: object) -> dict:
    *sections, key = name.split(".")
    place = raw
    for section in sections:
        place = place[section]
    place[key] = value
    return raw


def test_the_shipped_params_are_valid():
    P.load_params(ROOT / "params.yaml")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("train.speed", 3, "unknown key `train.speed`"),
        ("seed", "zero", "`seed` is 'zero', expected a valid integer"),
        ("train.steps", 1.5, "`train.steps` is 1.5"),
        ("train.compile", 1, "`train.compile` is 1"),
        ("train.lr", float("nan"), "`train.lr` is nan"),
        ("model.dropout", 1.0, "`model.dropout` is 1.0, expected less than 1"),
        ("sample.gate", "oracle", "expected one of 'entropy_model' or 'decoder'"),
        ("data.image_size", 62, "not a multiple of the tokenizer's downsampling"),
        ("data.train", "photos", "source builtin reads no path"),
        ("data.source", "imagefolder", "needs the path of its train images"),
        ("sample.threshold", 99.0, "above ln V"),
        ("tokenize_images.precision", "half", "expected one of 'auto', 'fp32', 'tf32' or 'bf16'"),
        ("model.heads", 7, "does not divide"),
        ("entropy_model.size", "B", "size B has 768"),
        ("train.batch_size", 33, None),
        ("train.workers", 5, "does not divide into 5 workers"),
        ("train.checkpoint_every", 75, "75 is not a multiple of `validate_every` 50, so some have none"),
        ("train.equal_time_step", 10**6, "lies beyond `train.steps`"),
        ("patching.threshold", 1.0, "both are set, expected exactly one"),
        ("patching.target_mean_length", 4.5, "no threshold can reach it"),
        ("score.images", 10**6, "asks for more images"),
        ("score.features", "inception", "needs `score.features_file`"),
        ("tokenizer.base_width", 12, "groups of GroupNorm"),
        ("tokenizer.weights_key", "ema", "`tokenizer.weights` names no file"),
    ],
)
def test_a_wrong_value_gets_a_sentence_that_names_it(demo, name, value, words):
    raw = set_value(demo, name, value)
    if words is None:
        P.parse_params(raw)
        return
    with pytest.raises(P.ParamsError) as caught:
        P.parse_params(raw)
    assert any(words in sentence for sentence in caught.value.sentences), caught.value.sentences


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.class_dropout": 0.0}, "guides by the null class, which `model.class_dropout` 0 never trains"),
        ({"model.class_dropout": 0.0, "sample.cfg_scale": 1.0}, None),
        ({"patching.max_patch_length": None, "patching.target_mean_length": 9.0}, "above the tokens of a row, 8"),
        ({"patching.mode": "static", "sample.threshold": 3.0}, "`sample.threshold` is set, but patching.mode static"),
        ({"patching.mode": "token", "sample.max_patch_length": 2}, "`sample.max_patch_length` is set, but"),
        ({"sample.cfg_schedule": "interval", "sample.cfg_interval": [0.5, 0.5]}, "is empty, so nothing is guided"),
        ({"sample.cfg_schedule": "interval", "sample.cfg_interval": [0.51, 0.512]}, "holds none of the 64 tokens"),
        ({"sample.cfg_schedule": "interval", "sample.cfg_interval": [0.5, 0.502]}, None),
        ({"sample.temperature": 1e-40}, "`sample.temperature` is 1e-40, expected at least 0.0001"),
        ({"sample.cfg_scale": 1e300}, "`sample.cfg_scale` is 1e+300, expected at most 10000"),
        ({"sample.resize": 16}, "another size than the train images"),
        ({"sample.resize": 16, "score.reference": "refs.npz"}, None),
        ({"score.splits": 450}, "`score.splits` 450 needs more images"),
        ({"score.neighbours": 450}, "`score.neighbours` 450 needs more images"),
        ({"score.images": 64}, "64 are too few for a covariance of 64 features"),
        ({"score.images": 64, "score.allow_singular": True}, None),
        ({"data.label_key": "cls"}, "`data.label_key` is set, but source builtin reads no such key"),
        ({"score.reference": ""}, "`score.reference` is empty, expected a path"),
        ({"data.label_key": ""}, "`data.label_key` is empty, expected a name, or null"),
        ({"train.lr": float("inf")}, "`train.lr` is inf, expected a finite number"),
        ({"sample.seed": 2**63}, "`sample.seed`"),
    ],
)
def test_params_that_would_give_wrong_numbers_or_fail_after_training_are_refused(demo, changes, words):
    for name, value in changes.items():
        set_value(demo, name, value)
    if words is None:
        P.parse_params(demo)
        return
    with pytest.raises(P.ParamsError) as caught:
        P.parse_params(demo)
    assert any(words in sentence for sentence in caught.value.sentences), caught.value.sentences


def test_checkpoints_need_a_validation_loss_only_where_the_best_are_kept(demo):
    for name in ("entropy_model.train", "train"):
        for changes in ({"keep_best": 0, "checkpoint_every": 75}, {"checkpoint_every": 100}, {"checkpoint_every": 10**6}):
            raw = copy.deepcopy(demo)
            for key, value in changes.items():
                set_value(raw, f"{name}.{key}", value)
            P.parse_params(raw)


def test_faults_of_all_kinds_are_said_at_once(demo):
    demo["foo"] = 1
    demo["seed"] = "a"
    demo["model"]["heads"] = 7
    demo["patching"]["threshold"] = 99.0
    del demo["report"]
    with pytest.raises(P.ParamsError) as caught:
        P.parse_params(demo)
    text = str(caught.value)
    for words in ("unknown key `foo`", "`seed`", "`model.heads`", "`report` is missing", "above ln V", "both are set"):
        assert words in text


def test_a_misspelt_key_is_one_fault_and_names_the_one_that_is_missing(demo):
    demo["train"]["stepz"] = demo["train"].pop("steps")
    demo["model"]["other"] = 1
    with pytest.raises(P.ParamsError) as caught:
        P.parse_params(demo)
    typo, other = sorted(caught.value.sentences, reverse=True)
    assert typo == "params.yaml: unknown key `train.stepz`: write `steps`, which is missing"
    assert other.startswith("params.yaml: unknown key `model.other`: remove it")


def test_a_stage_gets_its_sections_and_cannot_change_them():
    @dataclass(frozen=True)
    class Wanted:
        seed: int
        patching: P.Patching

    chosen = P.select(P.load_params(ROOT / "params.yaml"), Wanted)
    assert chosen.patching.max_patch_length == 4
    with pytest.raises(ValidationError):
        chosen.patching.max_patch_length = 5


def test_broken_yaml_and_a_missing_file_get_one_sentence(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(P.ParamsError, match=r"broken\.yaml is not YAML: .* in line 2, column \d"):
        P.load_params(tmp_path / "broken.yaml")
    with pytest.raises(FileNotFoundError, match=r"no params file at .*other\.yaml: name one that is there"):
        P.load_params(tmp_path / "other.yaml")
    with pytest.raises(FileNotFoundError, match=r"no params file at .*: `dpar-cli params use demo`"):
        P.load_params(tmp_path / "params.yaml")


def test_params_nested_beyond_all_sense_are_refused_at_once(tmp_path):
    (tmp_path / "params.yaml").write_text("data: " + "[" * 20_000)
    with pytest.raises(P.ParamsError, match="nested more than 50 brackets deep"):
        P.load_params(tmp_path / "params.yaml")


def test_settled_params_have_no_auto_left_and_differ_by_device(monkeypatch):
    params = P.load_params(ROOT / "params" / "demo.yaml")
    monkeypatch.setattr("stages.params.settle", lambda choice, device: "fp32" if choice == "auto" else choice)
    found = P.settled(params, "cpu")
    assert (found.tokenizer.precision, found.entropy_model.train.precision, found.train.precision) == ("fp32",) * 3
    changed = {name for name in type(params).model_fields if getattr(params, name) != getattr(found, name)}
    assert changed == {"tokenizer", "entropy_model", "train"}
    assert params.train.precision == "auto"


def test_a_choice_and_an_emulated_precision_get_a_line_each(monkeypatch):
    params = P.load_params(ROOT / "params" / "demo.yaml")
    monkeypatch.setattr("stages.params.multiplies_bf16", lambda device: False)
    monkeypatch.setattr("stages.params.settle", lambda choice, device: "fp32" if choice == "auto" else choice)
    monkeypatch.setattr("stages.params.slowdown", lambda device: 170.0)
    (line,) = P.precision_lines("train", params.train, "cpu")
    assert line == "train.precision: auto is fp32 here (this cpu emulates bfloat16)"
    explicit = params.entropy_model.model_copy(update={"train": params.train.model_copy(update={"precision": "bf16"})})
    (line,) = P.precision_lines("entropy_model", explicit, "cpu")
    assert line.startswith("entropy_model.train.precision is bf16") and "170 times as long as in fp32" in line
    assert P.precision_lines("sample", params.sample.model_copy(update={"precision": "bf16"}), "cpu") == []
    imported = params.tokenizer.model_copy(update={"precision": "bf16", "weights": "vq.pt"})
    assert P.precision_lines("tokenizer", imported, "cpu") == []  # nothing is trained
    (line,) = P.precision_lines("entropies", params.entropies.model_copy(update={"precision": "bf16"}), "cpu")
    assert line.endswith("; set it to fp32")  # it knows no auto
    assert P.precision_lines("train", params.train.model_copy(update={"precision": "fp32"}), "cpu") == []


def test_the_features_that_params_count_are_those_of_the_demo_network():
    pooled, _ = DemoClassifier(3).features(torch.zeros(1, 3, 32, 32))
    assert pooled.shape == (1, P.FEATURE_COUNTS["demo"])
