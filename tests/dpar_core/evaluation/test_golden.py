"""Recorded outputs of the published code: every case agrees, and a case that does not is seen."""

import shutil

import numpy as np
import pytest
import torch

from dpar_core.evaluation.golden import verify_folder
from dpar_core.models import published
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.vq import VQ, VQConfig
from tests.helpers.paths import GOLDEN


@pytest.fixture(scope="module")
def cases():
    return verify_folder(GOLDEN)


def test_every_recorded_case_agrees(cases):
    assert len(cases) == 71
    failed = [f"{case.name}: {case.difference} > {case.tolerance}" for case in cases if not case.passed]
    assert not failed


def test_a_changed_recording_is_seen(tmp_path):
    for file in ("llamagen_gpt_ucond.npz", "llamagen_gpt_ucond.safetensors"):
        shutil.copy(GOLDEN / file, tmp_path)
    with np.load(GOLDEN / "llamagen_gpt_ucond.npz") as content:
        arrays = dict(content)
    arrays["logits"] = arrays["logits"] + np.float32(2e-4)
    np.savez(tmp_path / "llamagen_gpt_ucond.npz", **arrays)
    failed = [case.name for case in verify_folder(tmp_path) if not case.passed]
    assert failed == ["entropy model: logits"]


def test_a_folder_without_recordings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none of"):
        verify_folder(tmp_path)


@pytest.mark.parametrize(
    ("width", "heads", "split", "ours", "baseline"),
    [
        (768, 12, (1, 8, 3), 115_021_824, 110_888_448),
        (1024, 16, (1, 19, 4), 351_306_752, 342_910_976),
        (1280, 20, (1, 30, 5), 789_455_360, 774_699_520),
        (1536, 24, (1, 41, 6), 1_434_579_456, 1_410_972_672),
    ],
    ids=["B", "L", "XL", "XXL"],
)
def test_parameter_counts_are_the_published_ones(width, heads, split, ours, baseline):
    config = DPARConfig(16384, 16, width, heads, *split, num_classes=1000)
    other = GPTConfig(16384, 16, width, heads, sum(split), num_classes=1000)
    assert (config.num_parameters, other.num_parameters) == (ours, baseline)
    with torch.device("meta"):
        assert sum(p.numel() for p in DPAR(config).parameters()) == ours
        assert sum(p.numel() for p in GPT(other).parameters()) == baseline


def test_the_full_tokenizer_has_the_published_size():
    with torch.device("meta"):
        model = VQ(VQConfig(16384, 8, 128, (1, 1, 2, 2, 4), 256))
    assert sum(p.numel() for p in model.parameters()) == 71_883_403


@pytest.mark.parametrize("holder", ["model", "module", "state_dict", None])
def test_llamagen_checkpoints_are_read_bare_or_under_their_holders(tmp_path, holder):
    state = published.read_state(GOLDEN / "llamagen_gpt_c2i.safetensors")
    torch.save({holder: state, "steps": 7} if holder else state, tmp_path / "c2i.pt")
    found, config = published.read_gpt(tmp_path / "c2i.pt", heads=2, row_width=8)
    assert config == GPTConfig(128, 8, 64, 2, 2, 256, 10)
    assert all(torch.equal(found[name], state[name]) for name in state)


class Runs:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"model": Runs()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="is refused"):
        published.read_state(tmp_path / "evil.pt")
    assert "never be printed" not in capsys.readouterr().out


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = published.read_state(GOLDEN / "llamagen_gpt_c2i.safetensors")
    del state["norm.weight"]
    state["surplus"] = torch.zeros(1)
    state["layers.1.ffn_norm.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"1 missing \(norm.weight\); 1 unknown \(surplus\); 1 of another shape"):
        published.read_gpt(tmp_path / "broken.pt", heads=2, row_width=8)


def test_a_tokenizer_of_another_shape_than_the_params_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer.codebook_size is 128 but the weights have 64"):
        published.read_vq(GOLDEN / "llamagen_vq.safetensors", expected=VQConfig(128, 8, 32, (2, 1), 32))
