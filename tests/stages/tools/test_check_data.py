"""data check finds every damage and --repair makes just that again; inspect and patch statistics show what is there."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dpar_core.data.images
from dpar_core.data.manifest import read_manifest, write_manifest
from dpar_core.data.shards import TokenShards
from dpar_core.files import sha256_file
from dpar_core.patches.maps import EntropyMaps, PatchMaps
from dpar_core.patches.rule import PatchRule, patch_starts_numpy
from stages.tools import check_data as check_module
from stages.tools.check_data import check_data, repair_data
from stages.tools.inspect_data import describe, draw_inspection, inspect_image
from stages.tools.patch_stats import (
    entropy_quantiles,
    parse_max_lengths,
    parse_range,
    patch_stats,
    thresholds_around,
)
from stages.tracker import NullTracker
from tests.helpers.tiny_data import Project, as_artifacts, make_project, photo, tiny_params


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    torch.set_num_threads(1)
    return make_project(tmp_path_factory.mktemp("project")).tokenize().entropies().patch_maps()


@pytest.fixture
def artifacts(project, tmp_path) -> Path:
    return as_artifacts(project, tmp_path / "artifacts")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def repair(project: Project, artifacts: Path, **changes):
    params = tiny_params(project.root / "images", **changes)
    return repair_data(artifacts, params, device="cpu", work=artifacts.parent / "repair", tracker=NullTracker())


def test_a_whole_data_set_has_no_problems(artifacts):
    report = check_data(artifacts)
    assert report.problems == ()
    assert report.files == 5 + 4 + 4 + 3 and report.bytes > 10_000


FILES = [
    "tokens/train-000001.tar",
    "tokens/validation-000000.tar",
    "tokens/index.arrow",
    "entropies/train-000002.parquet",
    "patch_maps/validation-000000.parquet",
    "patch_maps/train.starts.npy",
    "patch_maps/rule.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "cut", "one bit"])
def test_damage_is_named_and_repaired_to_the_same_bytes(project, artifacts, name, damage):
    before, path = contents(artifacts), artifacts / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    (problem,) = [one for one in check_data(artifacts).problems if one.expected]
    assert problem.file == name and ("is missing" if damage == "gone" else "is damaged") in problem.what
    mended, report = repair(project, artifacts)
    assert mended == [name] and report.problems == ()
    assert contents(artifacts) == before


def test_everything_damaged_at_once_is_repaired(project, artifacts, monkeypatch):
    before = contents(artifacts)
    for name in FILES:
        (artifacts / name).unlink()
    mended, report = repair(project, artifacts)
    assert sorted(mended) == sorted(FILES) and report.problems == ()
    assert contents(artifacts) == before


def test_repair_makes_nothing_that_is_sound(project, artifacts, monkeypatch):
    made = []
    kind = check_module.tokenize_images.ShardTokenizer
    real = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, shard: (made.append(shard.name), real(self, shard)))
    (artifacts / "tokens" / "train-000001.tar").unlink()
    repair(project, artifacts)
    assert made == ["train-000001.tar"]


def test_what_comes_out_differently_is_not_put_in_place(project, artifacts):
    (artifacts / "tokens" / "train-000001.tar").unlink()
    images = project.root / "images"
    victims = {path: path.read_bytes() for path in sorted((images / "train").rglob("*.png"))}
    other = next(iter((images / "validation").rglob("*.png"))).read_bytes()
    try:
        for path in victims:
            path.write_bytes(other)
        with pytest.raises(ValueError, match=r"image train:.* has changed since the manifest .* run `dpar-cli run`"):
            repair(project, artifacts)
    finally:
        for path, content in victims.items():
            path.write_bytes(content)
    assert not (artifacts / "tokens" / "train-000001.tar").exists()


def test_repair_with_other_params_says_what_to_run(project, artifacts):
    (artifacts / "tokens" / "validation-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"was made with other params, images or tokenizer"):
        repair(project, artifacts, data={"views": "ten_crop_1.1"})
    (artifacts / "tokens" / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"which shards of 100 images have not"):
        repair(project, artifacts, tokenize_images={"shard_images": 100, "batch_size": 6})


def test_what_does_not_belong_together_is_reported(project, artifacts, tmp_path):
    shutil.copy(artifacts / "entropy_model" / "model.safetensors", artifacts / "tokenizer" / "tokenizer.safetensors")
    (artifacts / "entropies" / "notes.txt").write_text("mine")
    found = [str(problem) for problem in check_data(artifacts).problems]
    (message,) = [one for one in found if "tokens/summary.json was made with tokenizer" in one]
    assert "run `dpar-cli run tokenize_images`" in message
    assert any("entropies/notes.txt does not belong there" in one for one in found)
    assert len(found) == 2
    shutil.copy(artifacts / "tokenizer" / "tokenizer.safetensors", artifacts / "entropy_model" / "model.safetensors")
    (artifacts / "entropy_model" / "model.safetensors").write_bytes(b"another")
    found = [str(problem) for problem in check_data(artifacts).problems]
    assert sum("was made with entropy model" in one for one in found) == 2


@pytest.mark.parametrize("name", ["data/manifest.parquet", "tokens/summary.json", "entropies/summary.json"])
def test_a_damaged_summary_or_manifest_names_the_stage_to_run(artifacts, name):
    (artifacts / name).write_bytes(b"{}")
    assert any(one.file == name and "run `dvc repro" in one.what for one in check_data(artifacts).problems)


@pytest.mark.parametrize("stage", ["tokens", "entropies", "patch_maps"])
@pytest.mark.parametrize("gone", ["folder", "summary"])
def test_an_absent_folder_or_summary_is_missing_and_names_the_stage_to_run(artifacts, stage, gone):
    (artifacts / stage / "summary.json").unlink() if gone == "summary" else shutil.rmtree(artifacts / stage)
    (problem,) = check_data(artifacts).problems
    run = "tokenize_images" if stage == "tokens" else stage
    assert problem.file == f"{stage}/summary.json" and problem.what.startswith("is missing: ")
    assert f"run `dpar-cli run {run}`" in problem.what and not problem.repairable


def test_a_file_that_cannot_be_read_is_damaged_and_the_check_goes_on(project, artifacts, monkeypatch):
    unreadable = artifacts / "entropies" / "train-000002.parquet"
    (artifacts / "patch_maps" / "rule.json").unlink()

    def failing(path):
        if path in (unreadable, artifacts / "tokenizer" / "tokenizer.safetensors"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return sha256_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(check_module, "sha256_file", failing)
        assert [str(problem) for problem in check_data(artifacts).problems] == [
            "entropies/train-000002.parquet is damaged: Input/output error",
            "patch_maps/rule.json is missing",
            "tokenizer/tokenizer.safetensors is damaged: Input/output error",
        ]
    unreadable.unlink()
    unreadable.mkdir()
    (message,) = [str(problem) for problem in check_data(artifacts).problems if problem.folder == "entropies"]
    assert message == "entropies/train-000002.parquet is damaged: Is a directory"
    with pytest.raises(ValueError, match=r"train-000002.parquet is a folder, expected a file: remove it, then repair"):
        repair(project, artifacts)
    unreadable.rmdir()
    mended, report = repair(project, artifacts)
    assert sorted(mended) == ["entropies/train-000002.parquet", "patch_maps/rule.json"] and report.problems == ()


def test_the_list_of_bad_images_is_checked_and_repaired_to_the_same_bytes(tmp_path):
    project = make_project(tmp_path / "project", data={"max_bad_share": 0.3})
    images = project.root / "images" / "train"
    for name, content in (("a/000.png", b""), ("b/001.png", b"<html>gone</html>"), ("a/004.png", b"x" * 99)):
        (images / name).write_bytes(content)
    project.data().tokenize().entropies().patch_maps()
    artifacts = as_artifacts(project, tmp_path / "artifacts")
    assert check_data(artifacts).problems == ()
    path, before = artifacts / "tokens" / "bad_images.json", contents(artifacts)
    assert len(json.loads(path.read_text())) == 3
    one = json.dumps([{"key": "k", "source": "s", "reason": "r"}]).encode()
    for content, message in (
        (None, "is missing"),
        (b"\x80{", "is damaged: expected a list"),
        (b"{}", "is damaged: expected a list"),
        (b"[1]", "is damaged: expected a list"),
        (one, "is damaged: it lists 1 images, the shards lack 3"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        (problem,) = check_data(artifacts).problems
        assert problem.file == "tokens/bad_images.json" and problem.what.startswith(message)
        assert repair(project, artifacts) == (["tokens/bad_images.json"], check_data(artifacts))
        assert contents(artifacts) == before
    (artifacts / "tokens" / "index.arrow").unlink()
    path.unlink()
    assert set(repair(project, artifacts)[0]) == {"tokens/index.arrow", "tokens/bad_images.json"}
    assert contents(artifacts) == before
    path.unlink()
    (images / "a" / "000.png").write_bytes((images / "a" / "002.png").read_bytes())
    with pytest.raises(ValueError, match=r"image train:a/000.png has changed since the manifest was made"):
        repair(project, artifacts)


def test_inspect_collects_everything_of_an_image(project, artifacts):
    shards = TokenShards(artifacts / "tokens", "train")
    maps = PatchMaps(artifacts / "patch_maps", shards)
    entropies = EntropyMaps(artifacts / "entropies", shards).all().reshape(len(shards), 2, -1)
    for index in (0, 7, 13):
        found = inspect_image(shards.key(index), artifacts=artifacts, data=project.params.data)
        assert found.missing == []
        assert np.array_equal(found.tokens, shards.all_views(index))
        assert np.array_equal(found.entropies, entropies[index], equal_nan=True)
        expected = maps.lengths(np.array([index, index]), np.array([0, 1]))
        assert [one.tolist() for one in found.lengths] == [one.tolist() for one in expected]
        assert found.shard == f"train-{index // 5:06d}.tar"
        picture = draw_inspection(found)
        assert picture.width > 5 * 200 and np.asarray(picture).std() > 10
        assert f"patches   {len(expected[0])}, {len(expected[1])}" in describe(found)


def test_inspect_finds_images_by_the_end_of_their_path_and_refuses_guesses(project, artifacts):
    data = project.params.data
    assert inspect_image("train:a/004.png", artifacts=artifacts, data=data).row.source == "train:a/004.png"
    with pytest.raises(ValueError, match=r"2 images end with 'a/004.png'"):
        inspect_image("a/004.png", artifacts=artifacts, data=data)
    for part in ("04.png", "4.png", "png"):  # of a name, which may be another's
        with pytest.raises(ValueError, match=rf"no image '{part}' in the manifest"):
            inspect_image(part, artifacts=artifacts, data=data)
    later = data.model_copy(update={"views": "ten_crop_1.1", "image_size": 4})
    one, other = (inspect_image("train:a/004.png", artifacts=artifacts, data=params).views for params in (data, later))
    assert np.array_equal(one, other)  # those that there are tokens of
    with pytest.raises(ValueError, match=r"no image 'nobody' in the manifest: expected a key, as train-"):
        inspect_image("nobody", artifacts=artifacts, data=data)


def test_inspect_shows_what_there_is_before_later_stages_ran(project, artifacts):
    shutil.rmtree(artifacts / "entropies")
    found = inspect_image("train:b/001.png", artifacts=artifacts, data=project.params.data)
    assert found.tokens is not None and found.entropies is None
    assert "run `dpar-cli run entropies`" in describe(found)
    shutil.rmtree(artifacts / "tokens")
    found = inspect_image("train:b/001.png", artifacts=artifacts, data=project.params.data)
    assert found.tokens is None and draw_inspection(found).width > 200


def test_inspect_shows_an_image_that_no_views_can_be_cut_from(project, artifacts, monkeypatch):
    monkeypatch.setattr(dpar_core.data.images, "MOST_PIXELS", 100)  # 11 x 14 pixels become 8 x 10, then 800 x 8
    path = project.root / "images" / "train" / "b" / "001.png"
    sound = path.read_bytes()
    try:
        Image.fromarray(photo(1, 1, 100)).save(path)
        manifest = read_manifest(artifacts / "data" / "manifest.parquet")
        write_manifest(artifacts / "data" / "manifest.parquet", manifest.with_contents([None] * len(manifest.rows)))
        found = inspect_image("train:b/001.png", artifacts=artifacts, data=project.params.data)
        assert found.image.shape == (1, 100, 3) and found.views is None and found.tokens is not None
        assert "the image cannot be used: 100 x 1 pixels are too narrow for a square of 8" in describe(found)
        assert "100 x 1, no views" in describe(found) and draw_inspection(found).height > 2 * 200
        shutil.rmtree(artifacts / "tokens")
        found = inspect_image("train:b/001.png", artifacts=artifacts, data=project.params.data)
        assert found.decoded is None and draw_inspection(found).height < 2 * 200
        path.write_bytes(b"")
        found = inspect_image("train:b/001.png", artifacts=artifacts, data=project.params.data)
        with pytest.raises(ValueError, match=r"nothing to show of train-\S+: the image cannot be used: the file is empty"):
            draw_inspection(found)
    finally:
        path.write_bytes(sound)


def test_statistics_are_those_of_the_rule_on_all_maps(artifacts):
    shards = TokenShards(artifacts / "tokens", "train")
    entropies = EntropyMaps(artifacts / "entropies", shards).all()
    stats = patch_stats(artifacts / "tokens", artifacts / "entropies", thresholds=[2.0, 2.4], max_lengths=[1, 4, None])
    assert stats.whole and stats.maps == 28 and len(stats.cells) == 6
    for cell in stats.cells:
        rule = PatchRule("entropy_rows", 4, cell.threshold, cell.max_length)
        counts = patch_starts_numpy(entropies, rule).sum(1)
        assert cell.patches == pytest.approx(counts.mean()) and cell.mean_length == pytest.approx(16 / counts.mean())
        assert (cell.low, cell.high) == (pytest.approx(np.percentile(counts, 5)), pytest.approx(np.percentile(counts, 95)))
        of_class = [counts[np.repeat(shards.labels, 2) == label].mean() for label in (0, 1)]
        assert cell.fewest.patches == pytest.approx(min(of_class)) and cell.most.patches == pytest.approx(max(of_class))
        assert cell.fewest.name == "ab"[int(np.argmin(of_class))]
    some = patch_stats(artifacts / "tokens", artifacts / "entropies", thresholds=[2.0], max_lengths=[4], limit=10)
    assert some.maps == 10 and not some.whole


def test_curves_are_drawn_and_the_same_each_time(artifacts, tmp_path):
    from pipeline.report.curves import draw_curves

    stats = patch_stats(artifacts / "tokens", artifacts / "entropies", thresholds=[2.0, 2.4], max_lengths=[4, None])
    for name in ("a.png", "b.png"):
        draw_curves(stats, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("7.6:8.1:0.1", [7.6, 7.7, 7.8, 7.9, 8.0, 8.1]), ("7.8", [7.8]), ("1,2.5", [1.0, 2.5]), ("3:3:1", [3.0])],
)
def test_ranges_include_both_ends(text, numbers):
    assert parse_range(text) == numbers


@pytest.mark.parametrize(
    "text", ["", "a", "1:2", "2:1:0.1", "1:2:0", "1:2:-1", "1:2:0.3", "1:2:3:4", "nan", "1,inf", "1:nan:1"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a range: expected FIRST:LAST:STEP"):
        parse_range(text)


def test_maximum_lengths_are_read_and_others_refused():
    assert parse_max_lengths("1, 4,none") == [1, 4, None]
    for text in ("0", "-1", "x", "1,,2", "", "\u00b2"):
        with pytest.raises(ValueError, match=r"expected a number of tokens from 1, or none"):
            parse_max_lengths(text)


def test_thresholds_that_nobody_named_follow_the_entropies():
    entropies = np.linspace(0.0, 1.0, 101, dtype=np.float32).reshape(1, -1).repeat(2, axis=0)
    entropies[:, 0] = np.nan
    assert entropy_quantiles(entropies) == pytest.approx([0.21, 0.41, 0.51, 0.6, 0.8], abs=0.011)
    assert thresholds_around(entropies, 0.55) == pytest.approx([0.35, 0.45, 0.55, 0.65, 0.75], abs=0.011)
    assert thresholds_around(entropies, 0.95) == pytest.approx([0.75, 0.85, 0.95], abs=0.011)  # there is nothing above
