"""Image files to pixels and crops; each fast form against a slow, obvious one."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpar_core.data import images
from dpar_core.data.images import (
    CENTER_VIEWS,
    VIEW_COUNTS,
    BadImage,
    center_crop,
    decode_image,
    looks_like_image,
    read_image,
    ten_crop,
    views,
)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with a little noise: (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / (5 + c) + c) * np.cos(y / (7 - c)) for c in range(3)]
    return (np.stack(waves, -1) + np.random.default_rng(seed).normal(0, 5, (height, width, 3))).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_an_rgb_file_comes_out_as_it_is():
    pixels = picture(20, 30)
    assert np.array_equal(decode_image(encoded(Image.fromarray(pixels))), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = picture(12, 20)
    # How a camera that was held so stores the picture: the inverse of what the tag says to do.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif))
    assert np.array_equal(found, upright)


def test_grey_becomes_three_equal_channels():
    grey = picture(8, 9)[:, :, 0]
    found = decode_image(encoded(Image.fromarray(grey)))
    assert all(np.array_equal(found[:, :, channel], grey) for channel in range(3))


def test_sixteen_bits_are_scaled_to_eight():
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    found = decode_image(encoded(Image.fromarray(levels)))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_palette_gives_its_colours():
    pixels = picture(16, 16)
    palette = Image.fromarray(pixels).quantize(16)
    assert np.array_equal(decode_image(encoded(palette)), np.asarray(palette.convert("RGB")))


def test_what_is_transparent_becomes_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 10, 10, 255)
    pixels[0, 1] = (0, 0, 0, 128)
    found = decode_image(encoded(Image.fromarray(pixels)))
    assert found[0, 0].tolist() == [200, 10, 10]
    assert abs(int(found[0, 1, 0]) - 127) <= 1
    assert found[1].min() == 255


def test_a_transparent_palette_entry_and_a_transparent_colour_become_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert decode_image(encoded(palette, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    colour = Image.new("RGB", (2, 1), (1, 2, 3))
    colour.putpixel((1, 0), (9, 9, 9))
    assert decode_image(encoded(colour, transparency=(9, 9, 9))).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def png_of_16_bits(pixels: np.ndarray, clear: tuple[int, ...]) -> bytes:
    """pixels: (height, width) or (height, width, 3) uint16; clear: the transparent value or colour."""
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = {b"IHDR": header, b"tRNS": struct.pack(f">{len(clear)}H", *clear), b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks.items())


def test_a_transparent_grey_or_colour_of_sixteen_bits_becomes_white():
    grey = np.array([[1000, 1001, 65535, 0]], np.uint16)
    assert decode_image(png_of_16_bits(grey, (1001,)))[0, :, 1].tolist() == [3, 255, 255, 0]
    colours = np.array([[(0x1234, 0x2345, 0x3456), (0x1234, 0x2345, 0x3457)]], np.uint16)
    found = decode_image(png_of_16_bits(colours, (0x1234, 0x2345, 0x3456)))
    assert found.tolist() == [[[255, 255, 255], [0x12, 0x23, 0x34]]]


def test_sixteen_bits_give_the_same_grey_whether_stored_as_grey_or_colour():
    levels = np.arange(0, 65536, 97, dtype=np.uint16)[None]
    grey = decode_image(encoded(Image.fromarray(levels)))
    colour = decode_image(png_of_16_bits(np.stack([levels] * 3, -1), (1, 2, 3)))
    assert np.array_equal(grey, colour) and np.array_equal(grey[0, :, 0], levels[0] // 256)


def test_cmyk_comes_out_in_its_colours():
    red = Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK")
    found = decode_image(encoded(red, "JPEG", quality=100))
    assert np.abs(found.astype(int) - (220, 30, 40)).max() < 6


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGBA")] + [(mode, "TIFF") for mode in ("F", "CMYK")],
)
def test_every_colour_mode_gives_rgb(mode, kind):
    found = decode_image(encoded(Image.fromarray(picture(10, 12)).convert(mode), kind))
    assert found.shape == (10, 12, 3) and found.dtype == np.uint8


def test_float_pixels_are_read_by_their_range_and_integers_without_one_refused():
    for scale in (1.0, 1 / 255):
        levels = np.array([[0, 64, 255]], np.float32) * np.float32(scale)
        assert decode_image(encoded(Image.fromarray(levels), "TIFF"))[0, :, 0].tolist() == [0, 64, 255]
    for wrong in (-0.5, 300.0, np.nan):
        with pytest.raises(BadImage, match=r"float pixels .* expected 0\.\.1 or 0\.\.255"):
            decode_image(encoded(Image.fromarray(np.array([[0, wrong]], np.float32)), "TIFF"))
    with pytest.raises(BadImage, match="integer pixels of 32 bits"):
        decode_image(encoded(Image.fromarray(np.array([[3, 200]], np.int32)), "TIFF"))


def png_of_bits(bits: int, row: bytes, clear: int) -> bytes:
    """A grey PNG of one row with a transparent grey, of which Pillow writes no other than 8 and 16 bits."""
    head = struct.pack(">IIBBBBB", 8 * len(row) // bits, 1, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"tRNS", struct.pack(">H", clear)), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def tiff_of(bits: int, content: bytes, *, zero_is_white: bool = False, signed: bool = False) -> bytes:
    """A grey TIFF of one row of two pixels, of kinds that Pillow reads and does not write."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: int(not zero_is_white), 273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: 1}
    tags |= {279: len(content), 339: 2 if signed else 1}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + content


def test_a_transparent_grey_of_two_or_four_bits_becomes_white():
    assert decode_image(png_of_bits(2, b"\x1b", clear=1))[0, :, 0].tolist() == [0, 255, 170, 255]
    assert decode_image(png_of_bits(4, b"\x3c", clear=3))[0, :, 0].tolist() == [255, 204]


def test_grey_tiffs_of_over_eight_bits_are_scaled_by_their_bits_whichever_end_is_white():
    assert decode_image(tiff_of(12, b"\xff\xf8\x00"))[0, :, 0].tolist() == [255, 128]
    wide = struct.pack("<HH", 0x0000, 0x8000)
    assert decode_image(tiff_of(16, wide))[0, :, 0].tolist() == [0, 128]
    assert decode_image(tiff_of(16, wide, zero_is_white=True))[0, :, 0].tolist() == [255, 127]
    assert decode_image(tiff_of(8, b"\0\x80", zero_is_white=True))[0, :, 0].tolist() == [255, 127]
    for bits in (8, 16):
        with pytest.raises(BadImage, match="signed integer pixels"):
            decode_image(tiff_of(bits, b"\0" * (bits // 4), signed=True))


def tiff(pixels: np.ndarray, *, photometric: int, planes: bool = False) -> bytes:
    """Write the simplest TIFF: (h, w) or (h, w, 3) of little-endian numbers, in planes of their own or pixel by pixel."""
    height, width, samples = *pixels.shape[:2], pixels.shape[2] if pixels.ndim == 3 else 1
    data = np.moveaxis(pixels, 2, 0).tobytes() if planes else pixels.tobytes()
    strips, end = samples if planes else 1, 8 + len(data)
    more = end + 2 + 12 * 11 + 4
    lists = [[8 * pixels.dtype.itemsize] * samples, [8 + n * len(data) // strips for n in range(strips)]]
    lists += [[len(data) // strips] * strips]
    tags = {256: width, 257: height, 259: 1, 262: photometric, 277: samples, 278: height, 284: 2 if planes else 1}
    entries = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()}
    entries[339] = struct.pack("<HHII", 339, 4, 1, 3 if pixels.dtype.kind == "f" else 1)
    tail = b""
    for tag, values in zip((258, 273, 279), lists):
        place = values[0] if len(values) == 1 else more + len(tail)
        entries[tag] = struct.pack("<HHII", tag, 4, len(values), place)
        tail += struct.pack(f"<{len(values)}I", *values) if len(values) > 1 else b""
    head = b"II*\0" + struct.pack("<I", end) + data + struct.pack("<H", len(entries))
    return head + b"".join(entries[tag] for tag in sorted(entries)) + b"\0\0\0\0" + tail


def test_channels_of_sixteen_bits_in_planes_are_refused_as_pillow_reads_single_bytes_of_them():
    pixels = picture(12, 16)
    assert np.array_equal(decode_image(tiff(pixels, photometric=2, planes=True)), pixels)
    wide = pixels.astype("<u2") * 257
    assert np.array_equal(decode_image(tiff(wide, photometric=2)), pixels)
    with pytest.raises(BadImage, match="channels of 16 bits in planes of their own"):
        decode_image(tiff(wide, photometric=2, planes=True))


def test_a_colour_table_of_eight_bits_in_a_tiff_is_refused_as_its_image_would_be_black():
    content = encoded(Image.fromarray(picture(12, 16)).quantize(4), "TIFF")
    colours = Image.open(io.BytesIO(content)).tag_v2[320]
    wide, narrow = (struct.pack(f"<{len(colours)}H", *(one >> bits for one in colours)) for bits in (0, 8))
    assert wide in content and decode_image(content).max() > 100
    with pytest.raises(BadImage, match="a colour table of 8 bits"):
        decode_image(content.replace(wide, narrow))
    assert not decode_image(content.replace(wide, bytes(len(wide)))).any()  # a black image is no mistake


def test_float_grey_is_read_whichever_end_is_white():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for stored, photometric in ((grey, 1), (255 - grey, 0)):
        for scale in (1, 255):
            content = tiff((stored / scale).astype("<f4"), photometric=photometric)
            assert np.array_equal(decode_image(content)[..., 0], grey)


def test_a_format_that_this_pillow_lacks_keeps_no_other_from_being_read(monkeypatch):
    images.readable_formats.cache_clear()
    monkeypatch.setattr(images, "FORMATS", ("NO_SUCH_FORMAT", *images.FORMATS))
    try:
        assert decode_image(encoded(Image.new("RGB", (2, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]] * 2]
    finally:
        images.readable_formats.cache_clear()


def test_postscript_starts_no_program_whatever_its_name(tmp_path, monkeypatch):
    def refuse(*words, **options):
        raise AssertionError(f"started {words}")

    monkeypatch.setattr("subprocess.Popen", refuse)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(content)).format == "EPS"  # Pillow alone takes it, and Ghostscript would draw it
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BadImage, match="not an image"):
        read_image(tmp_path / "x.png")


def test_a_file_is_read_by_its_content_and_what_is_none_is_a_bad_image(tmp_path):
    pixels = picture(6, 5)
    (tmp_path / "jpeg named so.jpg").write_bytes(encoded(Image.fromarray(pixels)))
    assert np.array_equal(read_image(tmp_path / "jpeg named so.jpg"), pixels)
    (tmp_path / "pointer.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    for name, words in (
        ("pointer.png", "Git LFS"),
        ("gone.png", "cannot be read: No such file"),
        (".", "not a file|directory"),
    ):
        with pytest.raises(BadImage, match=words):
            read_image(tmp_path / name)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"\xff\xd8\xff\xe0", "^damaged"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "^HEIC, a format that is not read here"),
        (encoded(Image.fromarray(picture(40, 40)), "JPEG")[:500], "damaged|not an image"),
        (encoded(Image.fromarray(picture(40, 40)))[:-500], "damaged"),
        (bomb(30_000, 30_000), "more than|too large"),
        (bomb(10_000, 10_000), "more than"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
    ],
    ids=["empty", "html", "four bytes", "heic", "cut jpeg", "cut png", "huge bomb", "bomb", "postscript"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_holds_no_usable_image_is_a_bad_image(content, reason):
    with pytest.raises(BadImage, match=reason):
        decode_image(content)


@settings(max_examples=150)
@given(
    place=st.integers(0, 10**9),
    value=st.integers(0, 255),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
)
def test_any_damage_gives_pixels_or_a_bad_image(place, value, kind):
    content = bytearray(encoded(Image.fromarray(picture(17, 13)), kind))
    content[place % len(content)] = value
    cut = content[: len(content) - place % 7 * len(content) // 10]
    for damaged in (bytes(content), bytes(cut)):
        try:
            assert decode_image(damaged).dtype == np.uint8
        except BadImage as error:
            assert str(error)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "AVIF"])
def test_the_first_bytes_tell_an_image(kind):
    assert looks_like_image(encoded(Image.fromarray(picture(20, 20)), kind)[:16])
    assert not looks_like_image(b"hello, this is a text")


def slow_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's crop in its own words: halve by averaging 2 x 2, one bicubic resize, cut the middle."""
    picture = Image.fromarray(image)
    while min(picture.width, picture.height) >= 2 * size:
        width, height = picture.width // 2, picture.height // 2
        picture = picture.resize((width, height), Image.Resampling.BOX)
    factor = size / min(picture.width, picture.height)
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


@settings(max_examples=60)
@given(height=st.integers(1, 150), width=st.integers(1, 150), size=st.sampled_from([1, 8, 16, 17, 32]))
def test_the_centre_crop_is_adms(height, width, size):
    image = picture(height, width)
    found = center_crop(image, size)
    assert found.shape == (size, size, 3)
    assert np.array_equal(found, slow_center_crop(image, size))


def test_halving_averages_blocks_of_four():
    image = picture(64, 64)
    mean = image.reshape(16, 4, 16, 4, 3).astype(float).mean((1, 3))
    assert np.abs(center_crop(image, 16).astype(float) - mean).max() <= 2  # each halving rounds rows, then columns: 4 x 0.5


@pytest.mark.parametrize(("size", "ratio", "side"), [(256, 1.1, 281), (256, 1.05, 268), (384, 1.1, 422), (384, 1.05, 403)])
def test_ten_crops_are_those_of_torchvision(size, ratio, side):
    """torchvision.transforms.TenCrop in its own words: five crops of the picture, then five of the mirrored picture."""
    image = picture(430, 470)
    square = Image.fromarray(slow_center_crop(image, side))

    def five_crop(whole: Image.Image) -> list[Image.Image]:
        middle = round((side - size) / 2.0)
        return [
            whole.crop((0, 0, size, size)),
            whole.crop((side - size, 0, side, size)),
            whole.crop((0, side - size, size, side)),
            whole.crop((side - size, side - size, side, side)),
            whole.crop((middle, middle, middle + size, middle + size)),
        ]

    expected = five_crop(square) + five_crop(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    found = ten_crop(image, size, ratio)
    assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(found, expected, strict=True))
    for corner, mirror in ((0, 6), (1, 5), (2, 8), (3, 7)):
        assert np.array_equal(found[corner], found[mirror][:, ::-1])


@pytest.mark.parametrize("name", VIEW_COUNTS)
def test_views_are_as_many_as_stated(name):
    image = picture(70, 50)
    found = views(image, 32, name)
    assert found.shape == (VIEW_COUNTS[name], 32, 32, 3) and found.dtype == np.uint8
    if name == "adm_center_flip":
        assert np.array_equal(found[0][:, ::-1], found[1])


@pytest.mark.parametrize("name", VIEW_COUNTS)
def test_the_centre_view_is_the_middle_of_the_square_and_not_mirrored(name):
    image = picture(70, 50)
    ratio = {"adm_center_flip": 1.0, "ten_crop_1.05": 1.05}.get(name, 1.1)
    square = center_crop(image, int(ratio * 32))
    first = round((len(square) - 32) / 2)
    assert np.array_equal(views(image, 32, name)[CENTER_VIEWS[name]], square[first : first + 32, first : first + 32])


def test_twenty_views_are_the_two_ten_crops():
    image = picture(70, 50)
    both = views(image, 32, "ten_crop_both")
    assert np.array_equal(both[:10], views(image, 32, "ten_crop_1.1"))
    assert np.array_equal(both[10:], views(image, 32, "ten_crop_1.05"))


def test_an_unknown_view_is_refused():
    with pytest.raises(ValueError, match="views must be one of adm_center_flip"):
        views(picture(40, 40), 32, "nine_crop")


def test_a_hair_wide_image_is_refused_instead_of_enlarged_without_end():
    with pytest.raises(BadImage, match="too narrow"):
        center_crop(np.zeros((40_000, 1, 3), np.uint8), 256)
