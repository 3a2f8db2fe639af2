"""dpar-cli sample: grids, continued images, refusals."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.commands.sample import sample_grid
from stages import artifacts
from tests.helpers.sample_artifacts import ROOT, write_artifacts


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project folder with tiny trained models (8 x 8 pixels, 4 x 4 tokens, classes ape, bee, cow)."""
    root = tmp_path_factory.mktemp("project")
    made = write_artifacts(tmp_path_factory.mktemp("made"))
    for source, target in (
        (made.dpar, artifacts.MODELS["dpar"]),
        (made.tokenizer, artifacts.TOKENIZER),
        (made.entropy_model, artifacts.ENTROPY_MODEL),
        (made.rule, artifacts.PATCH_RULE),
        (made.baseline, artifacts.MODELS["llamagen"]),
    ):
        (root / target.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / target.path)
    return root


def sample_once(root: Path, classes="1,2", seed=7, **changes) -> str:
    options = dict(
        model="dpar",
        count=2,
        cfg_scale=None,
        borders=False,
        given=None,
        keep_rows=0,
        root=root,
        params_file=ROOT / "params.yaml",
    )
    torch.set_num_threads(1)
    options = {"out": root / "grid.png", **options, **changes}
    return sample_grid(classes, seed, options.pop("out"), **options)


def test_classes_by_id_or_name_become_rows_of_a_grid(root):
    said = sample_once(root, "0,cow", count=3)
    assert "6 images of 16 tokens" in said and "patches per image" in said
    by_name = np.asarray(Image.open(root / "grid.png"))
    sample_once(root, "ape, 2", count=3)
    assert np.array_equal(by_name, np.asarray(Image.open(root / "grid.png")))
    assert by_name.shape[0] > 2 * 192 and by_name.shape[1] > 3 * 192


@pytest.mark.parametrize("model", ["dpar", "llamagen"])
def test_a_given_image_keeps_its_first_rows_and_goes_on(root, model, monkeypatch):
    from stages.shared.sampler import Sampler

    decoded = []
    original = Sampler.pixels
    monkeypatch.setattr(Sampler, "pixels", lambda self, tokens, **k: decoded.append(tokens) or original(self, tokens, **k))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(root / "own.png")
    sample_once(root, model=model, given=root / "own.png", keep_rows=2)
    sample_once(root, model=model, given=root / "own.png", keep_rows=3)
    two, three = decoded
    assert (two[:, :8] == two[0, :8]).all()
    assert torch.equal(two[:, :8], three[:, :8])
    assert not torch.equal(two[:, 8:12], three[:, 8:12])


def test_borders_are_drawn_over_the_pictures(root):
    sample_once(root)
    plain = np.asarray(Image.open(root / "grid.png"))
    sample_once(root, borders=True)
    assert (plain != np.asarray(Image.open(root / "grid.png"))).any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(classes="3"), r"class '3' does not exist: the model knows 0 to 2 \(0 ape, 1 bee, 2 cow\)"),
        (dict(classes="dog"), "class 'dog' does not exist"),
        (dict(classes="-1"), "class '-1' does not exist"),
        (dict(model="gan"), "expected dpar or llamagen"),
        (dict(model="llamagen", borders=True), "the LlamaGen baseline has none"),
        (dict(count=0), "--count must be at least 1"),
        (dict(keep_rows=2), "name the image with --given"),
        (dict(given=ROOT / "nowhere.png", keep_rows=2), "no image at"),
        (dict(given=ROOT / "params.yaml", keep_rows=2), "cannot be read: not an image"),
        (dict(given=ROOT / "params.yaml", keep_rows=0), "--keep-rows is 0, expected 1 to 3"),
        (dict(cfg_scale=0.5), "cfg_scale must be at least 1"),
        (dict(count=200), "ask for 400 pictures, a grid shows at most 256"),
        (dict(out=Path("grid.jpg")), r"--out is grid.jpg, expected a name that ends in .png"),
        (dict(out=ROOT / "params.yaml" / "grid.png"), "cannot be written: (Not a directory|File exists)"),
    ],
)
def test_senseless_requests_are_refused_in_a_sentence(root, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        sample_once(root, **changes)


def test_guidance_by_a_null_class_that_was_never_trained_is_refused(root, tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("cfg_scale: 2.0", "cfg_scale: 1.0")
    (tmp_path / "params.yaml").write_text(text.replace("class_dropout: 0.1", "class_dropout: 0.0"))
    with pytest.raises(ValueError, match=r"`sample.cfg_scale` 1.5 guides by the null class, which .* 0 never trains"):
        sample_once(root, cfg_scale=1.5, params_file=tmp_path / "params.yaml")


def test_of_a_given_image_of_another_size_the_centre_crop_is_taken(root):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    grids = []
    for name, image in (("wide", pixels), ("crop", pixels[:, 2:10]), ("left", pixels[:, :8])):
        Image.fromarray(image).save(root / f"{name}.png")
        sample_once(root, given=root / f"{name}.png", keep_rows=3)
        grids.append((root / "grid.png").read_bytes())
    assert grids[0] == grids[1] != grids[2]


def test_nothing_is_read_or_drawn_for_a_file_that_cannot_be_written(root, monkeypatch):
    monkeypatch.setattr("pipeline.commands.sample.Sampler", lambda *a, **k: pytest.fail("the models were read"))
    (root / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder.png cannot be written: .* is a folder"):
        sample_once(root, out=root / "folder.png")


def test_a_refused_request_leaves_no_file_behind(root):
    before = sorted(root.rglob("*"))
    with pytest.raises(ValueError, match="does not exist"):
        sample_once(root, classes="7", out=root / "other.png")
    assert sorted(root.rglob("*")) == before


def test_pictures_whose_caches_cannot_fit_are_refused(root, monkeypatch):
    class Little:
        available = 100_000

    monkeypatch.setattr("stages.sample.psutil.virtual_memory", Little)
    with pytest.raises(ValueError, match=r"needs .* GiB of caches.*ask for \d+ or fewer with --classes and --count"):
        sample_once(root, count=20)


def test_models_that_are_not_trained_yet_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is missing: run `dpar-cli run train_llamagen`"):
        sample_once(tmp_path, model="llamagen")
