"""A folder with a thousand images of every kind of damage: none stops the run, all are listed, the good ones are there."""

import ctypes
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpar_core.data.manifest import read_manifest
from dpar_core.data.shards import TokenShards
from dpar_core.files import digest_of
from tests.helpers.tiny_data import make_project, photo, put_images

COUNT = 1000


def encoded(number: int, kind: str, mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(number)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, bits: int, colour: int, content: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    return png(side, side, 8, 0, bytes(99))


def deep(number: int) -> np.ndarray:
    return photo(number).astype(">u2") * 257  # 16 bits a channel


def deep_png(number: int) -> bytes:
    pixels = deep(number)
    return png(pixels.shape[1], pixels.shape[0], 16, 2, b"".join(b"\0" + row.tobytes() for row in pixels))


def deep_grey(number: int, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(deep(number)[:, :, 0].astype(np.uint16)).save(stream, kind)
    return stream.getvalue()


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6

# What each kind writes: file name, content (None: see `put_damage`), and whether it can be read (None: it is no image,
# by a name without a known ending and by its first bytes, and is left out of the manifest).
KINDS = {
    "zero bytes": lambda n: ("x.jpg", b"", False),
    "one byte": lambda n: ("x.png", b"\x89", False),
    "html": lambda n: ("x.jpg", b"<!DOCTYPE html><title>403 Forbidden</title>", False),
    "cut jpeg": lambda n: ("x.jpg", cut(encoded(n, "JPEG"), 0.3 + 0.5 * (n % 7) / 7), False),
    "cut png": lambda n: ("x.png", cut(encoded(n, "PNG"), 0.2 + 0.6 * (n % 7) / 7), False),
    "cut webp": lambda n: ("x.webp", cut(encoded(n, "WEBP"), 0.5), False),
    "bomb": lambda n: ("x.png", bomb(10_000 + 3_000 * (n % 9)), False),
    "noise": lambda n: ("x.jpeg", np.random.default_rng(n).bytes(500), False),
    "noise after a jpeg's head": lambda n: ("x.jpg", encoded(n, "JPEG")[:20] + np.random.default_rng(n).bytes(300), False),
    "text": lambda n: ("x.bmp", b"BM" + b"hello " * 50, False),
    "postscript": lambda n: ("x.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", False),
    "a dangling link": lambda n: ("x.jpg", None, False),
    "a pipe": lambda n: ("x.png", None, False),
    "png named jpg": lambda n: ("x.jpg", encoded(n, "PNG"), True),
    "jpeg named png": lambda n: ("x.png", encoded(n, "JPEG"), True),
    "jpeg named txt": lambda n: ("x.txt", encoded(n, "JPEG"), True),
    "webp named txt": lambda n: ("x.txt", encoded(n, "WEBP"), True),
    "text named txt": lambda n: ("x.txt", b"a note about the images", None),
    "cut jpeg named txt": lambda n: ("x.txt", cut(encoded(n, "JPEG"), 0.5), False),
    "jpeg without an ending": lambda n: ("x", encoded(n, "JPEG"), True),
    "jpeg in capitals": lambda n: ("x.JPEG", encoded(n, "JPEG"), True),
    "cmyk": lambda n: ("x.jpg", encoded(n, "JPEG", "CMYK"), True),
    "grey": lambda n: ("x.png", encoded(n, "PNG", "L"), True),
    "grey with alpha": lambda n: ("x.png", encoded(n, "PNG", "LA"), True),
    "palette": lambda n: ("x.gif", encoded(n, "GIF", "P"), True),
    "bilevel": lambda n: ("x.png", encoded(n, "PNG", "1"), True),
    "float": lambda n: ("x.tiff", encoded(n, "TIFF", "F"), True),
    "16-bit grey png": lambda n: ("x.png", deep_grey(n, "PNG"), True),
    "16-bit grey tiff": lambda n: ("x.tif", deep_grey(n, "TIFF"), True),
    "16-bit grey pgm": lambda n: ("x.pgm", b"P5\n14 11\n65535\n" + deep(n)[:, :, 0].tobytes(), True),
    "16-bit colour png": lambda n: ("x.png", deep_png(n), True),
    "cut 16-bit colour png": lambda n: ("x.png", cut(deep_png(n), 0.6), False),
    "progressive": lambda n: ("x.jpg", encoded(n, "JPEG", progressive=True), True),
    "rotated": lambda n: ("x.jpg", encoded(n, "JPEG", exif=TURNED), True),
    "broken exif": lambda n: ("x.jpg", encoded(n, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), True),
    "unreadable": lambda n: ("x.png", encoded(n, "PNG"), False),
    "unreadable txt": lambda n: ("x.txt", encoded(n, "JPEG"), None),
}


def put_damage(folder: Path, count: int) -> dict[str, bool | None]:
    """Write images of all kinds in turn; return whether each, by its path below the folder, can be read (None: no image)."""
    readable = {}
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        name, content, good = KINDS[kind](number)
        name = f"{'ab'[number % 2]}/{number:04d}{name[1:]}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a dangling link":
            path.symlink_to("nowhere.jpg")
        else:
            path.write_bytes(content)
        if kind.startswith("unreadable"):
            path.chmod(0)
        readable[name] = good
    return readable


def heed_modes() -> None:
    """Let the program started next be refused what a file's mode refuses, as root too: two capabilities go."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None, use_errno=True).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


RUN = """
import pathlib, sys
from tests.helpers.tiny_data import Project, tiny_params
root = pathlib.Path(sys.argv[1])
changes = {"tokenize_images": {"shard_images": 100, "batch_size": 64}, "data": {"max_bad_share": 0.7}}
Project(root, tiny_params(root / "images", **changes)).data().tokenize()
"""


def test_a_thousand_damaged_images_are_all_listed_and_the_good_ones_all_there(tmp_path):
    images = put_images(tmp_path / "images", train=2, validation=2)
    readable = put_damage(images / "train", COUNT)
    readable |= {"a/000.png": True, "b/001.png": True}
    words = [sys.executable, "-W", "ignore", "-c", RUN, str(tmp_path)]
    done = subprocess.run(words, preexec_fn=heed_modes, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bad = json.loads((tmp_path / "tokens" / "bad_images.json").read_text())
    listed = {one["source"].removeprefix("train:"): one["reason"] for one in bad}
    assert listed.keys() == {name for name, good in readable.items() if good is False}
    assert all(reason and "\n" not in reason for reason in listed.values())
    left_out = read_manifest(tmp_path / "manifest.parquet").notes["left_out"]
    assert set(left_out) == {f"train:{name}" for name, good in readable.items() if good is None}
    keys = TokenShards(tmp_path / "tokens", "train").keys().to_pylist()
    assert sorted(keys) == sorted(f"train-{digest_of(name)}" for name, good in readable.items() if good)
    assert {file.name for file in (tmp_path / "tokens").iterdir()} >= {"index.arrow", "summary.json"}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_folder_with_nothing_but_damage_says_so(tmp_path):
    project = make_project(tmp_path, data={"max_bad_share": 1.0})
    for path in (tmp_path / "images" / "validation").rglob("*.png"):
        path.write_bytes(bomb(20_000))
    project.data()
    with pytest.raises(ValueError, match="no validation image can be read"):
        project.tokenize()
