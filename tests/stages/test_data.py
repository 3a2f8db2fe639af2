"""The data stage: built-in photographs, and what users point it at."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ruamel.yaml import YAML

from dpar_core.data.manifest import read_manifest
from dpar_core.data.synsets import IMAGENET_SYNSETS
from stages import data, synset_lists
from stages.params import parse_params
from stages.tracker import NullTracker
from tests.helpers.paths import ROOT


def params(**changes: object) -> data.Params:
    raw = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    raw["data"] |= changes
    raw["data"]["builtin"] |= {"train_crops": 90, "validation_crops": 18}
    whole = parse_params(raw)
    return data.Params(whole.seed, whole.data)


def run(folder: Path, **changes: object) -> data.Outputs:
    outputs = data.Outputs(folder / "manifest.parquet", folder / "metrics.json")
    data.run(params(**changes), data.Inputs(folder / "images.json"), outputs, NullTracker(), device="cpu", work=folder)
    return outputs


def put_image(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour % 256, 0, 0)).save(path, "PNG")


def test_no_pixel_of_a_photograph_is_in_both_splits(tmp_path):
    manifest = read_manifest(run(tmp_path).manifest)
    assert set(manifest.classes) == set(data.PHOTOGRAPHS)
    for name in manifest.classes:
        seen = {}
        for split in ("train", "validation"):
            seen[split] = np.zeros(data.photograph(name).shape[:2], bool)
            for row in manifest.split(split):
                if row.class_name == name:
                    x0, y0, x1, y1 = row.box
                    assert 0 <= x0 < x1 <= seen[split].shape[1] and 0 <= y0 < y1 <= seen[split].shape[0]
                    seen[split][y0:y1, x0:x1] = True
        assert not (seen["train"] & seen["validation"]).any()


def test_fewer_crops_than_photographs_are_refused():
    with pytest.raises(ValueError, match="train_crops 8 leaves some of 9 classes without images"):
        data.builtin_manifest(params().data.builtin.model_copy(update={"train_crops": 8}), seed=0)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_crops(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    assert first.manifest.read_bytes() == second.manifest.read_bytes()
    assert first.metrics.read_bytes() == second.metrics.read_bytes()
    settings = params().data.builtin
    crops = [[row.box for row in data.builtin_manifest(settings, seed=seed).rows] for seed in (0, 0, 1)]
    assert crops[0] == crops[1] != crops[2]


def test_images_are_counted_by_split_and_class(tmp_path):
    assert json.loads(run(tmp_path).metrics.read_text()) == {
        "data/classes": 9,
        "data/files_left_out": 0,
        "data/images_in_both_splits": 0,
        "data/train_images": 90,
        "data/train_smallest_class": 10,
        "data/train_median_class": 10.0,
        "data/train_largest_class": 10,
        "data/validation_images": 18,
        "data/validation_smallest_class": 2,
        "data/validation_median_class": 2.0,
        "data/validation_largest_class": 2,
    }


def test_a_strip_too_narrow_for_a_crop_says_what_to_change():
    settings = params().data.builtin.model_copy(update={"crop_min": 300, "crop_max": 300})
    with pytest.raises(ValueError, match="lower crop_min, or move validation_share"):
        data.builtin_manifest(settings, seed=0)


def test_a_folder_tree_is_listed_and_opened(tmp_path):
    for split in ("train", "validation"):
        for name in "ab":
            put_image(tmp_path / split / name / "1.png", ord(name))
    outputs = run(tmp_path, source="imagefolder", train=str(tmp_path / "train"), validation=str(tmp_path / "validation"))
    manifest = read_manifest(outputs.manifest)
    opener = data.ManifestOpener(manifest)
    assert [(row.split, row.label, int(opener(row)[0, 0, 0])) for row in manifest.rows] == [
        ("train", 0, 97),
        ("train", 1, 98),
        ("validation", 0, 97),
        ("validation", 1, 98),
    ]


def test_other_folders_than_imagenets_are_refused_where_imagenet_is_asked_for(tmp_path):
    names = [*IMAGENET_SYNSETS[:-1], "n99999999"]
    for name in names:
        put_image(tmp_path / "train" / name / "1.png")
    put_image(tmp_path / "validation" / names[0] / "1.png")
    tree = {"source": "imagefolder", "train": str(tmp_path / "train"), "validation": str(tmp_path / "validation")}
    with pytest.raises(ValueError, match=f"1 are missing .{IMAGENET_SYNSETS[-1]}.*n99999999"):
        run(tmp_path, classes="imagenet", **tree)
    (tmp_path / "train" / "n99999999").rename(tmp_path / "train" / IMAGENET_SYNSETS[-1])
    assert read_manifest(run(tmp_path, classes="imagenet", **tree).manifest).notes["class_order"] == "synsets"


def make_ilsvrc(folder: Path) -> dict[str, str]:
    """Two classes; the number of a class in the development kit (9, 4) is not its place in the sorted order."""
    put_image(folder / "x.JPEG")
    with tarfile.open(folder / "train.tar", "w") as outer:
        for name in ("n00000001", "n00000002"):
            with tarfile.open(folder / f"{name}.tar", "w") as inner:
                inner.add(folder / "x.JPEG", f"{name}_1.JPEG")
            outer.add(folder / f"{name}.tar", f"{name}.tar")
    with tarfile.open(folder / "val.tar", "w") as tar:
        for number in (2, 1, 3):
            tar.add(folder / "x.JPEG", f"ILSVRC2012_val_{number:08d}.JPEG")
    return {"source": "ilsvrc", "train": str(folder / "train.tar"), "validation": str(folder / "val.tar")}


def beside_solution(folder: Path) -> None:
    lines = [f"ILSVRC2012_val_{n:08d},n0000000{c} 1 2 3 4 n00000002 5 6 7 8" for n, c in ((3, 2), (1, 2), (2, 1))]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")


def beside_synsets(folder: Path) -> None:
    (folder / "ILSVRC2012_validation_synsets.txt").write_text("n00000002\nn00000001\nn00000002\n")


def beside_kit(folder: Path) -> None:
    from scipy.io import savemat

    kit = folder / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    kind = [("ILSVRC2012_ID", object), ("WNID", object)]
    savemat(kit / "meta.mat", {"synsets": np.array([(9, "n00000001"), (4, "n00000002")], dtype=kind)})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("4\n9\n4\n")


@pytest.mark.parametrize("beside", [beside_solution, beside_synsets, beside_kit])
def test_ilsvrc_tars_are_read_in_place_with_any_list_of_validation_classes(tmp_path, beside):
    tars = make_ilsvrc(tmp_path)
    beside(tmp_path)
    manifest = read_manifest(run(tmp_path / "out", **tars).manifest)
    assert [row.class_name for row in manifest.split("validation")] == ["n00000002", "n00000001", "n00000002"]
    assert [row.key for row in manifest.split("train")] == ["train-n00000001_1", "train-n00000002_1"]
    assert all(data.ManifestOpener(manifest)(row).shape == (8, 8, 3) for row in manifest.rows)


def test_a_validation_tar_without_classes_beside_it_says_what_to_put_there(tmp_path):
    tars = make_ilsvrc(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"put LOC_val_solution.csv"):
        run(tmp_path / "out", **tars)
    (tmp_path / "ILSVRC2012_validation_synsets.txt").write_text("n00000002\n")
    with pytest.raises(ValueError, match="has 1 classes for 3 images"):
        run(tmp_path / "out", **tars)


@pytest.mark.parametrize(
    "content", ["1\n2\n1\n", "val_1.JPEG n00000001\n", "version https://git-lfs.github.com", "n0000001"]
)
def test_a_list_of_synsets_that_is_none_is_named(tmp_path, content):
    tars = make_ilsvrc(tmp_path)
    file = tmp_path / "ILSVRC2012_validation_synsets.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"{file} holds '{content.split()[0]}', expected a synset per line"):
        run(tmp_path / "out", **tars)
    file.write_bytes(content.encode("utf-16"))
    with pytest.raises(ValueError, match=rf"{file} is not text in UTF-8"):
        run(tmp_path / "out", **tars)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has columns nothing, expected ImageId and PredictionString"),
        ("Id,Class\n1,n00000001\n", "has columns Id, Class, expected ImageId and PredictionString"),
        ("<html>not found</html>\n<p>\n", "has columns <html>not found</html>, expected ImageId"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001\nb,\n", "names no class for ILSVRC2012_val_00000001"),
    ],
)
def test_another_file_than_kaggles_is_refused_in_one_sentence(tmp_path, content, words):
    tars = make_ilsvrc(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        run(tmp_path / "out", **tars)
    assert "\n" not in str(caught.value)


def test_a_list_of_an_image_twice_is_refused_and_one_of_a_windows_editor_read(tmp_path):
    tars = make_ilsvrc(tmp_path)
    beside_solution(tmp_path)
    file = tmp_path / "LOC_val_solution.csv"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert run(tmp_path / "out", **tars).manifest.exists()
    file.write_text(f"{file.read_text(encoding='utf-8-sig')}ILSVRC2012_val_00000001,n00000001 1 2 3 4\n")
    with pytest.raises(ValueError, match="lists 1 image more than once"):
        run(tmp_path / "out", **tars)


@pytest.mark.parametrize("names", [[str(number) for number in range(1, 12)], ["a", "b", "c"], ["val_1", "val_01", "val_2"]])
def test_a_list_in_the_order_of_images_is_refused_beside_names_that_sort_otherwise(tmp_path, names):
    tars = make_ilsvrc(tmp_path)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name in names:
            tar.add(tmp_path / "x.JPEG", f"{name}.JPEG")
    (tmp_path / "ILSVRC2012_validation_synsets.txt").write_text("n00000002\n" * len(names))
    with pytest.raises(ValueError, match="whose sorted names do not count up"):
        run(tmp_path / "out", **tars)


def put_kaggle(root: Path) -> tuple[Path, Path, Path]:
    """Kaggle's ImageNet: validation images in one folder, their classes four folders above. Pixels hold the label."""
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    lines = ["ImageId,PredictionString"]
    for number, label in ((3, 2), (1, 0), (4, 2), (2, 1)):
        put_image(images / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", 60 * label)
        lines.append(f"ILSVRC2012_val_{number:08d},n0000000{label} 1 2 3 4 n00000001 5 6 7 8 ")
    for label in range(3):
        put_image(images / "train" / f"n0000000{label}" / f"n0000000{label}_7.JPEG", 60 * label + 1)
    put_image(images / "test" / "ILSVRC2012_test_00000001.JPEG")
    (root / "LOC_val_solution.csv").write_text("\r\n".join([*lines, ""]))
    return images, images / "val", root / "LOC_val_solution.csv"


def put_tiny_imagenet(root: Path) -> tuple[Path, Path, Path]:
    """Tiny ImageNet: images in folders `images`, names that do not sort by number, classes beside the folder."""
    lines = []
    for number, label in ((0, 2), (1, 0), (10, 1), (2, 2)):
        put_image(root / "val" / "images" / f"val_{number}.JPEG", 60 * label)
        lines.append(f"val_{number}.JPEG\tn0000000{label}\t0\t32\t44\t62\n")
    for label in range(3):
        put_image(root / "train" / f"n0000000{label}" / "images" / f"n0000000{label}_0.JPEG", 60 * label + 1)
        (root / "train" / f"n0000000{label}" / f"n0000000{label}_boxes.txt").write_text("box")
    put_image(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("n00000002\nn00000000\nn00000001\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root, root / "val", root / "val" / "val_annotations.txt"


@pytest.mark.parametrize("whole", [True, False], ids=["one folder for both", "a folder each"])
@pytest.mark.parametrize("source", ["imagefolder", "ilsvrc"])
@pytest.mark.parametrize("put", [put_kaggle, put_tiny_imagenet])
def test_a_flat_validation_folder_has_the_classes_of_its_list(tmp_path, capsys, put, source, whole):
    top, flat, listed = put(tmp_path / "d")
    roots = {"train": top, "validation": top} if whole else {"train": top / "train", "validation": flat}
    manifest = read_manifest(run(tmp_path, source=source, **{split: str(root) for split, root in roots.items()}).manifest)
    opener = data.ManifestOpener(manifest)
    assert manifest.classes == ("n00000000", "n00000001", "n00000002")
    assert [60 * row.label + (row.split == "train") for row in manifest.rows] == [
        int(opener(row)[0, 0, 0]) for row in manifest.rows
    ]
    assert manifest.counts("train").tolist() == [1, 1, 1] and manifest.counts("validation").tolist() == [1, 1, 2]
    shown = "../../../../LOC_val_solution.csv" if put is put_kaggle else "../val_annotations.txt"
    assert f"validation: the class of each image is that in {shown}, seen from the images\n" in capsys.readouterr().out
    assert f"validation:{listed.name}" not in manifest.notes["left_out"]


def test_images_named_in_a_list_of_their_order_may_lie_in_a_folder(tmp_path):
    top, flat, listed = put_kaggle(tmp_path / "d")
    listed.unlink()
    tree = {"source": "imagefolder", "train": str(top / "train"), "validation": str(flat)}
    with pytest.raises(ValueError, match=r"4 files lie in it.* or beside them LOC_val_solution.csv"):
        run(tmp_path, **tree)
    (flat / "n00000000").mkdir()  # somebody was about to sort them
    (top / "ILSVRC2012_validation_synsets.txt").write_text("n00000000 n00000001 n00000002 n00000002")
    labels = [row.label for row in read_manifest(run(tmp_path, **tree).manifest).split("validation")]
    assert labels == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("val_10.JPEG\t", "val_11.JPEG\t", r"val_10.JPEG has no class in .*val_annotations.txt \(1 of 4 images\)"),
        ("val_0.", "val_7.JPEG\tn00000001\nval_0.", r"lacks 1 image of .*val_annotations.txt \(val_7\)"),
        ("n00000001", "n00000009", r"classes that data.train .* lacks: n00000009"),
        ("val_0.", "val_10.JPEG\tn00000001\nval_0.", r"val_annotations.txt lists 1 image more than once \(val_10\)"),
        ("val_0.JPEG\t", "val_0.JPEG ", "holds 'val_0.JPEG n00000002.*expected a file and its synset with a tab"),
    ],
    ids=["a file without a row", "a row without a file", "an unknown synset", "a name twice", "spaces"],
)
def test_a_list_that_is_not_of_the_images_is_refused(tmp_path, old, new, words):
    top, _, listed = put_tiny_imagenet(tmp_path / "d")
    listed.write_text(listed.read_text().replace(old, new))
    with pytest.raises(ValueError, match=words):
        run(tmp_path, source="imagefolder", train=str(top), validation=str(top))


def test_tiny_imagenet_without_its_list_says_what_to_put_there(tmp_path):
    top, _, listed = put_tiny_imagenet(tmp_path / "d")
    listed.unlink()
    with pytest.raises(ValueError, match=r"lacks: images \(1 in all\).* need a list of their classes: LOC_val_solution.csv"):
        run(tmp_path, source="imagefolder", train=str(top), validation=str(top))


def test_two_images_of_one_name_are_refused_beside_a_list(tmp_path):
    top, flat, _ = put_tiny_imagenet(tmp_path / "d")
    put_image(flat / "images" / "val_2.png")
    with pytest.raises(ValueError, match=r"holds val_2 twice, and .*val_annotations.txt names it once"):
        run(tmp_path, source="imagefolder", train=str(top), validation=str(flat / "images"))


def put_parquet(folder: Path, names: list[str] | None) -> dict[str, str]:
    """1,000 classes, an image each; names as the Hugging Face hub ships them."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    folder.mkdir()
    for split in ("train", "validation"):
        image = pa.array([{"bytes": stream.getvalue()}] * 1000, pa.struct([("bytes", pa.binary())]))
        table = pa.table({"image": image, "label": pa.array(range(1000), pa.int64())})
        if names:
            info = {"info": {"features": {"label": {"names": names}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return {"source": "parquet", "train": str(folder), "validation": str(folder), "classes": "imagenet"}


@pytest.mark.parametrize("names", [None, [f"thing {number}" for number in range(1000)]], ids=["numbers", "names"])
def test_an_order_of_classes_that_cannot_be_checked_is_warned_of(tmp_path, capsys, names):
    tree = put_parquet(tmp_path / "p", names)
    notes = read_manifest(run(tmp_path, **tree).manifest).notes
    said = capsys.readouterr().err
    assert f"warning: data.train {tmp_path / 'p'}: checked was the number of classes only" in said
    assert "put classes.txt" in said and notes["class_order"] in said
    (tmp_path / "p" / "classes.txt").write_text("\n".join(IMAGENET_SYNSETS))
    assert read_manifest(run(tmp_path, **tree).manifest).notes["class_order"] == "synsets"
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "p" / "classes.txt").write_text("\n".join(IMAGENET_SYNSETS[::-1]))
    with pytest.raises(ValueError, match="class 0 is n15075141 where the standard order has n01440764"):
        run(tmp_path, **tree)


def test_files_left_out_are_counted_and_said_where_they_are_listed(tmp_path, capsys):
    for split in ("train", "validation"):
        put_image(tmp_path / split / "a" / "1.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("mine")
    outputs = run(tmp_path, source="imagefolder", train=str(tmp_path / "train"), validation=str(tmp_path / "validation"))
    said = capsys.readouterr()
    assert "left out: 1 (no image by its name and its first bytes): train:a/notes.txt\n" in said.out
    assert f"all that was left out is in the notes of {outputs.manifest}" in said.err
    assert json.loads(outputs.metrics.read_text())["data/files_left_out"] == 1
    assert list(read_manifest(outputs.manifest).notes["left_out"]) == ["train:a/notes.txt"]


@pytest.mark.parametrize(
    ("content", "reader", "words"),
    [
        (b"MATLAB 5.0 MAT-file" + b"\xff" * 400, None, "not the meta.mat of the development kit, or damaged"),
        (b"x", "import os; os.abort()", "the reader died of signal 6"),
        (b"x", "while True: pass", "could not be read in 1 s"),
        (b"x", "print('x' * 10, end='')", "not the meta.mat of the development kit, or damaged"),
    ],
    ids=["damaged", "dies", "hangs", "says something else"],
)
def test_a_damaged_meta_mat_is_a_sentence_whatever_its_reader_does(tmp_path, monkeypatch, content, reader, words):
    tars = make_ilsvrc(tmp_path)
    beside_kit(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(content)
    if reader:
        monkeypatch.setattr(synset_lists, "_READ_KIT", reader)
        monkeypatch.setattr(synset_lists, "_KIT_SECONDS", 1 if "while" in reader else 600)
    with pytest.raises(ValueError, match=words) as caught:
        run(tmp_path / "out", **tars)
    assert "meta.mat" in str(caught.value) and "\n" not in str(caught.value)


def test_what_was_found_is_printed(tmp_path, capsys):
    for number, name in enumerate(["train/ant/1", "train/ant/2", "train/bee/1", "train/cat/1", "val/ant/1", "val/cat/1"]):
        put_image(tmp_path / f"{name}.png", 40 * number)
    (tmp_path / "val" / "cat" / "again.png").write_bytes((tmp_path / "train" / "bee" / "1.png").read_bytes())
    (tmp_path / "train" / "ant" / "._1.png").write_bytes(b"of macOS")
    outputs = run(tmp_path, source="imagefolder", train=str(tmp_path), validation=str(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        "data: imagefolder, 3 classes: 0 ant, 1 bee, 2 cat",
        "train: 4 images; per class: smallest 1 (1 bee), median 1, largest 2 (0 ant)",
        "validation: 3 images; per class: smallest 0 (1 bee), median 1, largest 2 (2 cat)",
        "validation: 1 class has no images (bee)",
        f"train: the class folders are those in {tmp_path / 'train'}",
        f"validation: the class folders are those in {tmp_path / 'val'}",
        "left out: 1 (hidden, or left there by a system): train:train/ant/._1.png",
        "warning: 1 validation image is in the training set as well, byte by byte: "
        "validation:val/cat/again.png = train:train/bee/1.png",
    ]
    assert json.loads(outputs.metrics.read_text())["data/images_in_both_splits"] == 1


def test_images_that_cannot_be_read_and_images_of_several_classes_are_printed(tmp_path, capsys):
    for number, name in enumerate(["train/ant/1", "train/ant/2", "train/bee/1", "val/ant/1"]):
        put_image(tmp_path / f"{name}.png", 40 * number)
    (tmp_path / "train" / "copy").symlink_to(tmp_path / "train" / "ant")
    (tmp_path / "train" / "bee" / "2.png").symlink_to("nowhere")
    run(tmp_path, source="imagefolder", train=str(tmp_path / "train"), validation=str(tmp_path / "val"))
    said = capsys.readouterr().out.splitlines()
    assert "warning: train: 1 image cannot be read (train:bee/2.png)" in said
    several = "train:copy/1.png = train:ant/1.png, train:copy/2.png = train:ant/2.png"
    assert f"warning: 2 training images of several classes, byte by byte: {several}" in said


def test_repeated_images_and_one_class_alone_are_printed(tmp_path, capsys):
    for number, name in enumerate(["train/ant/1", "train/ant/2", "val/ant/1"]):
        put_image(tmp_path / f"{name}.png", 40 * number)
    (tmp_path / "val" / "ant" / "copy.png").write_bytes((tmp_path / "val" / "ant" / "1.png").read_bytes())
    run(tmp_path, source="imagefolder", train=str(tmp_path / "train"), validation=str(tmp_path / "val"))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")] == [
        "warning: all images are of one class (0 ant), so a class says nothing of an image",
        "warning: validation: 1 image repeats others of it, byte by byte: validation:ant/copy.png = validation:ant/1.png",
    ]


def test_a_split_of_which_no_image_can_be_read_is_refused_with_the_reason(tmp_path):
    images = pa.array(
        [{"bytes": None, "path": f"{n}.png"} for n in range(2)], pa.struct({"bytes": pa.binary(), "path": "str"})
    )
    for split in ("train", "val"):
        pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / f"{split}.parquet")
    tree = {"source": "parquet", "train": str(tmp_path), "validation": str(tmp_path)}
    with pytest.raises(ValueError, match=r"none of its 2 images can be read \(train@0.0.*: .* only the path '0.png'\)"):
        run(tmp_path, **tree)
    assert not (tmp_path / "manifest.parquet").exists()


def test_images_in_both_splits_are_found_in_parquet_too(tmp_path, capsys):
    tree = put_parquet(tmp_path / "p", None)
    assert json.loads(run(tmp_path, **tree).metrics.read_text())["data/images_in_both_splits"] == 1000
    assert "warning: 1,000 validation images are in the training set as well" in capsys.readouterr().out


def test_empty_classes_are_refused_or_kept_as_the_params_say(tmp_path):
    for name in ("train/a", "train/c", "val/a", "val/c"):
        put_image(tmp_path / name / "1.png", ord(name[-1]))
    (tmp_path / "train" / "b").mkdir()
    tree = {"source": "imagefolder", "train": str(tmp_path / "train"), "validation": str(tmp_path / "val")}
    with pytest.raises(ValueError, match=r"no images of 1 of its 3 classes: b .no image files in it."):
        run(tmp_path, **tree)
    manifest = read_manifest(run(tmp_path, **tree, empty_classes="keep").manifest)
    assert manifest.classes == ("a", "b", "c") and [row.label for row in manifest.rows] == [0, 2, 0, 2]
