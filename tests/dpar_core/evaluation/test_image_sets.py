"""Sets of images: every wrong array has its sentence, folders of any format are used whole, formats are named."""

import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from dpar_core.evaluation.arrays import open_npz
from dpar_core.evaluation.image_sets import read_image_set, repeats, shape_of
from dpar_core.evaluation.protocol import ScoreError
from dpar_core.files import digest_of


def pictures(count=3, height=8, width=8):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


U8, F32 = pictures(), pictures().astype(np.float32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": U8}, r"has no arr_0 \(it holds images\)"),
        ({}, "is a zip archive without NumPy arrays: unpack pictures and give their folder"),
        ({"arr_0": F32 / 255}, r"arr_0 is float32 .* expected images .*clip\(255 \* x"),
        ({"arr_0": F32.astype(np.float64) / 127.5 - 1}, r"arr_0 is float64 .*127.5 \* x \+ 128"),
        ({"arr_0": U8.astype(np.int64)}, "arr_0 is int64 .*cast integers"),
        ({"arr_0": U8.transpose(0, 3, 1, 2)}, r"channels stand second: use arr_0.transpose\(0, 2, 3, 1\)"),
        ({"arr_0": U8[..., :1]}, "grey images"),
        ({"arr_0": U8[..., 0]}, "grey images"),
        ({"arr_0": np.dstack([U8[0], U8[0, ..., :1]])[None]}, "four channels, probably with alpha"),
        ({"arr_0": U8[0]}, "one image: a set has several"),
        ({"arr_0": np.uint8(3)}, "not a set of images"),
        ({"arr_0": np.arange(70), "arr_1": U8}, r"arr_0 is int64 \(70,\).*; this is not a set of images"),
        ({"arr_0": U8, "arr_1": U8[:1]}, "holds images in arr_0 and in arr_1, as numpy.savez stores a list of batches"),
        ({"arr_0": U8[:, :0]}, "has no pixels"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "pickled objects, which are never read"),
        ({"arr_0": np.zeros(3, "S4")}, r"arr_0 is \|S4"),
    ],
)
def test_arrays_that_are_not_images_get_a_sentence(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    for read in (read_image_set, shape_of):
        with pytest.raises(ScoreError, match=words) as caught:
            read(tmp_path / "x.npz")
        assert "\n" not in str(caught.value)


def lying_npz(path, shape, content, *, compression=zipfile.ZIP_STORED):
    """Write an npz whose header claims `shape` uint8, whatever it holds."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + content)


def test_a_header_that_claims_more_than_there_is_asks_for_no_memory(tmp_path):
    path = tmp_path / "x.npz"
    lying_npz(path, (1_000_000, 256, 256, 3), bytes(1000))  # 196 GB
    with pytest.raises(ScoreError, match=r"claims uint8 .*196,608,000,000 bytes, but holds 1,000"):
        read_image_set(path)
    lying_npz(path, (10, 10, 10, 3), bytes(4000))
    with pytest.raises(ScoreError, match="3,000 bytes, but holds 4,000"):
        read_image_set(path)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("dpar_core.evaluation.arrays.BOMB_BYTES", 1 << 16)
    lying_npz(tmp_path / "x.npz", (1000, 10, 10, 3), bytes(300_000), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ScoreError, match="a decompression bomb"):
        shape_of(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "is a Git LFS pointer: fetch the real file",
        ),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "is an XML document"),
        (b'{"error": "not found"}', "is JSON text, expected an npz"),
        (b"nothing", "is a text file, expected an npz"),
        (b"\x80\x04\x95abc", "is a pickle, which is never read"),
        (b"\x1f\x8b\x08\x00abc", "is compressed with gzip"),
        (b"PK\x03\x04 cut off", "damaged or cut short"),
        (bytes(600), "holds zeros only"),
    ],
)
def test_files_that_are_not_an_npz_are_named_for_what_they_are(tmp_path, content, words):
    (tmp_path / "x.npz").write_bytes(content)
    for read in (read_image_set, shape_of):
        with pytest.raises(ScoreError, match=words):
            read(tmp_path / "x.npz")


def test_a_bare_array_says_how_to_store_it(tmp_path):
    np.save(tmp_path / "x.npy", U8)
    with pytest.raises(ScoreError, match=r"is a bare NumPy array \(.npy\): store it as an npz with numpy.savez"):
        read_image_set(tmp_path / "x.npy")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_bits_of_an_npz_never_pass_and_never_raise_anything_else(tmp_path, save):
    images = pictures(3, 4, 4)
    save(tmp_path / "x.npz", arr_0=images)
    whole = (tmp_path / "x.npz").read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "y.npz").write_bytes(damaged)
        try:
            found = read_image_set(tmp_path / "y.npz").images
        except ScoreError:
            continue
        np.testing.assert_array_equal(found, images)  # a bit that means nothing, as one of the date


def test_arrays_in_another_order_or_byte_order_are_read_as_numpy_does(tmp_path):
    values = np.arange(24, dtype=">f8").reshape(2, 3, 4)
    np.savez(tmp_path / "x.npz", arr_0=np.asfortranarray(U8), a=values, b=np.asfortranarray(values), none=np.zeros((0, 3)))
    np.testing.assert_array_equal(read_image_set(tmp_path / "x.npz").images, U8)
    with open_npz(tmp_path / "x.npz") as content:
        for name in ("a", "b"):
            np.testing.assert_array_equal(content.array(name), values)
        assert content.array("none").shape == (0, 3)


def test_a_folder_of_mixed_formats_is_used_whole_and_names_them(tmp_path):
    for number, image in enumerate(pictures(4)):
        Image.fromarray(image).save(tmp_path / f"{number}.{'png' if number < 3 else 'jpg'}")
    (tmp_path / "labels.txt").write_text("0 1 2 3")
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7")  # of macOS
    found = read_image_set(tmp_path)
    assert len(found.images) == 4 and shape_of(tmp_path) == (4, 8, 8)
    assert found.formats == ("JPEG quality 75, 4:2:0", "lossless") and found.left_out == ("labels.txt",)
    assert (
        len(found.notes) == 2 and "JPEG quality 75, 4:2:0 and lossless" in found.notes[0] and "labels.txt" in found.notes[1]
    )


def test_pictures_go_through_the_projects_one_decoder_and_what_it_did_is_named(tmp_path):
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    (tmp_path / "grey").mkdir()
    Image.fromarray(grey).save(tmp_path / "grey" / "a.png")
    found = read_image_set(tmp_path / "grey")
    np.testing.assert_array_equal(found.images[0, ..., 0], grey >> 8)
    assert found.formats == ("lossless, 16 bits cut to 8",)
    (tmp_path / "clear").mkdir()
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 0] = 200  # a colour that nobody sees
    Image.fromarray(hidden).save(tmp_path / "clear" / "a.png")
    found = read_image_set(tmp_path / "clear")
    assert (found.images == 255).all()
    assert found.formats == ("lossless, alpha over white",)


@pytest.mark.parametrize(
    ("ending", "mode", "options", "expected"),
    [
        ("png", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}, "lossless, first frame"),
        ("gif", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}, "GIF, first frame"),
        ("jpg", "RGB", {"quality": 75}, "JPEG quality 75, 4:2:0"),
        ("jpg", "RGB", {"quality": 95, "subsampling": 0}, "JPEG quality 95, 4:4:4"),
        ("jpg", "RGB", {"quality": 95, "subsampling": 1, "progressive": True}, "JPEG quality 95, 4:2:2"),
        ("jpg", "L", {"quality": 90}, "JPEG quality 90"),
        ("jpg", "RGB", {"qtables": [[7] * 64]}, "JPEG with tables {}, 4:2:0"),
        ("jpg", "CMYK", {}, "JPEG quality 75, 4:4:4, CMYK converted"),
        ("webp", "RGB", {"quality": 80}, "WEBP lossy"),
        ("webp", "RGB", {"lossless": True}, "lossless"),
        (
            "webp",
            "RGB",
            {"lossless": True, "save_all": True, "append_images": [Image.new("RGB", (8, 8))]},
            "lossless, first frame",
        ),
        ("tif", "RGB", {"compression": "jpeg"}, "TIFF jpeg"),
        ("tif", "RGB", {}, "TIFF raw"),
        ("png", "P", {}, "lossless"),
    ],
)
def test_what_a_file_holds_beside_the_pixels_that_are_scored_is_named(tmp_path, ending, mode, options, expected):
    for number, image in enumerate(U8[:2]):
        Image.fromarray(image).convert(mode).save(tmp_path / f"{number}.{ending}", **options)
    found = read_image_set(tmp_path)
    assert found.formats == (expected.format(digest_of([[7] * 64])[:8]),) and len(found.images) == 2


def test_images_from_0_to_1_or_from_minus_1_to_1_in_whole_numbers_are_refused(tmp_path):
    ones = (U8 > 127).astype(np.uint8)
    signed = np.clip(np.rint(U8 / 100.0 - 1.3), -1, 1).astype(np.int8).astype(np.uint8)  # -1 becomes 255
    assert set(np.unique(signed)) == {0, 1, 255}
    np.savez(tmp_path / "x.npz", arr_0=ones)
    np.savez(tmp_path / "y.npz", arr_0=signed)
    (tmp_path / "folder").mkdir()
    Image.fromarray(ones[0]).save(tmp_path / "folder" / "a.png")
    for path in (tmp_path / "x.npz", tmp_path / "y.npz", tmp_path / "folder"):
        with pytest.raises(ScoreError, match=rf"{path} holds no value from 2 to 254, .*scale them to 0..255 first"):
            read_image_set(path)
    for factor in (2, 255):  # dark ones, and pictures in black and white
        np.savez(tmp_path / "x.npz", arr_0=ones * factor)
        assert read_image_set(tmp_path / "x.npz").images.max() == factor


def test_images_that_repeat_are_counted():
    assert repeats(U8) == 0
    assert repeats(np.concatenate([U8, U8[1:], U8[1:2]])) == 3


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    Image.fromarray(U8[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("<html>not found</html>")
    with pytest.raises(ScoreError, match=r"b\.png is an HTML page"):
        read_image_set(tmp_path)
    (tmp_path / "b.png").write_bytes(struct.pack("<I", 7))
    with pytest.raises(ScoreError, match=r"b\.png cannot be used"):
        read_image_set(tmp_path)
    (tmp_path / "c.eps").write_text("%!PS-Adobe")  # never opened: it would start Ghostscript
    (tmp_path / "b.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(ScoreError, match=r"b\.png cannot be used"):
        read_image_set(tmp_path)
