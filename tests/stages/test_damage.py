"""A folder with a thousand images of every kind of damage: none stops the run, all are listed, the good ones are there."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tiny_data import Project, make_project, photo, put_images, tiny_params

from dpar_core.shards import TokenShards

COUNT = 1000


def encoded(number: int, kind: str, mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(number)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6

# What each kind writes: file name, content (None: see `put_damage`), and whether it can be read.
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
    "jpeg without an ending": lambda n: ("x", encoded(n, "JPEG"), True),
    "jpeg in capitals": lambda n: ("x.JPEG", encoded(n, "JPEG"), True),
    "cmyk": lambda n: ("x.jpg", encoded(n, "JPEG", "CMYK"), True),
    "grey": lambda n: ("x.png", encoded(n, "PNG", "L"), True),
    "grey with alpha": lambda n: ("x.png", encoded(n, "PNG", "LA"), True),
    "palette": lambda n: ("x.gif", encoded(n, "GIF", "P"), True),
    "bilevel": lambda n: ("x.png", encoded(n, "PNG", "1"), True),
    "float": lambda n: ("x.tiff", encoded(n, "TIFF", "F"), True),
    "progressive": lambda n: ("x.jpg", encoded(n, "JPEG", progressive=True), True),
    "rotated": lambda n: ("x.jpg", encoded(n, "JPEG", exif=TURNED), True),
    "broken exif": lambda n: ("x.jpg", encoded(n, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), True),
}  # fmt: skip
if os.geteuid():  # root reads whatever the mode says
    KINDS["unreadable"] = lambda n: ("x.png", encoded(n, "PNG"), False)


def put_damage(folder, count: int) -> dict[str, bool]:
    """Write images of all kinds in turn; return whether each, by its path below the folder, can be read."""
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
        if kind == "unreadable":
            path.chmod(0)
        readable[name] = good
    return readable


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_thousand_damaged_images_are_all_listed_and_the_good_ones_all_there(tmp_path):
    images = put_images(tmp_path / "images", train=2, validation=2)
    readable = put_damage(images / "train", COUNT)
    readable |= {"a/000.png": True, "b/001.png": True}
    changes = {"tokenize_images": {"shard_images": 100, "batch_size": 64}, "data": {"max_bad_share": 0.7}}
    project = Project(tmp_path, tiny_params(images, **changes)).data().tokenize()
    listed = {bad["source"].removeprefix("train:"): bad["reason"] for bad in json.loads(
        (tmp_path / "tokens" / "bad_images.json").read_text()
    )}  # fmt: skip
    assert listed.keys() == {name for name, good in readable.items() if not good}
    assert all(reason and "\n" not in reason for reason in listed.values())
    shards = TokenShards(tmp_path / "tokens", "train")
    assert len(shards) == sum(readable.values())
    assert project.bytes("tokens").keys() >= {"tokens/bad_images.json", "tokens/index.arrow", "tokens/summary.json"}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_folder_with_nothing_but_damage_says_so(tmp_path):
    project = make_project(tmp_path, data={"max_bad_share": 1.0})
    for path in (tmp_path / "images" / "validation").rglob("*.png"):
        path.write_bytes(bomb(20_000))
    with pytest.raises(ValueError, match="no validation image can be read"):
        project.tokenize()
