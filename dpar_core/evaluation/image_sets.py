"""Sets of images to be scored: an npz with arr_0, or a folder of image files of any format.

Shapes: n images (n, height, width, 3) uint8.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dpar_core.data.folders import image_files
from dpar_core.data.images import BadImage, decode_image, read_file, readable_formats
from dpar_core.data.listing import is_litter
from dpar_core.data.splits import counted, first_few
from dpar_core.evaluation.arrays import Header, Npz, open_npz
from dpar_core.evaluation.protocol import ScoreError
from dpar_core.files import digest_of, sha256_file
from dpar_core.signatures import described, kind_of

EXPECTED = "expected images (n, height, width, 3) uint8 from 0 to 255"
LOSSLESS = "lossless"
_LOSSLESS_FORMATS = ("PNG", "BMP", "DIB", "PPM")  # others lose something, or may


class Shape(NamedTuple):
    """How many images a set has, and their height and width in pixels."""

    images: int
    height: int
    width: int


@dataclass(frozen=True)
class ImageSet:
    """Images, and notes on how they were read.

    images: (n, height, width, 3) uint8.
    formats: how pixels were stored, sorted: "lossless" for an npz, PNG, BMP, PPM and lossless WebP, else the format's name,
        for JPEG with its quality and subsampling (other formats do not state theirs); what decoding did to pixels stands
        behind a comma (alpha over white, 16 bits cut to 8). Other formats make another protocol.
    left_out: files that cannot be used as images.
    """

    images: np.ndarray
    formats: tuple[str, ...] = (LOSSLESS,)
    left_out: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Return sentences for people: formats other than lossless ones, and files that were left out."""
        notes = []
        if self.formats != (LOSSLESS,):
            notes.append(f"images are stored as {first_few(self.formats, 9, joined=' and ')}, which belongs to the protocol")
        if self.left_out:
            shown = first_few(self.left_out)
            verb = "was" if len(self.left_out) == 1 else "were"
            files = counted(len(self.left_out), "file")
            notes.append(
                f"{files} that cannot be used as {'an image' if verb == 'was' else 'images'} {verb} left out ({shown})"
            )
        return notes


def read_image_set(path: Path | str) -> ImageSet:
    """Read all images of an npz (`arr_0`) or a folder of image files.

    Raises FileNotFoundError, and ScoreError in one sentence for arrays of another shape or type, unreadable images, and
    images of several sizes or from 0 to 1. Nothing is cast, resized or left out without a word.
    """
    path = Path(path)
    if path.is_dir():
        found = _read_folder(path)
    else:
        with open_npz(path) as content:
            _images_header(content)
            found = ImageSet(content.array("arr_0", kinds="u"))
    if not any(((one > 1) & (one < 255)).any() for one in found.images) and (found.images == 1).any():
        raise ScoreError(
            f"{path} holds no value from 2 to 254, as images from 0 or -1 to 1 cast to uint8: scale them to 0..255 first"
        )
    return found


def repeats(images: np.ndarray) -> int:
    """Return how many images are the same as an earlier one, pixel by pixel: (n, height, width, 3) uint8."""
    return len(images) - len({hashlib.sha256(np.ascontiguousarray(one)).digest() for one in images})


def refuse_same(images: np.ndarray, where: Path | str) -> None:
    """Raise ScoreError for images of which no distance can be computed: fewer than two, or all the same."""
    if len(images) < 2:
        raise ScoreError(f"{where} holds {counted(len(images), 'image')}: a distance needs at least two")
    if (images == images[:1]).all():
        raise ScoreError(f"{where}: all {len(images)} images are the same, no distance can be computed from them")


def shape_of(path: Path) -> Shape:
    """Return the shape of a set from the header of an npz or the first image of a folder. Raises as `read_image_set`."""
    if path.is_dir():
        files, _ = _files(path)
        return Shape(len(files), *_decoded(files[0])[0].shape[:2])
    with open_npz(path) as content:
        return Shape(*_images_header(content).shape[:3])


def digest_of_images(path: Path) -> str:
    """Return the digest of a set by its content: 16 hex digits."""
    if path.is_dir():
        return digest_of([[file.name, sha256_file(file)] for file in _files(path)[0]])
    return sha256_file(path)[:16]


def _images_header(content: Npz) -> Header:
    """Return the header of arr_0, which holds images. Raises ScoreError with the way out."""
    path = content.path
    if not content.names:
        if any(name.endswith("/data.pkl") for name in content.archive.namelist()):
            raise ScoreError(
                f"{path} is a file of torch.save, which is never read: store it with numpy.savez(FILE, arr_0=X)"
            )
        raise ScoreError(f"{path} is a zip archive without NumPy arrays: unpack pictures and give their folder")
    if "arr_0" not in content:
        held = ", ".join(content.names)
        raise ScoreError(f"{path} has no arr_0 (it holds {held}): {EXPECTED} under that name")
    header = content.header("arr_0")
    shape, found = header.shape, f"{path}: arr_0 is {header}"
    if header.dtype != np.uint8 and shape[3:] == (3,):
        how = ": round and cast integers that are from 0 to 255 yourself" if header.dtype.kind in "iu" else ""
        if header.dtype.kind == "f":
            how = ": from [-1, 1] they are clip(127.5 * x + 128, 0, 255), from [0, 1] clip(255 * x + 0.5, 0, 255), as uint8"
        raise ScoreError(f"{found}, {EXPECTED}{how}")
    if shape[3:] == (3,):
        if 0 in shape[1:]:
            raise ScoreError(f"{found}, which has no pixels: {EXPECTED}")
        if more := [name for name in content.names if name != "arr_0" and _is_batch(content, name, shape)]:
            raise ScoreError(
                f"{path} holds images in arr_0 and in {first_few(more)}, as numpy.savez stores a list of batches: join them "
                "with numpy.concatenate"
            )
        return header
    if len(shape) == 4 and shape[1] in (1, 3, 4):
        how = "channels stand second: use arr_0.transpose(0, 2, 3, 1)"
    elif len(shape) == 4 and shape[3] == 4:
        how = "four channels, probably with alpha: lay the images over a background first"
    elif (len(shape) == 4 and shape[3] in (1, 2)) or (len(shape) == 3 and shape[2] != 3):
        how = "grey images: repeat the channel three times (numpy.repeat)"
    elif len(shape) == 3:
        how = "one image: a set has several"
    else:
        how = "this is not a set of images"
    raise ScoreError(f"{found}, {EXPECTED}; {how}")


def _is_batch(content: Npz, name: str, shape: tuple[int, ...]) -> bool:
    """Return whether an array holds images of the height and width of arr_0, whose shape is given."""
    try:
        return bool(re.fullmatch(r"arr_\d+", name)) and content.header(name).shape[1:] == shape[1:]
    except ScoreError:  # labels as objects, say: nobody reads them
        return False


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the image files below a folder, sorted, and what else is there. Raises ScoreError when there are none."""
    files, others = image_files(folder)
    others = [name for name in others if not is_litter(name.rsplit("/", 1)[-1])]
    if not files:
        raise ScoreError(f"{folder} holds no image files: expected one picture per file, or an npz with arr_0")
    return files, others


def _read_folder(folder: Path) -> ImageSet:
    files, others = _files(folder)
    first, _ = _decoded(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)
    formats: set[str] = set()
    for number, file in enumerate(files):
        image, content = _decoded(file)
        if image.shape != first.shape:
            (height, width), (other_height, other_width) = first.shape[:2], image.shape[:2]
            one, other = files[0].relative_to(folder), file.relative_to(folder)
            raise ScoreError(
                f"{folder} holds pictures of several sizes ({one} is {width} x {height}, {other} is {other_width} x "
                f"{other_height}): resize them to one"
            )
        images[number] = image
        formats.add(_format_of(content))
    return ImageSet(images, tuple(sorted(formats)), tuple(others))


def _decoded(file: Path) -> tuple[np.ndarray, bytes]:
    try:
        content = read_file(file)
        return decode_image(content), content
    except BadImage as error:
        kind = kind_of(file)
        problem = described(file, kind) if kind in ("html", "lfs", "xml", "empty") else None
        raise ScoreError(problem or f"{file} cannot be used ({error}): make it again or remove it") from None


def _format_of(content: bytes) -> str:
    """Return how an image that can be decoded is stored, and what decoding changes."""
    with Image.open(io.BytesIO(content), formats=readable_formats()) as image:
        stored = LOSSLESS if image.format in _LOSSLESS_FORMATS else str(image.format)
        if hasattr(image, "quantization"):
            stored += f" {_jpeg_quality(image)}"
        if image.format == "WEBP":
            stored = LOSSLESS if _webp_is_lossless(content) else "WEBP lossy"
        if image.format == "TIFF":  # a container: of pixels as they are, or of a JPEG
            stored += f" {image.info.get('compression', 'raw')}"
        if getattr(image, "n_frames", 1) > 1:
            stored += ", first frame"
        if image.mode == "CMYK":
            stored += ", CMYK converted"
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            stored += ", alpha over white"
        if image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in image.tile):
            stored += ", 16 bits cut to 8"
        elif image.mode == "F":
            stored += ", float rounded to 8 bits"
        if image.getexif().get(0x0112) in range(2, 9):
            stored += ", rotated as EXIF says"
    return stored


@cache
def _tables_of_qualities() -> dict[str, int]:
    """Return the quality, 1 to 100, by the digest of the quantization tables that libjpeg writes for it."""
    tables = {}
    for quality in range(100, 0, -1):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "JPEG", quality=quality)
        for count in (1, 2):  # grey images have one table
            tables[_digest_of_tables(Image.open(stream), count)] = quality
    return tables


def _digest_of_tables(image: Any, count: int) -> str:
    return digest_of([list(image.quantization[number]) for number in sorted(image.quantization)[:count]])


def _jpeg_quality(image: Any) -> str:
    """Return what a JPEG lost: the quality of libjpeg's tables, or a digest of others, and how colours are subsampled."""
    digest = _digest_of_tables(image, len(image.quantization))
    quality = _tables_of_qualities().get(digest)
    how = f"with tables {digest[:8]}" if quality is None else f"quality {quality}"
    factors = [(across, down) for _, across, down, _ in image.layer]
    if len(factors) == 1:
        return how
    if len(set(factors)) == 1:
        return f"{how}, 4:4:4"
    known = {(2, 1): "4:2:2", (2, 2): "4:2:0"}.get(factors[0]) if set(factors[1:]) == {(1, 1)} else None
    return f"{how}, {known or 'sampled ' + ' '.join(f'{across}x{down}' for across, down in factors)}"


def _webp_is_lossless(content: bytes) -> bool:
    """Return whether the first frame of a WebP file is a lossless one (chunk VP8L)."""
    at = 12
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, at)
        if kind in (b"VP8L", b"VP8 "):
            return bool(kind == b"VP8L")
        at += 8 + (16 if kind == b"ANMF" else size + size % 2)  # a frame of an animation holds chunks after 16 bytes
    return False
