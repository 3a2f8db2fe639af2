"""The names of `dpar_core`, and the documents that show them: their code is run here."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dpar_core
from dpar_core import library
from dpar_core.evaluation.features import DemoClassifier
from dpar_core.files import load_weights, save_weights
from dpar_core.patches.maps import MadeBy, write_rule
from stages import artifacts
from tests.helpers.paths import ROOT
from tests.helpers.sample_artifacts import CLASSES, GRID, write_artifacts


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with artifacts of a tiny run, and a photo."""
    folder = tmp_path_factory.mktemp("library")
    made = write_artifacts(folder)
    rule = json.loads(made.rule.read_text())["rule"]
    gate = load_weights(made.entropy_model, kind="gpt").digest
    write_rule(made.rule, dpar_core.PatchRule(**rule), made_by=MadeBy("0" * 16, gate))
    for source, name in zip((made.tokenizer, made.entropy_model, made.dpar, made.baseline, made.rule), library.RUN_FILES):
        target = folder / "artifacts" / library.RUN_FILES[name]
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    network = DemoClassifier(CLASSES)
    (folder / "artifacts" / "features").mkdir()
    save_weights(
        folder / "artifacts" / artifacts.CLASSIFIER.name,
        network.state_dict(),
        kind="demo_classifier",
        config={"num_classes": CLASSES},
        meta={},
    )
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


@pytest.fixture(scope="module")
def run(project):
    return dpar_core.load_run(project / "artifacts", device="cpu")


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, dpar_core; print([m for m in ('torch', 'numpy', 'PIL', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there_and_documented():
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    for name in dpar_core.__all__:
        assert getattr(dpar_core, name).__doc__, name
        assert f"`{name}" in page, name
    with pytest.raises(AttributeError, match="load_run"):
        _ = dpar_core.load


def test_files_of_a_run_are_those_of_the_catalog():
    expected = {
        "tokenizer": artifacts.TOKENIZER,
        "entropy_model": artifacts.ENTROPY_MODEL,
        "dpar": artifacts.MODELS["dpar"],
        "llamagen": artifacts.MODELS["llamagen"],
        "rule": artifacts.PATCH_RULE,
    }
    assert {name: artifact.name for name, artifact in expected.items()} == library.RUN_FILES


def test_an_image_becomes_tokens_entropies_and_patches_that_belong_together(run, project):
    image = dpar_core.open_image(project / "photo.png")
    found = run.patches([image, image[:20, :20]])
    assert found.tokens.shape == found.entropies.shape == (2, GRID * GRID)
    assert [int(lengths.sum()) for lengths in found.lengths] == [GRID * GRID] * 2
    assert run.decode(found.tokens).shape == (2, run.image_size, run.image_size, 3)
    assert torch.equal(run.encode(np.stack([image])), found.tokens[:1])


def test_a_sampled_image_does_not_depend_on_its_neighbours(run):
    together = run.generate([0, 1, 2], [5, 6, 7], cfg_scale=2.0)
    alone = run.generate([1], [6], cfg_scale=2.0)
    assert torch.equal(together.tokens[1:2], alone.tokens)
    assert together.patch_lengths[1].tolist() == alone.patch_lengths[0].tolist()
    assert run.generate([1], [6], model="llamagen").tokens.shape == (1, GRID * GRID)


def test_given_tokens_stay_and_classes_have_names(run):
    tokens = run.encode(np.zeros((1, 8, 8, 3), np.uint8))
    half = tokens[:, : GRID * 2]
    for model in ("dpar", "llamagen"):
        named = run.generate([run.class_names[2], 0], np.arange(2), given=half.numpy().astype(np.uint16), model=model)
        assert torch.equal(named.tokens[:, : GRID * 2], half.repeat(2, 1))
        assert torch.equal(named.tokens, run.generate([2, 0], [0, 1], given=half.repeat(2, 1), model=model).tokens)
    assert np.array_equal(run.decode(tokens.numpy()), run.decode(tokens))
    lengths = dpar_core.patch_lengths(run.entropies(tokens.numpy()).numpy(), run.rule)
    assert lengths[0].tolist() == run.patches(np.zeros((1, 8, 8, 3), np.uint8)).lengths[0].tolist()


@pytest.mark.parametrize("label", [CLASSES, -1, "yak"])
def test_a_class_that_does_not_exist_is_refused(run, label):
    with pytest.raises(ValueError, match=f"class {label!r} does not exist"):
        run.generate([0, label], [0, 1])


def test_what_does_not_fit_is_refused_in_a_sentence(run, project, tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        run.encode(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"write \[image\]"):
        run.encode(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="as open_image"):
        run.encode([project / "photo.png"])
    with pytest.raises(ValueError, match=r"nowhere\.png: cannot be read"):
        dpar_core.open_image(tmp_path / "nowhere.png")
    for senseless in (torch.full((1, GRID * GRID), 999), torch.full((1, GRID * GRID), -1)):
        with pytest.raises(ValueError, match="another tokenizer"):
            run.decode(senseless)
        with pytest.raises(ValueError, match="another tokenizer"):
            run.entropies(senseless)
    with pytest.raises(ValueError, match="of an integer type"):
        run.generate([0], [0], given=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="tokens must be"):
        run.decode(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="dpar or llamagen"):
        run.generate([0], [0], model="gpt")
    with pytest.raises(FileNotFoundError, match="dpar-cli run tokenizer"):
        dpar_core.load_run(tmp_path)


def test_a_rule_of_another_entropy_model_is_refused(project, tmp_path):
    copy = shutil.copytree(project / "artifacts", tmp_path / "artifacts")
    rule = json.loads((copy / library.RUN_FILES["rule"]).read_text())["rule"]
    write_rule(copy / library.RUN_FILES["rule"], dpar_core.PatchRule(**rule), made_by=MadeBy("0" * 16, "another"))
    with pytest.raises(ValueError, match="dpar-cli run patch_maps"):
        dpar_core.load_run(copy, device="cpu")


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"rule": {"mode": "static"}}, "was trained with the patch rule .*, but .* holds"),
        ({"classes": ["ape", "bee", "dog"]}, "dpar and llamagen in .* were trained on different classes"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(project, tmp_path, meta, words):
    copy = shutil.copytree(project / "artifacts", tmp_path / "artifacts")
    change_meta(copy / library.RUN_FILES["dpar"], meta)
    with pytest.raises(ValueError, match=words):
        dpar_core.load_run(copy, device="cpu")


def test_a_class_without_training_images_is_not_sampled(project, tmp_path):
    copy = shutil.copytree(project / "artifacts", tmp_path / "artifacts")
    change_meta(copy / library.RUN_FILES["dpar"], {"untrained_classes": [1]})
    run = dpar_core.load_run(copy, device="cpu")
    with pytest.raises(ValueError, match="class 1 had no training images"):
        run.generate([0, 1], [0, 1])
    assert len(run.generate([0, 2], [0, 1]).tokens) == 2


def change_meta(path, changes):
    found = load_weights(path, kind="dpar")
    save_weights(path, found.state, kind="dpar", config=found.config, meta={**found.meta, **changes})


def test_equal_sets_have_no_distance_and_small_ones_are_refused(project):
    network = dpar_core.feature_network("demo", project / "artifacts" / artifacts.CLASSIFIER.name, "cpu")
    images = np.random.default_rng(1).integers(0, 256, (80, 16, 16, 3), np.uint8)
    same = dpar_core.score_images(images, images, network)
    assert abs(same.frechet) < 1e-6 and same.precision == same.recall == 1
    assert dpar_core.score_images(images // 4, images, network).frechet > 1e-3
    with pytest.raises(ValueError, match="too few"):
        dpar_core.score_images(images[:20], images, network)
    with pytest.raises(ValueError, match="resize"):
        dpar_core.score_images(images[:, :8], images, network)


@pytest.mark.parametrize("page", ["library", "threshold"])
def test_the_code_in_the_documents_runs(page, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    exec(compile("\n".join(blocks), f"{page}.md", "exec"), {"__name__": "__main__"})
    assert "patches" in capsys.readouterr().out


def test_the_notebook_runs(project, monkeypatch):
    monkeypatch.chdir(project)
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {"display": lambda *shown: None}
    exec(compile("\n".join(cells), "tour.ipynb", "exec"), names)
    assert names["sampled"].tokens.shape[1] == GRID * GRID
    assert not any(cell.get("outputs") for cell in notebook["cells"])
