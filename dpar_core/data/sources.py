"""Where the image of a manifest row is, and opening it: a file, a range of bytes in a tar, a row of a Parquet file.

A row's source is the address of its bytes: ROOT:PATH is a file below a root of the manifest; ROOT@OFFSET+SIZE:PATH is a
range of bytes in it (a member of a tar, read in place); ROOT@GROUP.ROW:PATH is a row of a row group of a Parquet file, from
its column `image`, or ROOT@GROUP.ROW[COLUMN]:PATH from another. ROOT names an entry of `Manifest.roots`; a scheme of its
own, as builtin:NAME, is opened by a loader the caller gives.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpar_core.data.image_parquet import IMAGE_COLUMN, ParquetImages
from dpar_core.data.images import LARGEST_FILE, BadImage, decode_image, read_file
from dpar_core.data.manifest import Row

_PLACE = re.compile(
    r"(?P<root>[a-z]+)(?:@(?P<a>\d+)(?P<kind>[+.])(?P<b>\d+)(?:\[(?P<column>.*?)\](?=:))?)?:(?P<rest>.*)", re.DOTALL
)


def block_of(source: str) -> str | None:
    """Return what images that are read together have in common (a row group of a Parquet file), or None."""
    match = _PLACE.fullmatch(source)
    if match is None or match["kind"] != ".":
        return None
    return f"{match['root']}@{match['a']}:{match['rest']}"


class SourceChanged(ValueError):
    """An image file is not the one that the manifest lists; the message is the whole sentence."""


class ImageOpener:
    """Opens the image of a manifest row: decoded, and cut to its box. Safe to call from many threads.

    loaders: opens sources of schemes other than roots, by what follows the colon -> (height, width, 3) uint8.
    """

    def __init__(self, roots: Mapping[str, str], loaders: Mapping[str, Callable[[str], np.ndarray]]) -> None:
        self.roots, self.loaders = {name: Path(root) for name, root in roots.items()}, dict(loaders)
        self._parquet = ParquetImages()

    def __call__(self, row: Row) -> np.ndarray:
        """Return (height, width, 3) uint8.

        Raises BadImage with the reason, SourceChanged when the file's bytes are not those the manifest lists, ValueError
        for a source it does not know.
        """
        scheme, _, rest = row.source.partition(":")
        image = self.loaders[scheme](rest) if scheme in self.loaders else decode_image(self._same(row))
        if row.box is None:
            return image
        x0, y0, x1, y1 = row.box
        height, width = image.shape[:2]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise BadImage(f"its box {row.box} lies outside {width} x {height} pixels")
        return image[y0:y1, x0:x1]

    def _same(self, row: Row) -> bytes:
        content = self.content(row.source)
        if row.content is not None and (found := hashlib.sha256(content).hexdigest()[:16]) != row.content:
            raise SourceChanged(
                f"image {row.source} has changed since the manifest was made (digest {found}, listed {row.content}): "
                "run `dpar-cli run`"
            )
        return content

    def _place(self, source: str) -> tuple[re.Match[str], Path]:
        """Return a source taken apart and its root. Raises ValueError for one that is not known."""
        match = _PLACE.fullmatch(source)
        if match is None or match["root"] not in self.roots:
            raise ValueError(f"no image source {source!r}: expected one of {', '.join([*self.roots, *self.loaders])}")
        return match, self.roots[match["root"]]

    def file(self, source: str) -> Path:
        """Return the file that an image's bytes lie in. Raises ValueError for a source it does not know."""
        match, root = self._place(source)
        return root / match["rest"] if match["kind"] is None else _below(root, match["rest"])

    def content(self, source: str) -> bytes:
        """Return the bytes of an image file. Raises BadImage, ValueError."""
        match, root = self._place(source)
        try:
            if match["kind"] == ".":
                path, column = _below(root, match["rest"]), match["column"] or IMAGE_COLUMN
                return self._parquet(path, int(match["a"]), int(match["b"]), column)
            if match["kind"] == "+":
                return _read_range(_below(root, match["rest"]), int(match["a"]), int(match["b"]))
            return read_file(root / match["rest"])
        except BadImage:
            raise
        except (OSError, pa.ArrowException, KeyError, IndexError) as error:
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
            raise BadImage(f"cannot be read: {reason}") from None


def _below(root: Path, name: str) -> Path:
    """Return a file of a root that is a folder, or the root itself where it is the file."""
    return root if root.name == name and not root.is_dir() else root / name


def _read_range(path: Path, offset: int, size: int) -> bytes:
    if size > LARGEST_FILE:
        raise BadImage(f"too large: {size:,} bytes")
    with open(path, "rb", buffering=0) as stream:
        content = os.pread(stream.fileno(), size, offset)
    if len(content) != size:
        raise BadImage(f"the tar ends inside it: {len(content):,} of {size:,} bytes")
    return content
