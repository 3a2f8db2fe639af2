"""Tokenizing: every view of every good image, sizes of shards, bad images, precision."""

import io
import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import dpar_core.data.images
from dpar_core.data.images import views
from dpar_core.data.manifest import read_manifest
from dpar_core.data.shards import TokenShards
from dpar_core.files import load_weights
from dpar_core.models.vq import VQ, to_float
from stages import tokenize_images
from stages.data import ManifestOpener
from tests.helpers.tiny_data import CODES, SIZE, VQ_CONFIG, Project, copy_of, make_project, photo, tiny_params


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    torch.set_num_threads(1)
    return make_project(tmp_path_factory.mktemp("project")).tokenize().entropies().patch_maps()


def test_every_image_has_the_tokens_of_all_its_views(project):
    manifest = read_manifest(project.root / "manifest.parquet")
    weights = load_weights(project.root / "tokenizer.safetensors", kind="vq")
    model = VQ(VQ_CONFIG).eval()
    model.load_state_dict(weights.state)
    opener = ManifestOpener(manifest)
    seen = set()
    for split in ("train", "validation"):
        shards = TokenShards(project.root / "tokens", split)
        assert (shards.meta.tokenizer, shards.meta.manifest) == (weights.digest, manifest.digest)
        assert sorted(shards.keys().to_pylist()) == sorted(row.key for row in manifest.split(split))
        for index in range(len(shards)):
            row = manifest.find(shards.key(index))
            images = torch.from_numpy(views(opener(row), SIZE, "adm_center_flip").copy())
            with torch.inference_mode():
                expected = model.encode(to_float(images)).flatten(1).numpy()
            assert np.array_equal(shards.all_views(index), expected)
            assert shards.labels[index] == row.label
            seen |= set(expected.ravel().tolist())
    assert len(seen) > CODES // 2  # the random tokenizer tells images apart


def test_shards_are_of_the_stated_size_and_mix_the_classes(project):
    shards = TokenShards(project.root / "tokens", "train")
    parts = shards.shards()
    assert [part.stop - part.start for _, part in parts] == [5, 5, 4]
    assert shards.keys().to_pylist() != sorted(shards.keys().to_pylist())


def test_tokens_metrics_state_sizes_against_the_least(project):
    metrics = json.loads((project.root / "tokens.json").read_text())
    assert metrics["tokens/images"] == 19 and metrics["tokens/bad_images"] == 0 and metrics["tokens/shards"] == 4
    assert metrics["tokens/uint16_bytes_per_image"] == 2 * 16 * 2
    assert metrics["tokens/least_bytes_per_image"] == math.ceil(2 * 16 * math.log2(CODES) / 8)
    assert metrics["tokens/bytes_per_image"] > 64


def test_bad_images_are_counted_and_listed_and_the_others_are_all_there(tmp_path):
    project = make_project(tmp_path / "p")
    images = tmp_path / "p" / "images" / "train"
    (images / "a" / "000.png").write_bytes(b"")
    (images / "b" / "001.png").write_bytes(b"<html>gone</html>")
    project.data().tokenize()
    listed = json.loads((tmp_path / "p" / "tokens" / "bad_images.json").read_text())
    assert sorted((bad["source"], bad["reason"].split(" (")[0]) for bad in listed) == [
        ("train:a/000.png", "the file is empty"),
        ("train:b/001.png", "not an image"),
    ]
    assert len(TokenShards(tmp_path / "p" / "tokens", "train")) == 12
    assert json.loads((tmp_path / "p" / "tokens.json").read_text())["tokens/bad_images"] == 2


def test_too_many_bad_images_fail_and_mended_ones_are_read_again(tmp_path):
    project = make_project(tmp_path / "p", data={"max_bad_share": 0.1})
    images = tmp_path / "p" / "images" / "train"
    good = {path: path.read_bytes() for path in (images / "a").iterdir()}
    for path in good:
        path.write_bytes(good[path][:50])
    with pytest.raises(ValueError, match=r"of 14 train images cannot be read, more than data.max_bad_share 0.1 allows"):
        project.data().tokenize()
    for path, content in good.items():
        path.write_bytes(content)
    project.data().tokenize()
    assert json.loads((tmp_path / "p" / "tokens.json").read_text())["tokens/bad_images"] == 0
    clean = make_project(tmp_path / "q").tokenize()
    assert project.bytes("tokens").keys() == clean.bytes("tokens").keys()


def test_bad_images_are_printed_and_a_small_split_may_not_lose_more_than_its_share(tmp_path, capsys):
    project = make_project(tmp_path / "p", data={"max_bad_share": 0.2})
    images = tmp_path / "p" / "images"
    (images / "train" / "a" / "000.png").write_bytes(b"damaged")
    (images / "validation" / "b" / "001.png").write_bytes(b"damaged")
    project.data().tokenize()
    said = [line for line in capsys.readouterr().out.splitlines() if "left out: " in line]
    assert len(said) == 2 and said[1].startswith(
        "warning: left out: 1 validation image (first: validation:b/001.png: not an image"
    )
    shutil.rmtree(project.work)
    (images / "validation" / "a" / "000.png").write_bytes(b"damaged")  # 3 of 19 images, but 2 of 5
    with pytest.raises(ValueError, match=r"^2 of 5 validation images cannot be read, more than data.max_bad_share 0.2"):
        project.data().tokenize()


def test_bad_neighbours_do_not_change_the_tokens_of_an_image(project, tmp_path):
    other = make_project(tmp_path / "p")
    (tmp_path / "p" / "images" / "train" / "a" / "004.png").write_bytes(b"")
    other.data().tokenize()
    mine, sound = (TokenShards(root / "tokens", "train") for root in (other.root, project.root))
    assert len(mine) == len(sound) - 1
    for index in range(len(mine)):
        assert np.array_equal(mine.all_views(index), sound.all_views(sound.find(mine.key(index))))


def test_bf16_states_the_share_of_tokens_it_moves_or_is_refused(project, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_images, "MOST_MOVED", 1.0)
    other = copy_of(project, tmp_path / "other", tokenize_images={"precision": "bf16"}).tokenize()
    stated = json.loads((other.root / "tokens.json").read_text())["tokens/bf16_moved_share"]
    assert [TokenShards(root / "tokens", "train").meta.precision for root in (project.root, other.root)] == ["fp32", "bf16"]
    moved = []  # a batch holds 3 images of 2 views: those at the head of each shard are measured
    for split in ("train", "validation"):
        both = [TokenShards(root / "tokens", split) for root in (project.root, other.root)]
        for _, part in both[0].shards():
            moved += [both[0].all_views(i) != both[1].all_views(i) for i in range(part.start, part.start + 3)]
    assert len(moved) == 12 and stated == np.mean(moved) > 0
    monkeypatch.setattr(tokenize_images, "MOST_MOVED", 0.0)
    with pytest.raises(ValueError, match=r"of the tokens of 24 views from 4 shards, more than 0%: set it to fp32"):
        other.tokenize()


def test_bf16_is_measured_on_evenly_spaced_shards_and_looks_past_bad_images(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_images, "_MEASURED_SHARDS", 2)
    project = make_project(tmp_path / "p", tokenize_images={"batch_size": 4, "precision": "bf16"})
    manifest = read_manifest(project.root / "manifest.parquet")
    plan = tokenize_images.plan_shards(manifest, 5)
    assert [len(shard.indices) for shard in plan] == [5, 5, 4, 5]
    for row in list(manifest.rows.take(plan[2].indices))[:2]:
        (project.root / "images" / row.source.replace(":", "/")).write_bytes(b"")
    project.data()
    batches = []
    real = tokenize_images.ShardTokenizer.encode
    spy = lambda self, images, **given: (batches.append(images), real(self, images, **given))[1]  # noqa: E731
    monkeypatch.setattr(tokenize_images.ShardTokenizer, "encode", spy)
    monkeypatch.setattr(tokenize_images, "MOST_MOVED", -1.0)
    with pytest.raises(ValueError, match=r"of the tokens of 8 views from 2 shards"):
        project.tokenize()
    opener = ManifestOpener(manifest)
    for found, number, first in ((batches[0], 0, 0), (batches[2], 2, 2)):
        rows = list(manifest.rows.take(plan[number].indices))[first : first + 2]
        assert np.array_equal(found, np.concatenate([views(opener(row), SIZE, "adm_center_flip") for row in rows]))
    assert len(batches) == 4 and all(np.array_equal(batches[i], batches[i + 1]) for i in (0, 2))


def test_tf32_is_refused_where_there_is_none(project, tmp_path):
    with pytest.raises(ValueError, match="precision tf32 needs an NVIDIA GPU, and this run is on cpu: set it to fp32"):
        copy_of(project, tmp_path / "other", tokenize_images={"precision": "tf32"}).tokenize()


def test_float32_is_whole_while_encoding_and_as_before_afterwards(project, monkeypatch):
    seen = []
    real = VQ.latents
    state = lambda: (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())  # noqa: E731
    monkeypatch.setattr(VQ, "latents", lambda self, pixels: (seen.append(state()), real(self, pixels))[1])
    inputs = tokenize_images.Inputs(project.root / "manifest.parquet", project.root / "tokenizer.safetensors")
    params = tokenize_images.Params(project.params.data, project.params.tokenize_images)
    make = tokenize_images.ShardTokenizer(inputs, params, project.work, "cpu", project.root, 2)
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        make.encode(np.zeros((6, SIZE, SIZE, 3), np.uint8))
        assert seen == [(False, "highest")] and state() == (True, "high")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_images_too_narrow_for_views_count_as_handled_until_they_are_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(dpar_core.data.images, "MOST_PIXELS", 1000)
    project = make_project(tmp_path / "p")
    narrow = project.root / "images" / "train" / "a" / "000.png"
    sound = narrow.read_bytes()
    Image.fromarray(photo(0, 40, 1)).save(narrow)
    project.data().tokenize()
    (bad,) = json.loads((project.root / "tokens" / "bad_images.json").read_text())
    assert bad["source"] == "train:a/000.png" and "1 x 40 pixels are too narrow for a square of 8" in bad["reason"]
    made = []
    real = tokenize_images.ShardTokenizer.__call__
    spy = lambda self, shard: (made.append(shard.name), real(self, shard))  # noqa: E731
    monkeypatch.setattr(tokenize_images.ShardTokenizer, "__call__", spy)
    project.tokenize()
    assert made == []
    narrow.write_bytes(sound)
    project.data().tokenize()
    assert len(made) == 1 and json.loads((project.root / "tokens" / "bad_images.json").read_text()) == []


def test_images_of_both_splits_are_counted_and_listed_whatever_their_files(tmp_path, capsys):
    project = make_project(tmp_path / "p")
    images = project.root / "images"
    Image.fromarray(photo(0)).save(images / "validation" / "a" / "again.bmp")  # train/a/000.png in another format
    project.data().tokenize()
    (pair,) = json.loads((project.root / "tokens" / "images_in_both_splits.json").read_text())
    manifest = read_manifest(project.root / "manifest.parquet")
    assert [manifest.find(pair[split]).source for split in ("validation", "train")] == [
        "validation:a/again.bmp",
        "train:a/000.png",
    ]
    assert json.loads((project.root / "tokens.json").read_text())["tokens/images_in_both_splits"] == 1
    assert f"1 validation image has the pixels of training images, first view by first view: {pair['validation']}" in (
        capsys.readouterr().out
    )


def test_a_class_whose_images_are_all_bad_is_refused_unless_such_classes_are_kept(tmp_path):
    project = make_project(tmp_path / "p", data={"max_bad_share": 0.6})
    for path in (project.root / "images" / "train" / "b").iterdir():
        path.write_bytes(b"<html>gone</html>")
    with pytest.raises(ValueError, match=r"none of the training images of 1 of 2 classes can be read .b.: .*empty_classes"):
        project.data().tokenize()
    changes = {"max_bad_share": 0.6, "empty_classes": "keep"}
    kept = Project(project.root, tiny_params(project.root / "images", data=changes)).data().tokenize()
    shards = TokenShards(kept.root / "tokens", "train")
    assert shards.meta.classes == ("a", "b") and set(shards.labels.tolist()) == {0}


def test_a_row_without_an_image_struct_is_counted_and_named(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, first in (("train", 0), ("validation", 50)):
        contents = [io.BytesIO() for _ in range(10)]
        for number, stream in enumerate(contents):
            Image.fromarray(photo(first + number)).save(stream, "PNG")
        images = [{"bytes": one.getvalue(), "path": None} if n != 3 else None for n, one in enumerate(contents)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(images, kind), "label": [n % 3 for n in range(10)]})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    changes = {"source": "parquet", "train": str(folder), "validation": str(folder), "max_bad_share": 0.2}
    project = make_project(tmp_path / "p", data=changes).tokenize()
    listed = json.loads((project.root / "tokens" / "bad_images.json").read_text())
    assert listed == [
        {
            "key": f"{split}-{split}-00000-of-00001-0000-000003",
            "source": f"{split}@0.3:{split}-00000-of-00001.parquet",
            "reason": "the row has no image bytes",
        }
        for split in ("train", "validation")
    ]
