"""dpar-cli patches: any image, or a sentence that says why not."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpar_core.files import load_weights, read_weights_header, save_weights
from dpar_core.patches.maps import MadeBy, write_rule
from dpar_core.patches.rule import PatchRule
from pipeline.report.overlay import Patcher, draw_patches, middle_square
from stages import artifacts as catalog
from tests.helpers.sample_artifacts import write_artifacts

TOKENIZER, ENTROPY_MODEL, RULE = (one.name for one in (catalog.TOKENIZER, catalog.ENTROPY_MODEL, catalog.PATCH_RULE))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    files = write_artifacts(tmp_path_factory.mktemp("made"))
    folder = tmp_path_factory.mktemp("project") / "artifacts"
    for source, name in ((files.tokenizer, TOKENIZER), (files.entropy_model, ENTROPY_MODEL)):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(source, folder / name)
    gate = load_weights(folder / ENTROPY_MODEL, kind="gpt")
    rule = {"mode": "entropy_rows", "row_width": 4, "threshold": 1.8, "max_patch_length": 4, "static_length": 2}
    (folder / RULE).parent.mkdir()
    write_rule(folder / RULE, PatchRule(**rule), made_by=MadeBy("0" * 16, gate.digest))
    return folder


@pytest.fixture
def artifacts(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "artifacts"))


@pytest.fixture
def photo(tmp_path):
    noise = np.random.default_rng(3).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_picture_of_any_size_is_cut_into_patches(artifacts, photo, tmp_path):
    said = draw_patches(photo, tmp_path / "out" / "overlay.png", artifacts=artifacts)
    assert Image.open(tmp_path / "out" / "overlay.png").width > 1000
    plan = Patcher(artifacts).plan(np.asarray(Image.open(photo)))
    assert plan.lengths.sum() == 16 == len(plan.entropies) and np.isnan(plan.entropies[0])
    assert f"{len(plan.lengths)} patches for 16 tokens, {16 / len(plan.lengths):.2f} tokens per patch" in said
    assert "threshold 1.80 nats" in said


def test_the_same_image_gives_the_same_bytes(artifacts, photo, tmp_path):
    for name in ("a.png", "b.png"):
        draw_patches(photo, tmp_path / name, artifacts=artifacts)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_square_is_cut_from_the_middle():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    square = np.asarray(middle_square(image))
    assert square.shape == (10, 10, 3) and (square == 255).all()


@pytest.mark.parametrize("missing", [TOKENIZER, ENTROPY_MODEL, RULE])
def test_a_missing_model_names_what_to_run(artifacts, photo, tmp_path, missing):
    (artifacts / missing).unlink()
    with pytest.raises(FileNotFoundError, match="is missing: run `dpar-cli run"):
        draw_patches(photo, tmp_path / "o.png", artifacts=artifacts)


def test_an_unreadable_image_is_refused_in_a_sentence(artifacts, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.jpg cannot be read as an image: not an image"):
        draw_patches(tmp_path / "page.jpg", tmp_path / "o.png", artifacts=artifacts)
    with pytest.raises(FileNotFoundError, match="no image file at"):
        draw_patches(tmp_path / "nowhere.jpg", tmp_path / "o.png", artifacts=artifacts)
    assert not (tmp_path / "o.png").exists()


def test_models_that_do_not_belong_together_are_refused(artifacts, photo, tmp_path):
    head = read_weights_header(artifacts / ENTROPY_MODEL)
    state = load_weights(artifacts / ENTROPY_MODEL, kind="gpt").state
    strange = {**head["meta"], "seed": 9}
    save_weights(artifacts / ENTROPY_MODEL, state, kind="gpt", config=head["config"], meta=strange)
    with pytest.raises(ValueError, match="run `dpar-cli run patch_maps`"):
        draw_patches(photo, tmp_path / "o.png", artifacts=artifacts)
    strange["tokenizer"] = "0123456789abcdef"
    save_weights(artifacts / ENTROPY_MODEL, state, kind="gpt", config=head["config"], meta=strange)
    with pytest.raises(ValueError, match=r"tokenizer 0123456789abcdef, but .* run `dpar-cli run entropy_model`"):
        draw_patches(photo, tmp_path / "o.png", artifacts=artifacts)
