"""Labels never move and classes never merge, whatever the source calls them."""

import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpar_core.data.classes import checked_label, read_class_names, resolve_labels, unique_names
from dpar_core.data.folders import list_folder
from dpar_core.data.image_parquet import list_parquet
from dpar_core.data.image_tars import list_ilsvrc_train, list_webdataset
from dpar_core.data.listing import join_listings
from tests.dpar_core.data.test_sources import png, put, tar_of, write_parquet

CAFE = "caf\u00e9"


def join(lister, train: Path, validation: Path, **options):
    roots = {"train": train, "validation": validation}
    return join_listings({split: lister(root, split) for split, root in roots.items()}, roots, **options)


def named(manifest, split: str) -> list[tuple[int, str]]:
    return [(row.label, row.class_name) for row in manifest.split(split)]


def test_names_that_occur_twice_get_their_number():
    assert unique_names(["crane", "dog", "crane"]) == ["crane (0)", "dog", "crane (2)"]
    assert unique_names(["a", "b"]) == ["a", "b"]
    assert len(set(unique_names(["x", "x", "x (0)", "x (1)"]))) == 4


def test_names_that_are_empty_or_hold_line_ends_can_be_shown_and_none_is_lost():
    assert unique_names(["", "a\nb", "a b", " "]) == ["(0)", "a b (1)", "a b (2)", "(3)"]


@pytest.mark.parametrize(
    "label",
    ["3 17", "[0, 1]", "3,4;5", "1.0", "nan", "-Inf", "0x1", "-0", "+3", "1e3", ".5", "9" * 30, "a\x07b", "\0" * 8, ""],
)
def test_text_that_is_another_number_or_holds_control_characters_is_no_label(label):
    with pytest.raises(ValueError, match=r"^here has the label"):
        checked_label(label, "here")


def test_text_labels_are_numbers_padded_numbers_or_names():
    labels = ["3", " 12\n", "007", "10 cats", "nana", "e5", "\u0663", "2024-01"]
    assert [checked_label(label, "here") for label in labels] == [3, 12, *(label.strip() for label in labels[2:])]


@pytest.mark.parametrize("names", [["1", "0"], ["1", "2"], ["10", "cat"]])
def test_numbers_written_as_text_beside_names_that_are_other_numbers_are_refused(tmp_path, names):
    text, number = tmp_path / "text", tmp_path / "number"
    write_text_labels(text / "0.parquet", ["1", "0"], pa.string())
    put(tmp_path / "shards", {"0.tar": tar_of({"a.png": png(0), "a.cls": b"1", "b.png": png(1), "b.cls": b"0"})})
    write_parquet(number / "0.parquet", [0, 1], [1, 0])
    for folder in (text, tmp_path / "shards", number):
        put(folder, {"classes.txt": "\n".join(names).encode()})
    for lister, folder in ((list_parquet, text), (list_webdataset, tmp_path / "shards")):
        with pytest.raises(ValueError, match=rf"class 0 is named '{names[0]}', so a label may mean either"):
            lister(folder, "train")
    listing = list_parquet(number, "train")
    assert listing.classes == names and listing.labels == [1, 0]


def test_a_list_of_the_sources_names_in_another_order_is_refused_and_one_of_other_names_counts(tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("cat\nant\nbee\n")
    with pytest.raises(ValueError, match=r"class 0 is 'ant' by the names in the source, which is class 1 in .*classes.txt"):
        resolve_labels([0, 1], ["ant", "bee"], listed, where="data.train x", written=False)
    assert resolve_labels([0, 1], ["x", "y"], listed, where="", written=False).names == ["cat", "ant", "bee"]


def test_a_list_of_classes_with_numbers_in_another_order_is_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("1 ant\n0 bee\n")
    with pytest.raises(ValueError, match=r"do not count up by one .1, 0."):
        read_class_names(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("ant,1\nbee,0\n")
    with pytest.raises(ValueError, match=r"numbers behind the names .* do not count up by one .1, 0."):
        read_class_names(tmp_path / "classes.txt")
    kept = ("1 ant\n2 bee\n", "0: ant\n1: bee\n", "3 toed sloth\nbee\n", "ant,0\nbee,1\n", "Sedan 2012\nVan 2009\n")
    for content in kept:
        (tmp_path / "classes.txt").write_text(content)
        assert read_class_names(tmp_path / "classes.txt") == content.split("\n")[:2]


def test_parquet_classes_of_one_name_stay_two_and_their_labels_stay(tmp_path):
    names = ["crane", "dog", "crane", "maillot", "maillot"]
    write_parquet(tmp_path / "train-0.parquet", list(range(5)), [0, 1, 2, 3, 4], names)
    write_parquet(tmp_path / "validation-0.parquet", [7, 8], [2, 0], names)
    manifest = join(list_parquet, tmp_path, tmp_path)
    assert manifest.classes == ("crane (0)", "dog", "crane (2)", "maillot (3)", "maillot (4)")
    assert [row.label for row in manifest.split("train")] == [0, 1, 2, 3, 4]
    assert named(manifest, "validation") == [(2, "crane (2)"), (0, "crane (0)")]


def test_classes_of_one_name_in_another_order_cannot_be_matched_and_are_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], [0, 1, 2], ["crane", "dog", "crane"])
    write_parquet(tmp_path / "val-0.parquet", [3], [2], ["dog", "crane", "crane"])
    with pytest.raises(ValueError, match="names that occur twice cannot be matched"):
        join(list_parquet, tmp_path, tmp_path)


def test_parquet_files_that_list_classes_in_another_order_are_matched_by_name(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], [0, 1, 2], ["ant", "bee", "cat"])
    write_parquet(tmp_path / "train-1.parquet", [3, 4, 5], [0, 1, 2], ["cat", "ant", "bee"])
    write_parquet(tmp_path / "val-0.parquet", [6, 7], [0, 1], ["bee", "cat"])
    manifest = join(list_parquet, tmp_path, tmp_path)
    assert manifest.classes == ("ant", "bee", "cat")
    assert [row.label for row in manifest.split("train")] == [0, 1, 2, 2, 0, 1]
    assert named(manifest, "validation") == [(1, "bee"), (2, "cat")]


def test_parquet_files_whose_classes_do_not_fit_together_are_refused(tmp_path):
    write_parquet(tmp_path / "a/train-0.parquet", [0, 1], [0, 1], ["ant", "bee"])
    write_parquet(tmp_path / "a/train-1.parquet", [2], [1], ["ant", "wasp"])
    with pytest.raises(ValueError, match=r"train-1.parquet lists other classes than train-0.parquet .*class 1 is 'wasp'"):
        list_parquet(tmp_path / "a", "train")
    write_parquet(tmp_path / "b/train-0.parquet", [0, 1], [0, 1], ["ant", "bee"])
    write_parquet(tmp_path / "b/train-1.parquet", [2], [1])
    with pytest.raises(ValueError, match=r"train-1.parquet names no classes, but train-0.parquet"):
        list_parquet(tmp_path / "b", "train")
    write_parquet(tmp_path / "c/train-0.parquet", [0, 1], [0, 1], ["ant", "bee"])
    write_parquet(tmp_path / "c/val-0.parquet", [2], [1])
    with pytest.raises(ValueError, match="only numbers them, so their labels cannot be compared"):
        join(list_parquet, tmp_path / "c", tmp_path / "c")
    write_parquet(tmp_path / "d/val-0.parquet", [2], [0], ["ant", "bee"])
    write_parquet(tmp_path / "d/train-0.parquet", [0, 1], [0, 1], ["bee", "ant"])
    put(tmp_path / "d", {"classes.txt": b"n01\nn02\n"})
    with pytest.raises(ValueError, match="list other class names in their files"):
        join(list_parquet, tmp_path / "d", tmp_path / "d")


@pytest.mark.parametrize("value", [5, 2**40, -1, None])
def test_parquet_labels_out_of_range_are_refused_with_their_row(tmp_path, value):
    write_parquet(tmp_path / "a.parquet", [0, 1, 2, 3], [0, 1, 0, value], ["ant", "bee"])
    with pytest.raises(ValueError, match=r"a\.parquet.* row 0 of group 1"):
        list_parquet(tmp_path, "train")
    if value in (2**40, -1):
        write_parquet(tmp_path / "a.parquet", [0, 1, 2, 3], [0, 1, 0, value])
        with pytest.raises(ValueError, match="expected a class number from 0 to below"):
            list_parquet(tmp_path, "train")


def write_text_labels(path: Path, labels: list[str], kind: pa.DataType) -> None:
    images = pa.array([png(number) for number in range(len(labels))], pa.binary())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": pa.array(labels).cast(kind)}), path)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_text_labels_in_parquet_are_numbered_in_sorted_order_and_matched_by_name(tmp_path, kind):
    write_text_labels(tmp_path / "train-0.parquet", ["dog", "ant", "cat"], kind)
    write_text_labels(tmp_path / "train-1.parquet", ["bee", "dog"], kind)
    write_text_labels(tmp_path / "val-0.parquet", ["cat", "dog"], kind)
    manifest = join(list_parquet, tmp_path, tmp_path)
    assert manifest.classes == ("ant", "bee", "cat", "dog")
    assert [row.label for row in manifest.split("train")] == [3, 0, 2, 1, 3]
    assert named(manifest, "validation") == [(2, "cat"), (3, "dog")]
    assert "train: 4 text labels, numbered in sorted order" in manifest.notes["choices"]
    put(tmp_path, {"classes.txt": b"dog\ncat\nbee\nant\n"})
    assert join(list_parquet, tmp_path, tmp_path).classes == ("dog", "cat", "bee", "ant")
    put(tmp_path, {"classes.txt": b"dog\ncat\nant\n"})
    with pytest.raises(ValueError, match=r"1 labels are not in .*classes\.txt .first: 'bee'"):
        join(list_parquet, tmp_path, tmp_path)


def put_shard(root: Path, labels: list[bytes], name: str = "0.tar") -> None:
    files = {
        f"{n}.{ending}": content for n, label in enumerate(labels) for ending, content in (("jpg", png(n)), ("cls", label))
    }
    put(root, {name: tar_of(files)})


def test_text_labels_in_webdataset_are_numbered_in_sorted_order_and_mixtures_refused(tmp_path):
    put_shard(tmp_path / "t", [b"zebra\n", b" ant", b"zebra"])
    put_shard(tmp_path / "v", [b"zebra"])
    manifest = join(list_webdataset, tmp_path / "t", tmp_path / "v")
    assert manifest.classes == ("ant", "zebra") and named(manifest, "validation") == [(1, "zebra")]
    put_shard(tmp_path / "m", [b"0", b"1", b"oops"])
    with pytest.raises(ValueError, match=r"labels are partly numbers .as 0. and partly text .as 'oops'"):
        list_webdataset(tmp_path / "m", "train")
    put(tmp_path / "m", {"classes.txt": b"1\noops\n0\n"})
    assert list_webdataset(tmp_path / "m", "train").labels == [2, 0, 1]
    put(tmp_path / "t", {"classes.txt": b"ant\nzebra\nzebra\n"})
    with pytest.raises(ValueError, match="'zebra', which stands twice in"):
        list_webdataset(tmp_path / "t", "train")


def test_labels_that_begin_at_one_are_refused_as_class_0_has_no_images(tmp_path):
    put_shard(tmp_path / "t", [b"1", b"2"])
    put_shard(tmp_path / "v", [b"1"])
    with pytest.raises(ValueError, match="has no images of 1 of its 3 classes: 0"):
        join(list_webdataset, tmp_path / "t", tmp_path / "v")


def put_loop(folder: Path) -> None:
    other = folder.parent / ".other"
    folder.symlink_to(other)
    other.symlink_to(folder)


EMPTY = {
    "hidden file only": lambda folder: put(folder, {".gitkeep": b""}),
    "nothing": lambda folder: folder.mkdir(),
    "other files only": lambda folder: put(folder, {"notes.txt": b"x", "Thumbs.db": b"x"}),
    "a link to itself": lambda folder: folder.symlink_to(folder),
    "a broken link": lambda folder: folder.symlink_to(folder.parent / "nowhere"),
    "a link to its parent": lambda folder: folder.symlink_to(folder.parent),
    "a loop of two links": lambda folder: put_loop(folder),
    "folders without images": lambda folder: put(folder, {"a/b/x.txt": b""}),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_class_folder_without_images_is_refused_by_name_or_keeps_its_place(tmp_path, kind):
    put(
        tmp_path,
        {
            f"{split}/{name}/1.png": png(n)
            for n, (split, name) in enumerate(
                [("train", "n01440764"), ("train", "n01484850"), ("val", "n01440764"), ("val", "n01484850")]
            )
        },
    )
    EMPTY[kind](tmp_path / "train" / "n01443537")
    with pytest.raises(
        ValueError, match=r"has no images of 1 of its 3 classes: n01443537 \(.*set data.empty_classes to keep"
    ):
        join(list_folder, tmp_path / "train", tmp_path / "val")
    manifest = join(list_folder, tmp_path / "train", tmp_path / "val", keep_empty=True)
    assert manifest.classes == ("n01440764", "n01443537", "n01484850")
    assert named(manifest, "train") == named(manifest, "validation") == [(0, "n01440764"), (2, "n01484850")]


def test_an_empty_class_of_an_ilsvrc_tar_is_refused_too(tmp_path):
    inner = {
        "n00000001.tar": tar_of({"a.JPEG": png(1)}),
        "n00000002.tar": tar_of({}),
        "._n00000001.tar": b"of macOS",
        "n00000003.tar": tar_of({"b.JPEG": png(2), "._b.JPEG": b"x"}),
    }
    put(tmp_path, {"t.tar": tar_of(inner)})
    listing = list_ilsvrc_train(tmp_path / "t.tar")
    assert listing.labels == [0, 2] and list(listing.left_out) == ["._n00000001.tar", "._b.JPEG"]
    with pytest.raises(ValueError, match="no images of 1 of its 3 classes: n00000002"):
        join_listings({"train": listing}, {"train": tmp_path / "t.tar"})


def test_an_inner_tar_of_ilsvrc_that_occurs_twice_is_refused(tmp_path):
    inner = [("n00000001.tar", tar_of({f"{number}.JPEG": png(number)})) for number in range(2)]
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in inner:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"t\.tar holds n00000001.tar twice"):
        list_ilsvrc_train(tmp_path / "t.tar")


def test_names_of_macos_and_linux_are_equal_and_twice_in_one_tree_refused(tmp_path):
    nfd = unicodedata.normalize("NFD", CAFE)
    assert nfd != CAFE
    put(tmp_path, {f"train/{nfd}/1.png": png(1), "train/zoo/1.png": png(2), f"val/{CAFE}/1.png": png(3)})
    manifest = join(list_folder, tmp_path / "train", tmp_path / "val")
    assert manifest.classes == (CAFE, "zoo") and named(manifest, "validation") == [(0, CAFE)]
    os.mkdir(tmp_path / "train" / CAFE)
    with pytest.raises(ValueError, match=r"has 2 folders whose names are all .* in one Unicode form"):
        list_folder(tmp_path / "train", "train")


def test_a_class_that_differs_in_case_from_one_of_training_is_named(tmp_path):
    put(tmp_path, {"train/Cat/1.png": png(1), "train/dog/1.png": png(2), "val/cat/1.png": png(3)})
    with pytest.raises(ValueError, match=r"lacks: cat .*'cat' is 'Cat' there"):
        join(list_folder, tmp_path / "train", tmp_path / "val")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a\n\nb\n", "line 2 of .* is empty"), (b"", "is empty"), (b"\n\n", "is empty"), (b"caf\xe9\n", "is not UTF-8")],
)
def test_a_list_of_classes_with_gaps_is_refused(tmp_path, content, words):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_class_names(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfa b\r\nc\r\n\r\n")
    assert read_class_names(tmp_path / "classes.txt") == ["a b", "c"]
    # Characters that Python's splitlines cuts at are part of a name: a name in two would move all labels after it.
    (tmp_path / "classes.txt").write_bytes("a\x0cb\nc\u2028d\ne\x85f\rg\x1ch".encode())
    assert read_class_names(tmp_path / "classes.txt") == ["a b", "c d", "e f", "g h"]


def test_names_in_metadata_that_are_no_list_of_text_are_passed_over(tmp_path):
    for number, names in enumerate(("[" * 5000, json.dumps({"info": {"features": {"label": {"names": [1, 2]}}}}))):
        table = pa.table({"image": [png(0)], "label": [0]}).replace_schema_metadata({"huggingface": names})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        assert list_parquet(tmp_path / f"{number}.parquet", "train").classes == ["0"]
