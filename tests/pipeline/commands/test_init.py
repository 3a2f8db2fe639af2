"""`dpar-cli init`: own images to a params.yaml that is valid and keeps what somebody changed."""

import shutil

import pytest
from ruamel.yaml import YAML

from pipeline.commands.init import init
from stages.params import load_params
from tests.helpers.paths import ROOT
from tests.stages.tools.test_own_images import put


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    shutil.copytree(ROOT / "params", tmp_path / "project" / "params")
    shutil.copy(ROOT / "dvc.yaml", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def run(images, into, **options) -> None:
    init(images=images, into=into, **{"share": 0.1, "preset": "demo", "force": False, **options})


@pytest.mark.parametrize("preset", ["demo", "smoke"])
def test_params_fit_the_images_and_keep_their_comments(project, tmp_path, capsys, preset):
    images = put(tmp_path / "pictures", {"ant": 20, "bee": 20, "cat": 20})
    run(images, project / "own-images", preset=preset)
    params = load_params(project / "params.yaml")
    assert (params.data.source, params.data.train) == ("imagefolder", str(project / "own-images" / "train"))
    assert params.sample.images % 3 == 0 and params.score.images == min(params.sample.images, 54)
    assert params.score.allow_singular and params.train.validation_images == 0 and params.train.batch_size <= 54
    # Seen 50 times at most, but 100 steps at least, as the report gives no verdict below.
    assert (params.train.steps, params.entropy_model.train.steps) == ((100, 100) if preset == "demo" else (12, 12))
    text = (project / "params.yaml").read_text()
    assert text.startswith("# Own images from") and "# optimizer steps" in text
    before, after = (YAML(typ="safe").load(one) for one in ((ROOT / "params" / f"{preset}.yaml").read_text(), text))
    assert before.keys() == after.keys() and before["model"] == after["model"]
    said = " ".join(capsys.readouterr().out.split())
    assert "3 classes, 54 images for training, 6 for validation" in said and "continue with `dpar-cli run`" in said


def test_a_changed_params_file_is_kept_or_refused_before_anything_is_written(project, tmp_path):
    images = put(tmp_path / "pictures", {"ant": 3, "bee": 3})
    (project / "params.yaml").write_text("mine: 1\n")
    with pytest.raises(ValueError, match=r"params.yaml has changes of yours: --force"):
        run(images, project / "own-images")
    assert not (project / "own-images").exists()
    run(images, project / "own-images", force=True)
    assert (project / "params.yaml.bak").read_text() == "mine: 1\n"
    with pytest.raises(FileNotFoundError, match="no folder at"):
        run(tmp_path / "nowhere", project / "own-images", force=True)
