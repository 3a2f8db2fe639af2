"""A folder of somebody's images becomes a split: nothing in both, nothing lost, nothing moved by a new name."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpar_core.data.folders import list_folder
from dpar_core.data.listing import join_listings
from stages.tools.own_images import describe, split_images


def put(folder: Path, classes: dict[str, int]) -> Path:
    for place, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng([place, number]).integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.{('png', 'jpg', 'webp')[number % 3]}")
    return folder


def listed(target: Path):
    roots = {split: target / split for split in ("train", "validation")}
    return join_listings({split: list_folder(root, split) for split, root in roots.items()}, roots)


def contents(target: Path, split: str) -> set[bytes]:
    return {path.read_bytes() for path in (target / split).rglob("*") if path.is_file()}


def test_three_classes_of_twenty_files_are_split_by_content(tmp_path):
    images = put(tmp_path / "pictures", {"ant": 20, "bee": 20, "cat": 20})
    found = split_images(images, tmp_path / "own", share=0.1)
    assert found.counts == {"ant": (18, 2), "bee": (18, 2), "cat": (18, 2)} and (found.training, found.validation) == (54, 6)
    manifest = listed(tmp_path / "own")
    assert manifest.classes == ("ant", "bee", "cat") and [len(manifest.split(s)) for s in ("train", "validation")] == [54, 6]
    assert manifest.notes["left_out"] == {}
    held_out = contents(tmp_path / "own", "validation")
    assert not held_out & contents(tmp_path / "own", "train")
    for number, path in enumerate(sorted((images / "ant").iterdir())):
        path.rename(images / "ant" / f"renamed-{99 - number}{path.suffix}")
    assert split_images(images, tmp_path / "own", share=0.1).counts == found.counts
    assert contents(tmp_path / "own", "validation") == held_out and listed(tmp_path / "own").counts("train").sum() == 54


def test_copies_stay_together_in_training_and_bad_files_are_left_out_and_said(tmp_path):
    images = put(tmp_path / "pictures", {"ant": 4, "bee": 4, "lone": 1})
    for number in range(4):
        (images / "bee" / f"copy{number}.png").write_bytes(sorted((images / "bee").iterdir())[number].read_bytes())
    (images / "ant" / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    (images / "ant" / "notes.txt").write_text("mine")
    found = split_images(images, tmp_path / "own", share=0.5)
    assert found.counts == {"ant": (2, 2), "bee": (8, 0), "lone": (1, 0)}
    said = describe(found, images)
    assert said[0] == f"{images}: 3 classes, 11 images for training, 2 for validation"
    assert "4 files are copies of others, byte by byte: such files are all in training" in said
    assert "no validation images of 2 classes (bee, lone): none can be spared" in said
    assert any(line.startswith("cannot be read: ant/broken.jpg: ") for line in said)
    assert "left out: 1 files that are not images (ant/notes.txt)" in said


def test_what_cannot_be_split_is_refused_and_nothing_is_written(tmp_path):
    images = put(tmp_path / "pictures", {"ant": 2, "bee": 2})
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"mine exists and was not made by .dpar-cli init."):
        split_images(images, tmp_path / "mine", share=0.1)
    (images / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no usable images of 1 classes .empty: no image files in it."):
        split_images(images, tmp_path / "own", share=0.1)
    (images / "empty" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no usable images of 1 classes .empty: none of its files can be read."):
        split_images(images, tmp_path / "own", share=0.1)
    put(tmp_path / "both", {"train": 0, "val": 0})
    os.renames(images / "ant", tmp_path / "both" / "train" / "ant")
    os.renames(images / "bee", tmp_path / "both" / "val" / "bee")
    with pytest.raises(ValueError, match="already holds folders named as splits"):
        split_images(tmp_path / "both", tmp_path / "own", share=0.1)
    with pytest.raises(ValueError, match="one image per class, none of which can be spared"):
        split_images(put(tmp_path / "lone", {"a": 1, "b": 1}), tmp_path / "own", share=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "lone", "mine", "pictures"]
