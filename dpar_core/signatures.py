"""What a file really is, read from its first bytes: names and endings are often wrong after a download."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

Kind = Literal[
    "empty",
    "lfs",
    "html",
    "xml",
    "json",
    "text",
    "npy",
    "zip",
    "safetensors",
    "pickle",
    "gzip",
    "tar",
    "hdf5",
    "gguf",
    "image",
    "folder",
    "unreadable",
    "special",
    "zeros",
    "unknown",
]

_SENTENCES: dict[Kind, str] = {
    "empty": "is empty: fetch it again",
    "lfs": "is a Git LFS pointer: fetch the real file (`git lfs pull` in its repository)",
    "html": "is an HTML page, probably the error or download page of a site: fetch the file itself",
    "xml": "is an XML document, probably the error message of an object store: fetch the file itself",
    "json": "is JSON text",
    "text": "is a text file",
    "npy": "is a bare NumPy array (.npy)",
    "zip": "is a zip archive",
    "safetensors": "is a safetensors file",
    "pickle": "is a pickle",
    "gzip": "is compressed with gzip: unpack it first",
    "tar": "is a tar archive: unpack it first",
    "hdf5": "is an HDF5 file (Keras or MATLAB)",
    "gguf": "is a GGUF file",
    "image": "is a picture",
    "folder": "is a folder",
    "special": "is a device, pipe or socket",
    "zeros": "holds zeros only, as an interrupted download leaves it: fetch it again",
}
_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"version https://git-lfs", "lfs"),
    (b"\x93NUMPY", "npy"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"GGUF", "gguf"),
    (b"\x89PNG", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF8", "image"),
    (b"BM", "image"),
)


def kind_of(path: Path | str) -> Kind:
    """Return what kind of file `path` is by its content. Raises FileNotFoundError; never opens a pipe or device."""
    path = Path(path)
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    if not stat.S_ISREG(status.st_mode):
        return "special"
    if status.st_size == 0:
        return "empty"
    try:
        with open(path, "rb") as stream:
            head = stream.read(512)
    except OSError:
        return "unreadable"
    return _kind_of_bytes(head, status.st_size)


def _kind_of_bytes(head: bytes, size: int) -> Kind:
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return "tar"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= size - 8:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "pickle"
    if not head.strip(b"\0"):
        return "zeros"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        return "html"
    if start.startswith((b"<?xml", b"<error")):
        return "html" if b"<html" in start else "xml"
    printable = all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)
    if printable and start.startswith((b"{", b"[")):
        return "json"
    return "text" if printable else "unknown"


def described(path: Path | str, kind: Kind | None = None) -> str | None:
    """Return "PATH is ...", for people, or None where the kind is not known. Raises FileNotFoundError."""
    kind = kind_of(path) if kind is None else kind
    if kind == "unreadable":
        reason = "its permissions forbid it" if not os.access(path, os.R_OK) else "the disk or its connection fails"
        return f"{path} cannot be read: {reason}"
    return f"{path} {_SENTENCES[kind]}" if kind in _SENTENCES else None
