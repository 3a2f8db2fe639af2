"""Every source gives the same manifest rows, opens them again, and says what is wrong with it."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpar_core.data.folders import image_files, list_folder
from dpar_core.data.image_parquet import list_parquet
from dpar_core.data.image_tars import list_ilsvrc_train, list_ilsvrc_validation, list_webdataset
from dpar_core.data.images import BadImage
from dpar_core.data.listing import ListedClasses, join_listings
from dpar_core.data.manifest import Manifest, Row, read_manifest, write_manifest
from dpar_core.data.shards import TokenSample, write_shard
from dpar_core.data.sources import ImageOpener, block_of
from dpar_core.data.synsets import IMAGENET_SYNSETS, check_imagenet_classes
from dpar_core.data.tars import BadTar
from dpar_core.files import Damaged


def photo(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(number)).save(stream, "PNG")
    return stream.getvalue()


def tar_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# The same eight images, two classes, four of each split, in four layouts. Image number 4 * split + 2 * class + i.
def make_folder(root: Path) -> tuple[Manifest, dict]:
    for s, split in enumerate(("train", "validation")):
        put(root / split, {f"n{c}/{i}.png": png(4 * s + 2 * c + i) for c in range(2) for i in range(2)})
    roots = {split: root / split for split in ("train", "validation")}
    return join_listings({split: list_folder(place, split) for split, place in roots.items()}, roots)


def make_ilsvrc(root: Path) -> Manifest:
    names = ("n00000001", "n00000002")
    inner = {f"{n}.tar": tar_of({f"{n}_{i}.JPEG": png(2 * c + i) for i in range(2)}) for c, n in enumerate(names)}
    put(root, {"train.tar": tar_of(inner)})
    files = {f"val_{2 * c + i}.JPEG": png(4 + 2 * c + i) for c in range(2) for i in range(2)}
    put(root, {"val.tar": tar_of(files)})
    listed = ListedClasses(root / "list", [names[c] for c in range(2) for _ in range(2)])
    roots = {"train": root / "train.tar", "validation": root / "val.tar"}
    validation = list_ilsvrc_validation(roots["validation"], lambda path, names: listed)
    return join_listings({"train": list_ilsvrc_train(roots["train"]), "validation": validation}, roots)


def make_webdataset(root: Path) -> Manifest:
    for s, split in enumerate(("train", "validation")):
        for c in range(2):
            files = {}
            for i in range(2):
                number = 4 * s + 2 * c + i
                label = {f"k{number}.cls": b"%d" % c} if i else {f"k{number}.json": json.dumps({"label": c}).encode()}
                files |= {f"k{number}.png": png(number)} | label
            put(root / split, {f"{c:06d}.tar": tar_of(files)})
    roots = {split: root / split for split in ("train", "validation")}
    return join_listings({split: list_webdataset(place, split) for split, place in roots.items()}, roots)


def write_parquet(path: Path, numbers: list[int], labels: list[int], names: list[str] | None = None) -> None:
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, "label": pa.array(labels, pa.int64())})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


def make_parquet(root: Path) -> Manifest:
    for s, split in enumerate(("train", "validation")):
        numbers = [4 * s + n for n in range(4)]
        write_parquet(root / f"{split}-00000-of-00001.parquet", numbers, [0, 0, 1, 1], ["tench", "goldfish"])
    roots = {"train": root, "validation": root}
    return join_listings({split: list_parquet(place, split) for split, place in roots.items()}, roots)


LAYOUTS = {"folder": make_folder, "ilsvrc": make_ilsvrc, "webdataset": make_webdataset, "parquet": make_parquet}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_lists_and_opens_the_same_images(tmp_path, layout):
    manifest = LAYOUTS[layout](tmp_path)
    opener = ImageOpener(manifest.roots, {})
    found = [(row.split, row.label, opener(row).tolist()) for row in manifest.rows]
    expected = [("train" if n < 4 else "validation", n // 2 % 2, photo(n).tolist()) for n in range(8)]
    assert found == expected
    assert len({row.key for row in manifest.rows}) == 8
    assert all("." not in row.key and "/" not in row.key for row in manifest.rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_data_give_the_same_manifest_bytes_wherever_they_lie(tmp_path, layout):
    digests = set()
    for place in ("a", "b"):
        manifest = LAYOUTS[layout](tmp_path / place)
        digests.add(manifest.digest)
        for copy in ("1", "2"):
            write_manifest(tmp_path / f"{place}{copy}.parquet", manifest)
        assert (tmp_path / f"{place}1.parquet").read_bytes() == (tmp_path / f"{place}2.parquet").read_bytes()
    assert len(digests) == 1


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    rows = [Row("a", "train", "builtin:x", (0, 1, 5, 6), 0, "x"), Row("b", "validation", "train:y/1.png", None, 1, "y")]
    written = Manifest.of(rows, ["x", "y"], {"train": "/data"}, notes={"files_left_out": 3})
    write_manifest(tmp_path / "m.parquet", written)
    found = read_manifest(tmp_path / "m.parquet")
    assert list(found.rows) == rows
    assert (found.classes, found.roots, found.digest, found.notes) == (
        ("x", "y"),
        {"train": "/data"},
        written.digest,
        {"files_left_out": 3},
    )
    assert found.find("b") == rows[1] and found.find("c") is None
    assert [found.rows[-1], *found.rows[0:1], *found.rows[::-1]] == [rows[1], rows[0], rows[1], rows[0]]


@pytest.mark.parametrize(
    "content", ["0" * 16, None], ids=["of today", "of version 0.1.0, which names no classes in its digest"]
)
def test_a_class_name_that_is_not_its_labels_is_damage(tmp_path, content):
    rows = [Row("a", "train", "builtin:x", None, 0, "x", content), Row("b", "train", "builtin:y", None, 1, "y", content)]
    write_manifest(tmp_path / "m.parquet", Manifest.of(rows, ["x", "y"]))
    table = pq.read_table(tmp_path / "m.parquet")
    for other in (pa.array(["x", "x"]), pa.array([b"x", b"y"])):
        changed = table.set_column(5, "class_name", other)
        pq.write_table(changed, tmp_path / "changed.parquet")
        with pytest.raises(Damaged, match=r"is damaged or was edited"):
            read_manifest(tmp_path / "changed.parquet")


def test_a_manifest_without_a_seal_is_read_only_where_it_has_no_contents_as_version_0_1_0_had_none(tmp_path):
    write_manifest(tmp_path / "m.parquet", Manifest.of([Row("a", "train", "builtin:x", None, 0, "x", None)], ["x"]))
    table = pq.read_table(tmp_path / "m.parquet")
    header = {name: value for name, value in table.schema.metadata.items() if name != b"seal"}
    pq.write_table(table.drop_columns("content").replace_schema_metadata(header), tmp_path / "old.parquet")
    assert read_manifest(tmp_path / "old.parquet").rows[0].key == "a"
    lost = table.replace_schema_metadata(header | {b"notes": b'["of nobody"]'})
    pq.write_table(lost, tmp_path / "lost.parquet")
    with pytest.raises(Damaged, match="is damaged or was edited"):
        read_manifest(tmp_path / "lost.parquet")


def test_a_key_for_two_images_is_refused():
    with pytest.raises(ValueError, match=r"1 keys stand for more than one image"):
        Manifest.of([Row("a", "train", "x", None, 0, "c")] * 2, ["c"])


def test_a_file_that_is_no_manifest_is_refused(tmp_path):
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"is not a manifest"):
        read_manifest(tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(ValueError, match=r"damaged"):
        read_manifest(tmp_path / "broken.parquet")
    with pytest.raises(FileNotFoundError, match=r"run `dpar-cli run data`"):
        read_manifest(tmp_path / "none.parquet")


def test_the_rows_of_a_parquet_row_group_are_one_block(tmp_path):
    manifest = make_parquet(tmp_path)
    train = [block_of(row.source) for row in manifest.split("train")]
    assert train[0] == train[2] != train[3]
    assert block_of("train:n1/1.png") is None and block_of("train@512+100:a.tar") is None


def test_files_that_are_no_images_are_left_out_and_named(tmp_path):
    put(
        tmp_path,
        {
            "a/1.png": png(1),
            "a/no_ending": png(2),
            "a/notes.txt": b"hello",
            "a/odd.data": png(3),
            "a/.hidden.png": png(4),
            "a/deeper/5.png": png(5),
            "readme.md": b"#",
            "empty_class/x.txt": b"",
        },
    )
    listing = list_folder(tmp_path, "train")
    assert listing.sources == ["train:a/1.png", "train:a/no_ending", "train:a/odd.data", "train:a/deeper/5.png"]
    assert listing.classes == ["a", "empty_class"] and listing.empty == {"empty_class": "no image files in it"}
    assert listing.left_out == {
        "a/.hidden.png": "hidden, or left there by a system",
        "a/notes.txt": "no image by its name and its first bytes",
        "empty_class/x.txt": "no image by its name and its first bytes",
        "readme.md": "beside the class folders",
    }


def test_a_folder_of_images_is_listed_whatever_their_format_and_without_what_systems_leave_there(tmp_path):
    put(
        tmp_path,
        {
            "b/2.jpg": png(1),
            "a.png": png(2),
            "b/1.JPEG": png(3),
            "no_ending": png(4),
            "notes.txt": b"x",
            "._a.png": b"x",
            "@eaDir/a.png": png(5),
            "b/Thumbs.db": png(6),
            "b/.DS_Store": b"x",
            "__MACOSX/._a.png": b"x",
        },
    )
    files, left_out = image_files(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a.png", "b/1.JPEG", "b/2.jpg", "no_ending"]
    assert left_out == ["._a.png", "@eaDir", "__MACOSX", "b/.DS_Store", "b/Thumbs.db", "notes.txt"]
    with pytest.raises(FileNotFoundError, match="no folder at"):
        image_files(tmp_path / "nowhere")


def image_folder(root: Path) -> list[tuple[str, int]]:
    """torchvision.datasets.ImageFolder in its own words (find_classes, make_dataset), for names that end in png."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    found = []
    for label, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            found += [(os.path.relpath(os.path.join(folder, file), root), label) for file in sorted(files)]
    return found


def test_folders_below_and_links_are_walked_as_image_folder_walks_them(tmp_path):
    names = [
        "b/2.png",
        "b/1.png",
        "b/x/1.png",
        "b/x/y/1.png",
        "b/x-1/1.png",
        "b/x1/0.png",
        "a/z/1.png",
        "c-c/1.png",
        "c/1.png",
    ]
    put(tmp_path / "root", {name: png(number) for number, name in enumerate(names)})
    put(tmp_path / "elsewhere", {"1.png": png(1), "deep/2.png": png(2)})
    (tmp_path / "root/b/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/d").symlink_to(tmp_path / "elsewhere")
    listing = list_folder(tmp_path / "root", "train")
    found = [(source.removeprefix("train:"), label) for source, label in zip(listing.sources, listing.labels)]
    assert found == image_folder(tmp_path / "root") and len(found) == len(names) + 4
    assert listing.left_out == {}


@pytest.mark.timeout(120)
def test_a_link_that_leads_back_is_left_out(tmp_path):
    put(tmp_path, {"a/1.png": png(1), "a/deep/2.png": png(2), "b/3.png": png(3)})
    (tmp_path / "a/deep/back").symlink_to(tmp_path / "a")
    (tmp_path / "b/up").symlink_to(tmp_path)
    (tmp_path / "b/other").symlink_to(tmp_path / "a")
    listing = list_folder(tmp_path, "train")
    assert listing.left_out == dict.fromkeys(["a/deep/back", "b/other/deep/back", "b/up"], "a link back to a folder above")
    assert [source.removeprefix("train:") for source in listing.sources] == [
        "a/1.png",
        "a/deep/2.png",
        "b/3.png",
        "b/other/1.png",
        "b/other/deep/2.png",
    ]


def test_names_that_are_not_utf8_are_left_out_and_shown_escaped_and_class_names_refused(tmp_path):
    put(tmp_path, {"a/1.png": png(1), "a/caf\u00e9.png": png(2)})
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"a/caf\xe9.png"))).write_bytes(png(3))
    listing = list_folder(tmp_path, "train")
    assert listing.left_out == {"a/caf\\xe9.png": "its name is not UTF-8"}
    assert listing.sources == ["train:a/1.png", "train:a/caf\u00e9.png"]
    manifest = join_listings({"train": listing}, {"train": tmp_path})
    write_manifest(tmp_path / "m.parquet", manifest)
    assert read_manifest(tmp_path / "m.parquet").notes["left_out"] == {"train:a/caf\\xe9.png": "its name is not UTF-8"}
    os.mkdir(os.path.join(os.fsencode(tmp_path), b"b\xff"))
    with pytest.raises(ValueError, match=r"the name of class folder 'b\\\\xff' is not UTF-8: rename it"):
        list_folder(tmp_path, "train")


def test_a_class_folder_that_cannot_be_read_keeps_its_place_and_is_refused(tmp_path, monkeypatch):
    put(tmp_path, {"a/1.png": png(1), "b/2.png": png(2), "b/deep/3.png": png(3)})
    real = os.scandir

    def refuse(path):
        if Path(path).name in ("a", "deep"):
            raise PermissionError(13, "Permission denied")  # root reads whatever the mode says
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_folder(tmp_path, "train")
    assert (listing.sources, listing.labels, listing.classes) == (["train:b/2.png"], [1], ["a", "b"])
    assert listing.left_out == dict.fromkeys(["a", "b/deep"], "cannot be read: Permission denied")
    with pytest.raises(ValueError, match=r"no images of 1 of its 2 classes: a \(cannot be read: Permission denied\)"):
        join_listings({"train": listing}, {"train": tmp_path})


def test_all_files_left_out_are_in_the_notes(tmp_path):
    put(tmp_path, {"a/1.png": png(1), **{f"a/{number:03d}.txt": b"" for number in range(250)}})
    notes = join_listings({"train": list_folder(tmp_path, "train")}, {"train": tmp_path}).notes
    assert notes["files_left_out"] == 250 and list(notes["left_out"]) == [f"train:a/{n:03d}.txt" for n in range(250)]


@pytest.mark.parametrize("length", [65, 77, 79, 81, 83, 200])
def test_keys_are_short_enough_for_a_shard_and_stay_apart(tmp_path, length):
    stem = "n" * length
    for split in ("train", "validation"):
        files = {f"{stem}{i}.{ending}": content for i in range(2) for ending, content in (("png", png(i)), ("cls", b"0"))}
        put(tmp_path / split, {"0.tar": tar_of(files)})
        write_parquet(tmp_path / split / "p" / f"{stem}.parquet", [0, 1], [0, 0])
        keys, again = (
            [*list_webdataset(tmp_path / split, split).keys, *list_parquet(tmp_path / split / "p", split).keys]
            for _ in range(2)
        )
        assert len(set(keys)) == 4 and all(key.startswith(f"{split}-") for key in keys) and keys == again
        some = [TokenSample(key, 0, np.zeros((1, 4), np.uint16), {}) for key in keys]
        assert write_shard(tmp_path / "x.tar", some).keys == keys
        assert all(stem in key for key in keys) if length == 65 else max(map(len, keys)) <= 89


@pytest.mark.parametrize("kind", ["gone", "pipe", "folder", "unreadable"])
def test_what_cannot_be_read_any_more_is_a_bad_image(tmp_path, kind, monkeypatch):
    put(tmp_path, {"a/1.png": png(1)})
    path = tmp_path / "a/1.png"
    if kind == "unreadable":
        real = os.open

        def refuse(name, *rest):
            if Path(name) == path:
                raise PermissionError(13, "Permission denied")
            return real(name, *rest)

        monkeypatch.setattr(os, "open", refuse)  # root reads whatever the mode says
    else:
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    with pytest.raises(BadImage, match=r"cannot be read|not a file"):
        ImageOpener({"train": str(tmp_path)}, {})(Row("k", "train", "train:a/1.png", None, 0, "a"))


def test_a_dangling_link_is_listed_so_that_it_is_counted_as_bad(tmp_path):
    put(tmp_path, {"a/1.png": png(1)})
    (tmp_path / "a/2.png").symlink_to("nowhere.png")
    assert list_folder(tmp_path, "train").sources == ["train:a/1.png", "train:a/2.png"]


def test_a_box_outside_the_image_is_a_bad_image(tmp_path):
    put(tmp_path, {"a/1.png": png(1)})
    opener = ImageOpener({"train": str(tmp_path)}, {})
    assert np.array_equal(opener(Row("k", "train", "train:a/1.png", (1, 2, 4, 6), 0, "a")), photo(1)[2:6, 1:4])
    with pytest.raises(BadImage, match=r"lies outside 5 x 6"):
        opener(Row("k", "train", "train:a/1.png", (1, 2, 6, 6), 0, "a"))


def test_a_source_of_another_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no image source 'elsewhere:x'"):
        ImageOpener({"train": str(tmp_path)}, {})(Row("k", "train", "elsewhere:x", None, 0, "a"))


def test_validation_classes_that_training_lacks_are_named(tmp_path):
    put(tmp_path, {"train/a/1.png": png(1), "validation/b/1.png": png(2)})
    roots = {split: tmp_path / split for split in ("train", "validation")}
    with pytest.raises(ValueError, match=r"has classes that data.train .* lacks: b "):
        join_listings({split: list_folder(root, split) for split, root in roots.items()}, roots)


def test_labels_go_by_name_when_validation_has_fewer_classes(tmp_path):
    put(tmp_path, {"train/a/1.png": png(1), "train/b/1.png": png(2), "validation/b/1.png": png(3)})
    roots = {split: tmp_path / split for split in ("train", "validation")}
    manifest = join_listings({split: list_folder(root, split) for split, root in roots.items()}, roots)
    assert [row.label for row in manifest.split("validation")] == [1]
    assert manifest.counts("validation").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.png": b"x"}, "has no label beside its image"),
        ({"a.cls": b"1"}, "has 0 images, expected one"),
        ({"a.png": b"x", "a.jpg": b"y", "a.cls": b"1"}, "has 2 images"),
        ({"a.png": b"x", "b.png": b"y", "a.cls": b"1", "b.cls": b"1"}, "has no label beside"),
        ({"a.png": b"x", "a.cls": b""}, "expected a class"),
        ({"a.png": b"x", "a.cls": b"\xff\xfe"}, "expected a class number or name in UTF-8"),
        ({"a.png": b"x", "a.cls": b"9" * 5000}, "expected a class"),
        ({"a.png": b"x", "a.cls": b"1099511627776"}, "has the label 1099511627776, expected a class number from 0 to below"),
        ({"a.png": b"x", "a.cls": b"-1"}, "expected a class number"),
        ({"a.png": b"x", "a.json": b'{"label": true}'}, "expected a class number"),
        ({"a.png": b"x", "a.json": b"[" * 10_000}, "a .json that cannot be read"),
        ({"noending": b"x"}, "is not named KEY.ending"),
    ],
)
def test_a_shard_with_missing_pairs_is_refused_in_one_sentence(tmp_path, files, words):
    put(tmp_path, {"0.tar": tar_of(files)})
    with pytest.raises(ValueError, match=words) as caught:
        list_webdataset(tmp_path, "train")
    assert "0.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_twice_is_refused_in_one_shard_and_over_two(tmp_path):
    pair = {"a.png": png(1), "a.cls": b"0"}
    twice = io.BytesIO()
    with tarfile.open(fileobj=twice, mode="w") as tar:
        for name, content in [*pair.items(), ("b.png", png(2)), ("b.cls", b"0"), *pair.items()]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    put(tmp_path / "one", {"0.tar": twice.getvalue()})
    put(tmp_path / "two", {"0.tar": tar_of(pair), "1.tar": tar_of(pair)})
    for root in ("one", "two"):
        with pytest.raises(ValueError, match=r"key 'a' occurs twice"):
            list_webdataset(tmp_path / root, "train")


def test_classes_txt_names_the_classes_of_numbered_shards(tmp_path):
    put(tmp_path, {"0.tar": tar_of({"a.png": png(1), "a.cls": b"1"}), "classes.txt": b"cat\ndog\nfox\n"})
    assert list_webdataset(tmp_path, "train").classes == ["cat", "dog", "fox"]
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=r"a label is 1, but .*classes.txt names 1 classes"):
        list_webdataset(tmp_path, "train")


def test_classes_txt_comes_before_the_names_in_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", [1, 2], [1, 0], ["tench, Tinca tinca", "goldfish"])
    (tmp_path / "classes.txt").write_text("n01440764\nn01443537\n")
    assert list_parquet(tmp_path, "train").classes == ["n01440764", "n01443537"]


def test_parquet_names_its_classes_and_other_files_are_refused(tmp_path):
    write_parquet(tmp_path / "p/a.parquet", [1, 2], [1, 0], ["cat", "dog"])
    assert list_parquet(tmp_path / "p", "train").classes == ["cat", "dog"]
    assert list_parquet(tmp_path / "p/a.parquet", "train").labels == [1, 0]
    write_parquet(tmp_path / "q/a.parquet", [1], [-1])
    with pytest.raises(ValueError, match=r"row 0 of group 0 has the label -1, expected a class number"):
        list_parquet(tmp_path / "q", "train")
    put(tmp_path / "r", {"a.parquet": b"not parquet"})
    with pytest.raises(ValueError, match=r"is not a Parquet file"):
        list_parquet(tmp_path / "r", "train")
    (tmp_path / "s").mkdir()
    pq.write_table(pa.table({"image": ["x"], "label": [0]}), tmp_path / "s/a.parquet")
    with pytest.raises(
        ValueError, match=r"no column of images .bytes, or a struct with bytes.*image .string., label .int64"
    ):
        list_parquet(tmp_path / "s", "train")


def test_a_null_image_in_parquet_is_a_bad_image(tmp_path):
    image = pa.array([{"bytes": None}], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"image": image, "label": pa.array([0])}), tmp_path / "a.parquet")
    with pytest.raises(BadImage, match=r"no image bytes"):
        ImageOpener({"train": str(tmp_path)}, {})(Row("k", "train", "train@0.0:a.parquet", None, 0, "a"))


def test_a_tar_that_is_not_ilsvrcs_is_refused(tmp_path):
    flat = tar_of({"n00000001.tar": b""})
    put(tmp_path, {"other.tar": tar_of({"cats.tar": b""}), "html.tar": b"<html>" * 200, "flat.tar": flat})
    with pytest.raises(
        ValueError, match=r"is not ILSVRC2012_img_train\.tar: expected n########\.tar per class, found 'cats"
    ):
        list_ilsvrc_train(tmp_path / "other.tar")
    with pytest.raises(BadTar, match=r"is not a tar"):
        list_ilsvrc_train(tmp_path / "html.tar")
    with pytest.raises(BadTar, match=r"inner n00000001.tar ends without its end mark"):
        list_ilsvrc_train(tmp_path / "flat.tar")
    put(tmp_path, {"val.tar": tar_of({"x.JPEG": b"x"})})
    with pytest.raises(
        FileNotFoundError, match=r"no classes of the validation images beside .*val.tar: put LOC_val_solution"
    ):
        list_ilsvrc_validation(tmp_path / "val.tar", lambda path, names: None)


@pytest.mark.parametrize("lister", [list_folder, list_webdataset, list_parquet])
def test_a_missing_or_empty_root_gets_a_sentence(tmp_path, lister):
    with pytest.raises(FileNotFoundError, match=r"data\.train .*nowhere is missing: expected"):
        lister(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"data\.train .* holds no"):
        lister(tmp_path, "train")


def test_the_1000_synsets_are_sorted_and_unique():
    assert len(set(IMAGENET_SYNSETS)) == 1000
    assert list(IMAGENET_SYNSETS) == sorted(IMAGENET_SYNSETS)
    assert [IMAGENET_SYNSETS[place] for place in (0, 207, 999)] == ["n01440764", "n02099601", "n15075141"]


def test_other_classes_than_imagenets_are_shown_with_the_first_differences():
    check_imagenet_classes(IMAGENET_SYNSETS, where="here")
    wrong = sorted([*IMAGENET_SYNSETS[:500], "n99999999", *IMAGENET_SYNSETS[501:]])
    with pytest.raises(ValueError) as caught:
        check_imagenet_classes(wrong, where="data.train /data")
    assert IMAGENET_SYNSETS[500] in str(caught.value) and "n99999999" in str(caught.value)
    assert f"class 500 is {IMAGENET_SYNSETS[501]} where the standard order has {IMAGENET_SYNSETS[500]}" in str(caught.value)
    with pytest.raises(ValueError, match=r"set data.classes to any"):
        check_imagenet_classes(IMAGENET_SYNSETS[::-1], where="here")
