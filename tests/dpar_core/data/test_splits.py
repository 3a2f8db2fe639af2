"""Which split a file belongs to: known from any naming in common use, refused where the name gives none."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpar_core.data.folders import list_folder
from dpar_core.data.image_parquet import list_parquet
from dpar_core.data.image_tars import list_webdataset
from dpar_core.data.listing import join_listings
from dpar_core.data.splits import choose_files, split_of
from tests.dpar_core.data.test_sources import png, put, tar_of, write_parquet

LISTERS = {".parquet": list_parquet, ".tar": list_webdataset}


def put_shard(path: Path, numbers: list[int], labels: list[int]) -> None:
    """Write a Parquet file or a webdataset shard, by the ending of its name."""
    if path.suffix == ".parquet":
        write_parquet(path, numbers, labels)
    else:
        pairs = {f"{path.stem}-{n}": (png(n), str(label).encode()) for n, label in zip(numbers, labels)}
        files = {f"{key}.{ending}": one[place] for key, one in pairs.items() for place, ending in enumerate(("png", "cls"))}
        put(path.parent, {path.name: tar_of(files)})


def joined(train: Path, validation: Path, ending: str):
    roots = {"train": train, "validation": validation}
    return join_listings({split: LISTERS[ending](root, split) for split, root in roots.items()}, roots)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("imagenet-train-000012.tar", "train"),
        ("ilsvrc_val_0001.tar", "validation"),
        ("valid_0.tar", "validation"),
        ("validation-00000-of-00014.parquet", "validation"),
        ("test-0.tar", "test"),
        ("dev.parquet", "validation"),
        ("imagenet1k-validation-0000.tar", "validation"),
        ("Training01.tar", "train"),
        ("myEval.parquet", "validation"),
        ("ILSVRC2012_img_val.tar", "validation"),
        ("train2017.tar", "train"),
        ("data/val/0.parquet", "validation"),
        ("test-data/train/0.tar", "train"),
        ("a/b/TRAIN/x.tar", "train"),
        ("part-0001.parquet", None),
        ("trainer-0.tar", None),
        ("value-0.tar", None),
        ("latest-0.tar", None),
        ("train-val-0.tar", None),
        ("train/val-0.tar", None),
        ("train/trainset_0.tar", "train"),
    ],
)
def test_a_split_follows_from_a_word_of_the_name_or_of_the_nearest_folder(path, split):
    assert split_of(path) == split


@pytest.mark.parametrize("ending", LISTERS)
@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("imagenet-train-0", "imagenet-val-0"),
        ("ilsvrc_train_0001", "ilsvrc_val_0001"),
        ("train-0-of-2", "test-0-of-2"),
        ("training_0", "evaluation_0"),
        ("train_0", "valid_0"),
        ("data/train/x", "data/val/x"),
        ("train", "dev"),
        ("Train-000", "HOLDOUT-000"),
        ("train/0", "validation/0"),
    ],
)
def test_one_folder_for_both_splits_is_told_apart_by_names(tmp_path, ending, train, validation):
    put_shard(tmp_path / f"{train}{ending}", [0, 1, 2], [0, 1, 1])
    put_shard(tmp_path / f"{validation}{ending}", [3, 4], [1, 0])
    manifest = joined(tmp_path, tmp_path, ending)
    assert [
        (len(manifest.split(s)), set(row.source.split(":")[1] for row in manifest.split(s))) for s in ("train", "validation")
    ] == [(3, {f"{train}{ending}"}), (2, {f"{validation}{ending}"})]
    assert manifest.notes["left_out"] == {}


@pytest.mark.parametrize("ending", LISTERS)
@pytest.mark.parametrize(
    "names", [("part-0", "part-1"), ("train-0", "extra"), ("train-0", "train-1"), ("a/0", "b/0"), ("train-val-0", "train-0")]
)
def test_one_folder_in_which_names_do_not_tell_the_splits_is_refused(tmp_path, ending, names):
    for number, name in enumerate(names):
        put_shard(tmp_path / f"{name}{ending}", [number], [0])
    with pytest.raises(ValueError, match=r"share \d of their files .*give each split its own folder, or files whose names"):
        joined(tmp_path, tmp_path, ending)


@pytest.mark.parametrize("way", ["link to the folder", "dots", "links to files", "hard links", "inside"])
@pytest.mark.parametrize("ending", LISTERS)
def test_the_same_files_by_links_or_other_spellings_are_refused(tmp_path, ending, way):
    train = tmp_path / "a" / "b"
    put_shard(train / f"0{ending}", [0, 1], [0, 0])
    other = tmp_path / "other"
    if way == "link to the folder":
        other.symlink_to(train)
    elif way == "dots":
        other = tmp_path / "a" / ".." / "a" / "b"
    elif way == "inside":
        train, other = tmp_path / "a", train
    else:
        other.mkdir()
        (os.link if way == "hard links" else os.symlink)(train / f"0{ending}", other / f"9{ending}")
    with pytest.raises(ValueError, match="share 1 of their files"):
        joined(train, other, ending)


def test_files_of_other_splits_are_left_out_and_the_choice_is_said(tmp_path):
    names = ["train-0.tar", "val-0.tar", "test-0.tar"]
    chosen = choose_files(names, "validation", where="here")
    assert chosen.files == ["val-0.tar"] and chosen.left_out == {
        "train-0.tar": "of split train by its name",
        "test-0.tar": "of split test by its name",
    }
    only_test = choose_files(names[::2], "validation", where="here")
    assert only_test.files == ["test-0.tar"] and only_test.notes == [
        "files whose names say test are taken, as none says validation"
    ]
    with pytest.raises(ValueError, match=r"here holds files that say test and validation by name and none that says train"):
        choose_files(names[1:], "train", where="here")
    own = choose_files(["train-7.tar"], "validation", where="a folder of held-out shards")
    assert own.files == ["train-7.tar"] and own.notes == ["files whose names say train are taken, as none says validation"]


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("Split", ["train", "valid", "train"], r"rows of several splits by the column 'Split' \(train, validation, in all"),
        ("set", ["train", "test", None], "rows of several splits by the column 'set'"),
        ("split", ["train"] * 3, []),
        ("split", ["val"] * 3, ["the column 'split' says validation, and its rows are taken"]),
        ("subset", ["train", "extra", None], ["the column 'subset' holds None, extra, train, and all rows are taken"]),
        ("is_train", [True, False, True], ["the column 'is_train' holds False, True, and all rows are taken"]),
        ("is_training_image", [1, 1, 0], ["the column 'is_training_image' holds 0, 1, and all rows are taken"]),
        ("is_train", [True] * 3, []),
        ("train_id", list(range(6)), []),
        ("subset", ["cats", "dogs", "cats"], []),
    ],
)
def test_columns_that_say_the_split_of_a_row_are_heeded(tmp_path, column, values, expected):
    write_parquet(tmp_path / "all.parquet", list(range(len(values))), [0, 1, 0] * (len(values) // 3))
    table = pq.read_table(tmp_path / "all.parquet")
    pq.write_table(table.append_column(column, pa.array(values)), tmp_path / "all.parquet")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            list_parquet(tmp_path / "all.parquet", "train")
    else:
        assert list_parquet(tmp_path / "all.parquet", "train").notes == expected


def test_files_of_one_folder_whose_columns_say_different_splits_are_refused(tmp_path):
    for number, split in enumerate(("train", "test")):
        write_parquet(tmp_path / f"{number}.parquet", [2 * number, 2 * number + 1], [0, 1])
        table = pq.read_table(tmp_path / f"{number}.parquet")
        pq.write_table(table.append_column("split", pa.array([split] * 2)), tmp_path / f"{number}.parquet")
    with pytest.raises(ValueError, match=r"several splits by the column 'split' \(test, train, in 0.parquet, 1.parquet\)"):
        list_parquet(tmp_path, "train")


@pytest.mark.parametrize("ending", LISTERS)
def test_files_with_other_endings_are_left_out_once_and_a_single_file_of_another_split_is_named(tmp_path, ending):
    put_shard(tmp_path / f"train-0{ending}", [0, 1], [0, 1])
    put_shard(tmp_path / f"val-0{ending}", [2], [1])
    put(tmp_path, {f"train-1{ending}.gz": b"", "train-2.arrow": b"", "readme.md": b"", "classes.txt": b"a\nb\n"})
    left_out = joined(tmp_path, tmp_path, ending).notes["left_out"]
    assert left_out == {f"train:{name}": f"not *{ending}" for name in (f"train-1{ending}.gz", "readme.md", "train-2.arrow")}
    notes = joined(tmp_path / f"train-0{ending}", tmp_path / f"val-0{ending}", ending).notes["choices"]
    assert not [note for note in notes if "say" in note]
    notes = LISTERS[ending](tmp_path / f"val-0{ending}", "train").notes
    assert "files whose names say validation are taken, as none says train" in notes


def put_tree(root: Path, *folders: str, first: int = 0) -> None:
    put(root, {f"{folder}/{i}.png": png(10 * n + i + first) for n, folder in enumerate(folders) for i in range(2)})


def folders_joined(train: Path, validation: Path, **options):
    roots = {"train": train, "validation": validation}
    return join_listings({split: list_folder(root, split) for split, root in roots.items()}, roots, **options)


@pytest.mark.parametrize("validation", ["val", "validation", "test", "Dev"])
def test_a_tree_that_holds_the_trees_of_both_splits_is_told_apart_by_their_names(tmp_path, validation):
    put_tree(tmp_path, "train/cat", "train/dog", f"{validation}/cat", f"{validation}/dog")
    manifest = folders_joined(tmp_path, tmp_path)
    assert manifest.classes == ("cat", "dog") and [len(manifest.split(s)) for s in ("train", "validation")] == [4, 4]
    assert {row.source.split("/")[0] for row in manifest.split("validation")} == {f"validation:{validation}"}
    assert f"train: the class folders are those in {tmp_path / 'train'}" in manifest.notes["choices"]


def test_a_doubled_level_is_recognised_and_named(tmp_path):
    put_tree(tmp_path, "train/train/cat", "train/train/dog")
    listing = list_folder(tmp_path / "train", "train")
    assert listing.classes == ["cat", "dog"] and listing.notes == [f"the class folders are those in {tmp_path}/train/train"]
    put_tree(tmp_path, "three/train/train/train/cat", "three/train/train/train/dog", "three/train/train/val/cat")
    listing = list_folder(tmp_path / "three", "train")
    assert listing.classes == ["cat", "dog"] and listing.base == tmp_path / "three/train/train/train"
    assert listing.left_out == {"train/train/val": "of another split by its name"}
    put_tree(tmp_path, "x/images/cat", "x/images/dog")
    with pytest.raises(ValueError, match=rf"holds one folder, images, .* set data.train to {tmp_path}/x/images"):
        list_folder(tmp_path / "x", "train")
    put_tree(tmp_path, "y/imagenet/train/cat", "y/imagenet/train/dog")
    with pytest.raises(ValueError, match=rf"holds one folder, imagenet, .* set data.train to {tmp_path}/y/imagenet/train;"):
        list_folder(tmp_path / "y", "train")
    put_tree(tmp_path, "parts/one/cat", "parts/one/dog", "parts/two/images")
    counted = "images of 1 class lie in several folders each, which count as one class (one/cat, one/dog)"
    assert list_folder(tmp_path / "parts", "train").notes == [counted]
    put_tree(tmp_path, "numbers/2", "numbers/9", "numbers/10")
    assert list_folder(tmp_path / "numbers", "train").notes[0].endswith("as ImageFolder has them: class 0 is '10'")
    put_tree(tmp_path, "one/cat", "vehicles/train", "vehicles/tram")
    assert list_folder(tmp_path / "one", "train").classes == ["cat"]
    assert list_folder(tmp_path / "vehicles", "train").classes == ["train", "tram"]
    put_tree(tmp_path, "flat/train", "flat/test")
    with pytest.raises(ValueError, match=r"folders named as splits \(test, train\) and no class folders in them"):
        list_folder(tmp_path / "flat", "train")
    put_tree(tmp_path, "deep/val/cat", "deep/test/cat")
    with pytest.raises(ValueError, match=r"holds the folders test, val and no classes"):
        list_folder(tmp_path / "deep", "train")


def test_folders_given_the_other_way_round_are_named(tmp_path):
    put_tree(tmp_path, "train/cat", "val/cat", "test/cat")
    put(tmp_path, {"val/cat/9.png": png(9), "test/cat/8.png": png(8)})
    swapped = folders_joined(tmp_path / "val", tmp_path / "train").notes["choices"]
    assert swapped == [f"train: by their names {tmp_path}/val and {tmp_path}/train are the other way round"]
    assert folders_joined(tmp_path / "train", tmp_path / "test").notes["choices"] == []


def test_one_tree_for_both_splits_or_one_inside_the_other_is_refused(tmp_path):
    put_tree(tmp_path, "all/cat", "all/dog", "nested/cat", "nested/val/cat")
    (tmp_path / "link").symlink_to(tmp_path / "all")
    for other in (tmp_path / "all", tmp_path / "link", tmp_path / "all" / ".." / "all"):
        with pytest.raises(ValueError, match="are one folder: give each split a folder of its own"):
            folders_joined(tmp_path / "all", other)
    for train, validation in (("nested", "nested/val"), ("nested/val", "nested")):
        with pytest.raises(ValueError, match=r"lies inside data\."):
            folders_joined(tmp_path / train, tmp_path / validation)


@pytest.mark.parametrize("kind", ["links to files", "hard links", "links to class folders"])
def test_a_tree_of_links_into_the_training_tree_is_refused_and_some_links_are_counted(tmp_path, kind):
    put_tree(tmp_path, "train/cat", "train/dog")
    for name in ("cat", "dog"):
        if kind == "links to class folders":
            (tmp_path / "val").mkdir(exist_ok=True)
            (tmp_path / "val" / name).symlink_to(tmp_path / "train" / name)
            continue
        (tmp_path / "val" / name).mkdir(parents=True)
        for file in sorted((tmp_path / "train" / name).iterdir()):
            (os.link if kind == "hard links" else os.symlink)(file, tmp_path / "val" / name / f"copy-{file.name}")
    with pytest.raises(ValueError, match="hold the same files"):
        folders_joined(tmp_path / "train", tmp_path / "val")
    put_tree(tmp_path / "val", "own") if kind == "links to class folders" else put(
        tmp_path / "val/cat", {"own.png": png(99)}
    )
    put_tree(tmp_path / "train", "own", first=50)
    notes = folders_joined(tmp_path / "train", tmp_path / "val").notes["choices"]
    assert notes == ["validation: 4 files are links to, or the same as, files of training"]
