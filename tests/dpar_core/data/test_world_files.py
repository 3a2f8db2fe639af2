"""Parquet and webdataset as other programs write them: types, columns, endings, litter, damage."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpar_core.data.image_parquet import list_parquet
from dpar_core.data.image_tars import list_webdataset
from dpar_core.data.images import BadImage
from dpar_core.data.listing import join_listings
from dpar_core.data.manifest import Row
from dpar_core.data.sources import ImageOpener, block_of
from tests.dpar_core.data.test_sources import photo, png, put, tar_of

NUMBERS = [0, 1, 2]


def opened(root: Path, listing) -> list[list]:
    opener = ImageOpener({"train": str(root)}, {})
    return [opener(Row(key, "train", source, None, 0, "")).tolist() for key, source in zip(listing.keys, listing.sources)]


def write(path: Path, column: str, images: pa.Array, labels: pa.Array | None = None, label: str = "label", **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = pa.array([0, 1, 0]) if labels is None else labels
    table = pa.table({column: images, label: labels, **more})
    views = pa.types.is_struct(images.type) and pa.types.is_binary_view(images.type.field("bytes").type)
    pq.write_table(table, path, row_group_size=3 if views else 2)  # pyarrow cannot slice views in structs


def struct(kind: pa.DataType, *, path: bool = True) -> pa.Array:
    fields = [("bytes", kind)] + [("path", pa.string())] * path
    return pa.array([{"bytes": png(n), "path": f"{n}.png"} for n in NUMBERS], pa.struct(fields))


PLAIN = pa.array([png(n) for n in NUMBERS], pa.binary())
KINDS = {
    "bytes": PLAIN,
    "large bytes": PLAIN.cast(pa.large_binary()),
    "views": PLAIN.cast(pa.binary_view()),
    "dictionary": PLAIN.dictionary_encode(),
    "struct": struct(pa.binary()),
    "struct of large": struct(pa.large_binary()),
    "struct of views": struct(pa.binary_view()),
    "struct without path": struct(pa.binary(), path=False),
}


@pytest.mark.parametrize(
    ("kind", "column"), [*((kind, "image") for kind in KINDS), *(("bytes", name) for name in ("img", "JPG", "webp", "odd"))]
)
def test_images_are_read_from_every_kind_of_column(tmp_path, kind, column):
    write(tmp_path / "a.parquet", column, KINDS[kind], note=pa.array(["x", "y", "z"]))
    listing = list_parquet(tmp_path, "train")
    assert opened(tmp_path, listing) == [photo(n).tolist() for n in NUMBERS] and listing.labels == [0, 1, 0]
    assert len({block_of(source) for source in listing.sources}) == (1 if kind == "struct of views" else 2)  # row groups


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        (pa.int8(), "label"),
        (pa.uint64(), "labels"),
        (pa.int32(), "cls"),
        (pa.dictionary(pa.int8(), pa.int64()), "fine_label"),
    ],
)
def test_labels_are_read_from_every_kind_of_column(tmp_path, kind, column):
    labels = pa.array([2, 1, 0])
    labels = labels.dictionary_encode() if pa.types.is_dictionary(kind) else labels.cast(kind)
    write(tmp_path / "a.parquet", "image", PLAIN, labels, label=column)
    assert list_parquet(tmp_path, "train").labels == [2, 1, 0]


def test_two_columns_of_one_name_are_refused_whether_named_or_not(tmp_path):
    for names in (["image", "label", "label"], ["image", "image", "label"]):
        arrays = [PLAIN if name == "image" else pa.array([0, 1, 0]) for name in names]
        pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "a.parquet")
        for keys in ({}, {"image_key": "image", "label_key": "label"}):
            with pytest.raises(ValueError, match=f"has 2 columns named '{names[1]}': write it anew with one"):
                list_parquet(tmp_path, "train", **keys)


def test_where_several_columns_fit_the_params_choose(tmp_path):
    other = pa.array([png(7)] * 3, pa.binary())
    write(tmp_path / "a.parquet", "img", PLAIN, label="fine_label", png=other, coarse_label=pa.array([0, 0, 1]))
    with pytest.raises(ValueError, match=r"several columns that may hold images .*: img, png; name one with data.image_key"):
        list_parquet(tmp_path, "train")
    with pytest.raises(ValueError, match=r"several columns .*: fine_label, coarse_label; name one with data.label_key"):
        list_parquet(tmp_path, "train", image_key="img")
    listing = list_parquet(tmp_path, "train", image_key="png", label_key="coarse_label")
    assert listing.labels == [0, 0, 1] and opened(tmp_path, listing) == [photo(7).tolist()] * 3
    assert listing.notes == ["images and labels are read from the columns 'png' and 'coarse_label'"]
    with pytest.raises(ValueError, match=r"no column 'thing' of images .* .data.image_key.; it has img .binary."):
        list_parquet(tmp_path, "train", image_key="thing")
    write(tmp_path / "b.parquet", "image", PLAIN, thumbnail=other, target=pa.array([1, 1, 1]))
    assert list_parquet(tmp_path / "b.parquet", "train").labels == [0, 1, 0]


@pytest.mark.parametrize(
    ("image", "label", "words"),
    [
        (["a.png", "b.png", "c.png"], [0, 1, 0], "no column of images"),
        ([b"x"] * 3, [0.0, 1.0, float("nan")], "no column of labels"),
        ([b"x"] * 3, [[0], [1], [0]], "no column of labels"),
        ([b"x"] * 3, [True, False, True], "no column of labels"),
        ([b"x"] * 3, ["a", "", "b"], "row 1 of group 0 has the label ''"),
        ([b"x"] * 3, ["a", None, "b"], "has no label for row 1 of group 0"),
    ],
)
def test_columns_that_hold_neither_are_refused_with_what_is_there(tmp_path, image, label, words):
    write(tmp_path / "a.parquet", "image", pa.array(image), pa.array(label))
    with pytest.raises(ValueError, match=words) as caught:
        list_parquet(tmp_path, "train")
    assert "a.parquet" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["struct", "bytes in the struct", "bytes"])
def test_a_row_without_an_image_is_one_bad_image(tmp_path, kind):
    whole = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    none = {"struct": None, "bytes in the struct": {"bytes": None, "path": "elsewhere/7.jpg"}, "bytes": None}[kind]
    some = (
        [png(0), none, png(2)] if kind == "bytes" else [{"bytes": png(0), "path": ""}, none, {"bytes": png(2), "path": ""}]
    )
    write(tmp_path / "a.parquet", "image", pa.array(some, pa.binary() if kind == "bytes" else whole))
    listing = list_parquet(tmp_path, "train")
    opener, rows = ImageOpener({"train": str(tmp_path)}, {}), [Row("k", "train", s, None, 0, "") for s in listing.sources]
    assert listing.sources[1] == "train@0.1:a.parquet"
    assert opener(rows[0]).shape == opener(rows[2]).shape == (6, 5, 3)
    with pytest.raises(
        BadImage, match="no image bytes" + (", only the path 'elsewhere/7.jpg'" if kind.startswith("bytes in") else "")
    ):
        opener(rows[1])


def test_files_in_folders_have_keys_of_their_own_and_one_file_alone_is_a_root(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder / "0.parquet", "img", PLAIN)
    listing = list_parquet(tmp_path, "train")
    assert len(set(listing.keys)) == 6 and opened(tmp_path, listing) == [photo(n).tolist() for n in NUMBERS * 2]
    assert listing.sources[0] == "train@0.0[img]:a/0.parquet"
    single = list_parquet(tmp_path / "b/0.parquet", "train")
    assert opened(tmp_path / "b/0.parquet", single) == [photo(n).tolist() for n in NUMBERS]


def test_damaged_parquet_gets_a_sentence(tmp_path):
    write(tmp_path / "a.parquet", "image", PLAIN)
    whole = (tmp_path / "a.parquet").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    for content, words in (
        (whole[:-9], "not a Parquet file, or damaged"),
        (b"", "not a Parquet file"),
        (pointer, "Git LFS pointer"),
    ):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            list_parquet(tmp_path, "train")
        assert "\n" not in str(caught.value)


def test_every_flipped_byte_in_parquet_gives_images_or_a_sentence(tmp_path):
    write(tmp_path / "a.parquet", "image", PLAIN)
    whole = (tmp_path / "a.parquet").read_bytes()
    for place in np.random.default_rng(0).permutation(len(whole))[:150]:
        damaged = bytearray(whole)
        damaged[place] ^= 0xA5
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            opened(tmp_path, list_parquet(tmp_path, "train"))
        except ValueError as error:  # BadImage is one
            assert "\n" not in str(error)


def test_webdataset_with_dotted_and_upper_case_endings_and_litter(tmp_path):
    put(
        tmp_path,
        {
            "s/0.tar": tar_of(
                {
                    "a.img.JPG": png(0),
                    "a.target.cls": b"1",
                    ".DS_Store": b"x",
                    "._a.img.JPG": b"x",
                    "b.IMG.jpg": png(1),
                    "b.target.CLS": b"0",
                    "__MACOSX/._b.jpg": b"x",
                    "c.jpg": png(2),
                    "c.cls.txt": b"1\n",
                    "@eaDir/c.jpg": b"x",
                    "dir/d.png": png(3),
                    "dir/d.cls": b"0",
                    "dir/Thumbs.db": b"x",
                    "e.v2.jpg": png(4),
                    "e.v2.cls": b"1",
                    "e.txt": b"a caption",
                }
            ),
            "s/._0.tar": b"x",
            "s/notes.md": b"#",
        },
    )
    listing = list_webdataset(tmp_path / "s", "train")
    assert listing.labels == [1, 0, 1, 0, 1] and opened(tmp_path / "s", listing) == [photo(n).tolist() for n in range(5)]
    assert listing.left_out.pop("notes.md") == "not *.tar"
    assert set(listing.left_out.values()) == {"hidden, or left there by a system"} and len(listing.left_out) == 6
    assert list_webdataset(tmp_path / "s/0.tar", "train").labels == listing.labels


def img2dataset(number: int, **more: object) -> dict[str, bytes]:
    record = {
        "caption": f"a {number}",
        "url": "https://x",
        "key": f"{number:09d}",
        "status": "success",
        "width": 5,
        "exif": "{}",
    }
    key = f"{number:09d}"
    return {f"{key}.jpg": png(number), f"{key}.txt": b"a caption", f"{key}.json": json.dumps(record | more).encode()}


def test_webdataset_of_img2dataset_needs_the_key_that_holds_the_class(tmp_path):
    put(tmp_path / "t", {"00000.tar": tar_of(img2dataset(0, animal="dog") | img2dataset(1, animal="ant"))})
    with pytest.raises(ValueError, match=r"no 'label' in its .json, which has animal, caption, .*data.label_key"):
        list_webdataset(tmp_path / "t", "train")
    listing = list_webdataset(tmp_path / "t", "train", label_key="animal")
    assert listing.classes == ["ant", "dog"] and listing.labels == [1, 0]
    with pytest.raises(ValueError, match=r"no 'colour' in its \.json"):
        list_webdataset(tmp_path / "t", "train", label_key="colour")
    with pytest.raises(ValueError, match=r"'exif' in its \.json: has the label 7.5"):
        put(tmp_path / "u", {"0.tar": tar_of(img2dataset(0, exif=7.5))})
        list_webdataset(tmp_path / "u", "train", label_key="exif")


def test_a_key_with_several_images_or_labels_needs_its_ending_named(tmp_path):
    files = {"a.left.png": png(0), "a.right.png": png(1), "a.cls": b"0", "a.coarse.cls": b"1"}
    put(tmp_path, {"0.tar": tar_of(files)})
    with pytest.raises(ValueError, match=r"has 2 images, expected one, as KEY.jpg .left.png, right.png.: .*data.image_key"):
        list_webdataset(tmp_path, "train")
    with pytest.raises(ValueError, match=r"several labels .cls, coarse.cls.: name the one with data.label_key"):
        list_webdataset(tmp_path, "train", image_key="right.png")
    listing = list_webdataset(tmp_path, "train", image_key="right.png", label_key="coarse.cls")
    assert listing.labels == [1] and opened(tmp_path, listing) == [photo(1).tolist()]


@pytest.mark.parametrize(
    "record", [{"label": 3}, {"label": " 3"}, {"label": "goldfish"}, {"label": 2.5}, {"label": None}, {"class": 7}, [3], 3]
)
def test_a_json_beside_a_cls_may_repeat_its_label_or_hold_anything_else(tmp_path, record):
    put(tmp_path, {"0.tar": tar_of({"a.png": png(0), "a.cls": b"3", "a.json": json.dumps(record).encode()})})
    assert list_webdataset(tmp_path, "train").labels == [3]


@pytest.mark.parametrize("other", [4, "4", 4.0])
def test_a_cls_and_a_json_that_disagree_are_refused_until_one_is_named(tmp_path, other):
    files = {"a.png": png(0), "a.cls": b"3", "a.json": json.dumps({"label": other, "coarse": 1}).encode()}
    put(tmp_path, {"0.tar": tar_of(files)})
    with pytest.raises(ValueError, match=r"'a' has two labels, 3 in its .cls and 4 in its .json: .*data.label_key: cls"):
        list_webdataset(tmp_path, "train")
    assert list_webdataset(tmp_path, "train", label_key="cls").labels == [3]
    assert list_webdataset(tmp_path, "train", label_key="coarse").labels == [1]
    with pytest.raises(ValueError, match=r"'a' has several values in its .json: name the key that holds the class"):
        list_webdataset(tmp_path, "train", label_key="json")


def named_shard(pairs: list[tuple[str, object]]) -> dict[str, bytes]:
    files = {}
    for number, (label, other) in enumerate(pairs):
        record = json.dumps({"label": other}).encode()
        files |= {f"{number}.png": png(number), f"{number}.cls": label.encode(), f"{number}.json": record}
    return {"0.tar": tar_of(files)}


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (
            [("cat", "cat"), ("dog", "cat")],
            r"'1' has two labels, 'dog' in its .cls and 'cat' in its .json: .*_key: cls",
        ),
        (
            [("0", "cat"), ("1", "dog"), ("0", "dog")],
            r"'2' has the label 0 .* and 'dog' in its .json.* of 0 have 'cat'",
        ),
        ([("cat", 0), ("dog", 1), ("dog", 2)], r"'2' has the label 'dog' .* and 2 in its .json, where .* 'dog' have 1"),
        ([("1", "cat"), ("0", "dog")], r"class 1 is 'cat' in the .json of its images and 'dog' in .*classes.txt"),
    ],
    ids=["names", "names of a number", "numbers of a name", "a name and classes.txt"],
)
def test_names_in_cls_and_json_that_disagree_are_refused_until_one_is_named(tmp_path, pairs, words):
    put(tmp_path, named_shard(pairs) | ({"classes.txt": b"cat\ndog\n"} if pairs[0][0] == "1" else {}))
    with pytest.raises(ValueError, match=words):
        list_webdataset(tmp_path, "train")
    assert len(list_webdataset(tmp_path, "train", label_key="cls").labels) == len(pairs)


def test_names_in_cls_and_json_that_agree_are_read(tmp_path):
    put(tmp_path, named_shard([("0", "cat"), ("1", "dog"), ("0", "cat")]) | {"classes.txt": b"cat\ndog\n"})
    listing = list_webdataset(tmp_path, "train")
    assert listing.labels == [0, 1, 0] and listing.classes == ["cat", "dog"]


def test_splits_whose_json_calls_one_number_by_two_names_are_refused(tmp_path):
    roots = {split: tmp_path / split for split in ("train", "validation")}
    for split, names in (("train", ("cat", "dog")), ("validation", ("dog", "cat"))):
        put(roots[split], named_shard(list(zip("01", names))))

    def join():
        return join_listings({split: list_webdataset(root, split) for split, root in roots.items()}, roots)

    with pytest.raises(
        ValueError, match=r"validation calls class 0 'dog' and data.train .*train 'cat', so numbers mean other"
    ):
        join()
    for split, names in (("train", b"cat\ndog\n"), ("validation", b"dog\ncat\n")):
        (roots[split] / "classes.txt").write_bytes(names)
    assert [row.class_name for row in join().rows] == ["cat", "dog", "dog", "cat"]


def test_shards_that_are_packed_are_refused_with_the_way_out(tmp_path):
    put(tmp_path, {"0.tar.gz": b"x", "1.tgz": b"x"})
    with pytest.raises(ValueError, match=r"expected \*.tar, found 0.tar.gz, 1.tgz .*unpack compressed ones first"):
        list_webdataset(tmp_path, "train")


def test_folders_of_shards_are_walked_once_though_links_lead_round(tmp_path):
    put(tmp_path, {"a/train/0.tar": tar_of({"x.png": png(0), "x.cls": b"0"})})
    (tmp_path / "a/train/round").symlink_to(tmp_path / "a")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    assert len(list_webdataset(tmp_path / "linked", "train").keys) == 1


def test_class_names_of_the_hub_belong_to_the_column_of_the_labels(tmp_path):
    info = {"info": {"features": {"fine_label": {"names": ["x", "y"]}, "coarse_label": {"names": ["p", "q"]}}}}
    table = pa.table({"img": PLAIN, "fine_label": [0, 1, 0], "coarse_label": [1, 1, 0]})
    stream = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), stream)
    put(tmp_path, {"train-0.parquet": stream.getvalue(), "val/0.parquet": stream.getvalue()})
    for key, names in (("fine_label", ("x", "y")), ("coarse_label", ("p", "q"))):
        roots = {"train": tmp_path, "validation": tmp_path}
        listings = {split: list_parquet(root, split, label_key=key) for split, root in roots.items()}
        assert join_listings(listings, roots).classes == names
