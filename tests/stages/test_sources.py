"""What a run reads from outside is looked at on every run, and a change of it is never taken in silence."""

import os
import shutil

import pytest

from dpar_core.data import fingerprint as module
from dpar_core.data.fingerprint import KnownDigests, fingerprint
from dpar_core.data.manifest import read_manifest
from dpar_core.data.sources import SourceChanged
from dpar_core.files import read_record
from stages import sources
from stages.data import ManifestOpener
from tests.helpers.tiny_data import make_project, photo, put_images, tiny_params


def look(root, params=None, **values):
    """Run the stage; return what it wrote of images, weights and scoring, as bytes."""
    chosen = {"weights": None, "reference": "train", "features_file": None, **values}
    outputs = sources.Outputs(*(root / "seen" / f"{name}.json" for name in ("images", "weights", "scoring")))
    data = (params or tiny_params(root / "images")).data
    sources.run(
        sources.Params(data, **chosen), sources.Inputs(), outputs, None, device="cpu", work=root / "work" / "sources"
    )
    return [path.read_bytes() for path in vars(outputs).values()]


def edit(path, content: bytes) -> None:
    """Replace a file's content in place and set its time back."""
    before = path.stat()
    with open(path, "r+b") as stream:
        stream.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_images_replaced_under_the_same_names_are_seen_and_refused_where_the_old_list_is_used(tmp_path):
    project = make_project(tmp_path)
    before, manifest = look(tmp_path), read_manifest(tmp_path / "manifest.parquet")
    assert look(tmp_path) == before
    image = tmp_path / "images" / "train" / "a" / "000.png"
    content = bytearray(image.read_bytes())
    content[-20] ^= 1  # same size, same time, another pixel or checksum
    edit(image, bytes(content))
    after = look(tmp_path)
    assert after[0] != before[0] and after[1:] == before[1:]
    row = next(row for row in manifest.rows if row.source == "train:a/000.png")
    with pytest.raises(
        SourceChanged, match=r"image train:a/000\.png has changed since the manifest was made .* run `dpar-cli run`"
    ):
        ManifestOpener(manifest)(row)
    with pytest.raises(SourceChanged):
        project.tokenize()
    assert read_manifest(project.data().root / "manifest.parquet").digest != manifest.digest


def test_new_times_list_again_and_give_the_same_manifest_bytes(tmp_path):
    project = make_project(tmp_path)
    before, manifest = look(tmp_path), (tmp_path / "manifest.parquet").read_bytes()
    for path in (tmp_path / "images").rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert look(tmp_path)[0] != before[0]
    assert (project.data().root / "manifest.parquet").read_bytes() == manifest


def test_a_data_set_that_moved_has_the_same_digest(tmp_path):
    digest = read_manifest(make_project(tmp_path / "p").root / "manifest.parquet").digest
    shutil.copytree(tmp_path / "p" / "images", tmp_path / "elsewhere")
    moved = make_project(tmp_path / "q")
    moved.params = tiny_params(tmp_path / "elsewhere")
    assert read_manifest(moved.data().root / "manifest.parquet").digest == digest


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    read, digest = [], module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: read.append(path.name) or digest(path))
    for name in ("vq.pt", "inception.pt"):
        (tmp_path / name).write_bytes(name.encode())
    put_images(tmp_path / "images", train=2, validation=2)

    def seen():
        read.clear()
        values = {"weights": str(tmp_path / "vq.pt"), "features_file": str(tmp_path / "inception.pt")}
        return look(tmp_path, reference=str(tmp_path / "images" / "train"), **values)

    first = seen()
    assert sorted(read) == ["inception.pt", "vq.pt"]
    assert seen() == first and read == []
    edit(tmp_path / "vq.pt", b"vq.pT")
    second = seen()
    assert read == ["vq.pt"] and [a == b for a, b in zip(first, second)] == [True, False, True]
    (tmp_path / "work" / "sources" / "known.json").write_bytes(b"{")
    assert seen() == second and sorted(read) == ["inception.pt", "vq.pt"]
    shutil.copy(tmp_path / "images" / "validation" / "a" / "000.png", tmp_path / "images" / "train" / "a" / "000.png")
    assert [a == b for a, b in zip(second, seen())] == [False, True, False]


def test_a_file_that_changed_since_the_look_is_not_used(tmp_path):
    weights = tmp_path / "vq.pt"
    weights.write_bytes(b"one")
    put_images(tmp_path / "images", train=2, validation=2)
    look(tmp_path, weights=str(weights))
    record = tmp_path / "seen" / "weights.json"
    with sources.checked_file(record, "tokenizer.weights", weights) as found:
        assert found == read_record(record, way_out="")["tokenizer.weights"]["sha256"]
    with pytest.raises(ValueError, match=r"tokenizer\.weights .*vq\.pt changed while it was read"):
        with sources.checked_file(record, "tokenizer.weights", weights):
            edit(weights, b"six")
    edit(weights, b"one")
    edit(weights, b"two")
    with pytest.raises(
        ValueError, match=r"tokenizer\.weights .*vq\.pt has changed since stage sources looked .* `dpar-cli run`"
    ):
        sources.checked_file(record, "tokenizer.weights", weights).__enter__()
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.weights .* is missing"):
        sources.checked_file(record, "tokenizer.weights", weights).__enter__()
    look(tmp_path, weights=str(weights))
    assert read_record(record, way_out="")["tokenizer.weights"] == {"missing": True}
    weights.mkdir()
    look(tmp_path, weights=str(weights))
    with pytest.raises(ValueError, match=r"tokenizer\.weights .*vq\.pt is a folder: name the file itself"):
        sources.checked_file(record, "tokenizer.weights", weights).__enter__()


def test_trees_with_links_back_and_missing_folders_have_a_fingerprint(tmp_path):
    put_images(tmp_path / "images", train=4, validation=0)
    (tmp_path / "images" / "train" / "a" / "up").symlink_to("..", target_is_directory=True)
    (tmp_path / "images" / "train" / "a" / "nowhere.png").symlink_to("gone.png")
    (tmp_path / "images" / "train" / "itself").symlink_to("itself")
    found = fingerprint(tmp_path / "images" / "train")
    assert found["files"] >= 5 and found == fingerprint(tmp_path / "images" / "train")
    assert fingerprint(tmp_path / "nowhere" / "train")["files"] == 0
    (tmp_path / "val.tar").write_bytes(b"tar")
    one = fingerprint(tmp_path / "val.tar")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId")  # the classes lie beside the tar
    assert fingerprint(tmp_path / "val.tar") != one


def test_a_list_of_classes_above_the_validation_images_is_looked_at(tmp_path):
    put_images(tmp_path / "images", train=2, validation=2)
    before = look(tmp_path)
    listed = tmp_path / "LOC_val_solution.csv"
    listed.write_text("ImageId,PredictionString")
    after = look(tmp_path)
    edit(listed, b"imageId")
    assert len({before[0], after[0], look(tmp_path)[0]}) == 3


def test_the_built_in_photographs_are_named_by_content_so_that_machines_agree(tmp_path):
    first = look(tmp_path / "a", tiny_params())
    assert first == look(tmp_path / "b", tiny_params()) and b"astronaut" in first[0]


def test_a_damaged_memory_of_digests_is_made_again(tmp_path):
    (tmp_path / "file").write_bytes(photo(1).tobytes())
    (tmp_path / "known.json").write_text("[]")
    known = KnownDigests(tmp_path / "known.json")
    assert len(known.of(tmp_path / "file")) == 64
    known.save()
    assert KnownDigests(tmp_path / "known.json")._known


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.9])
def test_an_edited_manifest_is_refused(tmp_path, place):
    project = make_project(tmp_path)
    path = project.root / "manifest.parquet"
    content = bytearray(path.read_bytes())
    sound = read_manifest(path)
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)
    try:
        found = read_manifest(path)
    except ValueError as error:
        assert "dvc repro -sf data" in str(error) or "is not a manifest" in str(error)
    else:
        assert (found.digest, list(found.rows), found.notes) == (sound.digest, list(sound.rows), sound.notes)
