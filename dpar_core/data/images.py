"""Image files to RGB pixels, and the published crops (ADM's centre crop, LlamaGen's ten-crop).

Shapes: an image is (height, width, 3) uint8; views are (n, size, size, 3) uint8.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dpar_core.choices import ViewSet

MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # larger ones are refused as decompression bombs
VIEW_COUNTS: dict[ViewSet, int] = {"adm_center_flip": 2, "ten_crop_1.1": 10, "ten_crop_1.05": 10, "ten_crop_both": 20}
CENTER_VIEWS = {"adm_center_flip": 0, "ten_crop_1.1": 4, "ten_crop_1.05": 4, "ten_crop_both": 4}  # the first centre crop

# Formats of photographs. Others that Pillow knows hold no pixels of their own, or start programs (EPS).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
ENDINGS = frozenset(
    (".avif", ".bmp", ".dib", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_OTHER_FORMATS = {  # by their first bytes, in ISO media after a length of four bytes
    b"ftyphei": "HEIC",
    b"ftyphev": "HEIC",
    b"ftypmif": "HEIF",
    b"8BPS": "Photoshop",
    b"v/1\x01": "OpenEXR",
    b"\xff\x0a": "JPEG XL",
    b"JXL ": "JPEG XL",
    b"II\xbc\x01": "JPEG XR",
    b"%PDF": "PDF",
    b"<svg": "SVG",
}
LARGEST_FILE = 1 << 29  # bytes; a longer file is not a photograph


class BadImage(ValueError):
    """A file that holds no usable image; the message says why in a few words."""


def read_image(path: Path | str) -> np.ndarray:
    """Read an image file as `decode_image` does: (height, width, 3) uint8. Raises BadImage, also for a missing file."""
    return decode_image(read_file(path))


def read_file(path: Path | str) -> bytes:
    """Return the bytes of an image file. Raises BadImage for what is missing, unreadable, no plain file, or too long."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not make us wait
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a file")
            if status.st_size > LARGEST_FILE:
                raise BadImage(f"too large: {status.st_size:,} bytes")
            return stream.read()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None


def decode_image(content: bytes) -> np.ndarray:
    """Decode a file to RGB, the one way in which pixels come in here: for training, scoring and pictures alike.

    EXIF rotation is applied, other colour modes are converted, alpha is laid over white, of an animation the first frame
    is taken. Of 10 to 16 bits the upper eight are kept, grey and colour alike. Float pixels are read as 0..1 where none is
    larger than 1, else as 0..255; integers of 32 bits or with a sign have no such range and are refused.

    Safe to call from many threads. Returns (height, width, 3) uint8. Raises BadImage for anything that is not a whole
    image of at most MOST_PIXELS pixels in one of FORMATS.
    """
    if not content:
        raise BadImage("the file is empty")
    if content.startswith(b"version https://git-lfs"):
        raise BadImage("a Git LFS pointer: fetch the real file with `git lfs pull`")
    try:
        with Image.open(io.BytesIO(content), formats=readable_formats()) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
            if "transparency" in image.info and any(tile[3] == "RGB;16B" for tile in image.tile):
                return np.array(_to_rgb(_clear_16_bit_colour(image, content)))
            _scale_clear_grey(image)
            bits, zero_is_white = _grey_of_tiff(image) if image.format == "TIFF" else (16, False)
            image.load()
            return np.array(_to_rgb(ImageOps.exif_transpose(image), bits=bits, zero_is_white=zero_is_white))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(_unknown(content)) from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from None
    except Exception as error:  # Pillow's plug-ins raise anything on damaged files: struct.error, SyntaxError, KeyError ...
        raise BadImage(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


@cache
def readable_formats() -> tuple[str, ...]:
    """Load Pillow's readers once, and return those of FORMATS that this build of it knows."""
    # Our own error names the image. Once per process: changing filters while other threads decode crashed the interpreter.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def looks_like_image(head: bytes) -> bool:
    """Return whether a file that begins with `head` (16 bytes or more) is of a format that `decode_image` reads."""
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
    if head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    return head[4:12] in (b"ftypavif", b"ftypavis") or (head[:2] == b"BM" and head[6:10] == b"\0\0\0\0")


def _unknown(content: bytes) -> str:
    """Return what a file is whose pixels nobody here can read, in a few words."""
    head = content[:16]
    for start, name in _OTHER_FORMATS.items():
        if head.startswith(start) or head[4:].startswith(start):
            return f"{name}, a format that is not read here: store it as PNG or JPEG"
    if looks_like_image(head):
        return "damaged, or pixels of a kind that is not read here: store them as 8 or 16 bits per channel"
    return f"not an image (begins with {content[:8]!r})"


def _scale_clear_grey(image: Image.Image) -> None:
    """Scale the transparent grey of a PNG of 2 or 4 bits as Pillow scales its pixels, so that they can be compared."""
    tiles = getattr(image, "tile", None)  # of images read from files
    step = {"L;2": 85, "L;4": 17}.get(str(tiles[0].args)) if image.format == "PNG" and tiles else None
    if step and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= step


def _grey_of_tiff(image: Image.Image) -> tuple[int, bool]:
    """Return the bits of a TIFF's samples and whether 0 is white, both of which Pillow heeds up to eight bits alone.

    Raises BadImage for integers whose range nobody states, for planes of 16 bits, of which Pillow reads single bytes, and
    for colour tables that some old programs wrote with 8 bits.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, kinds = tags.get(258, (1,)), tags.get(339, (1,))
    if tags.get(284) == 2 and max(bits) > 8:
        raise BadImage(f"channels of {max(bits)} bits in planes of their own: store the channels of a pixel together")
    if image.mode == "I" and bits[0] == 32:
        raise BadImage("integer pixels of 32 bits, whose range nobody states: store 8 or 16 bits")
    if image.mode == "P" and 0 < max(tags.get(320, (0,))) < 256:
        raise BadImage("a colour table of 8 bits, where TIFF has 16: all pixels would be black")
    if 2 in kinds:
        raise BadImage("signed integer pixels, whose range nobody states: store 8 or 16 bits without a sign")
    return max(bits[0], 8), tags.get(262) == 0


def _clear_16_bit_colour(image: Image.Image, content: bytes) -> Image.Image:
    """Return a PNG with one transparent colour of 3 x 16 bits as RGBA: Pillow keeps 8 bits, too few to compare."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as low:
        # Read as if the bytes stood the other way round, what Pillow keeps are the lower eight bits.
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        halves = [np.asarray(ImageOps.exif_transpose(half)).astype(np.int64) for half in (image, low)]
    opaque = ((halves[0] << 8 | halves[1]) != image.info["transparency"]).any(axis=2)
    return Image.fromarray(np.dstack([halves[0], 255 * opaque]).astype(np.uint8))


def _to_rgb(image: Image.Image, *, bits: int = 16, zero_is_white: bool = False) -> Image.Image:
    """bits, zero_is_white: of grey pixels of more than eight bits, or in floating point."""
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not (values >= 0).all() or values.max() > 255:  # NaN is refused as well
            raise BadImage(f"float pixels from {values.min():g} to {values.max():g}, expected 0..1 or 0..255")
        light = (values * (255.0 if values.max() <= 1.0 else 1.0)).round()
        image = Image.fromarray((255 - light if zero_is_white else light).astype(np.uint8))
    elif image.mode == "I" or image.mode.startswith("I;16"):
        values, clear = np.asarray(image).astype(np.int64), image.info.get("transparency")
        grey = values.clip(0, 2**bits - 1) >> bits - 8
        image = Image.fromarray((255 - grey if zero_is_white else grey).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Crop as ADM does: halve with BOX while the short side is at least twice `size`, BICUBIC to size, cut the centre.

    image: (height, width, 3) uint8. Returns (size, size, 3) uint8. Raises BadImage for an image so narrow that it would
    have to be enlarged beyond MOST_PIXELS first.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    shape = (round(picture.width * scale), round(picture.height * scale))
    if shape[0] * shape[1] > MOST_PIXELS:
        raise BadImage(f"{image.shape[1]} x {image.shape[0]} pixels are too narrow for a square of {size}")
    array = np.asarray(picture.resize(shape, resample=Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def ten_crop(image: np.ndarray, size: int, ratio: float) -> np.ndarray:
    """Return the ten crops of the centre crop of side int(ratio * size), as LlamaGen takes them with torchvision's TenCrop.

    Top left, top right, bottom left, bottom right and centre, then the same five of the mirrored square. Returns
    (10, size, size, 3) uint8. So view 5 mirrors view 1; the mirrored centre lies one pixel beside the mirror of the
    centre where the margin is odd (1.1 at 256: 281 - 256 = 25).
    """
    large = int(ratio * size)
    square = center_crop(image, large)
    rest, middle = large - size, round((large - size) / 2)
    corners = [(0, 0), (0, rest), (rest, 0), (rest, rest), (middle, middle)]
    both = (square, square[:, ::-1])
    return np.stack([one[top : top + size, left : left + size] for one in both for top, left in corners])


def views(image: np.ndarray, size: int, name: str) -> np.ndarray:
    """Return the views of an image that a run is trained on: (VIEW_COUNTS[name], size, size, 3) uint8.

    name: "adm_center_flip" (centre crop and its mirror), "ten_crop_1.1", "ten_crop_1.05", or "ten_crop_both".
    Raises ValueError for another name.
    """
    if name == "adm_center_flip":
        crop = center_crop(image, size)
        return np.stack([crop, crop[:, ::-1]])
    if name == "ten_crop_both":
        return np.concatenate([ten_crop(image, size, 1.1), ten_crop(image, size, 1.05)])
    if name in VIEW_COUNTS:
        return ten_crop(image, size, float(name.removeprefix("ten_crop_")))
    raise ValueError(f"views must be one of {', '.join(VIEW_COUNTS)}; got {name!r}")
