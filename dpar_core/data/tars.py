"""Where the files inside a tar lie, read header by header without unpacking (POSIX ustar and pax, GNU long names).

Stricter than the standard library's tarfile, which takes a damaged header for the end of the archive: here a tar is
whole and harmless, or refused in one sentence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
_REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "sparse"}
_CHUNK = 1 << 20  # bytes read at once behind the end mark
_LONGEST_NAME = 1 << 20  # bytes of a name or pax header that we are willing to read


class BadTar(ValueError):
    """A tar that is damaged or not made for us; the message is the whole sentence."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its bytes are `size` bytes at `offset` of the file that holds the tar."""

    name: str
    offset: int
    size: int


def members(path: Path, *, within: Member | None = None) -> Iterator[Member]:
    """Yield the regular files of a tar in order; with `within`, of a tar that is itself a member of the tar at `path`.

    Folders are passed over. Raises BadTar for links, devices, names that are absolute or point outside, damaged headers
    a missing end and what follows the end; OSError when the file cannot be read.
    """
    where = str(path) if within is None else f"{path}, inner {within.name}"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        first, end = (0, os.fstat(descriptor).st_size) if within is None else (within.offset, within.offset + within.size)
        yield from _scan(descriptor, first, end, where)
    finally:
        os.close(descriptor)


def _scan(descriptor: int, position: int, end: int, where: str) -> Iterator[Member]:
    first, long_name, pax = position, None, {}
    while True:
        header = os.pread(descriptor, BLOCK, position) if position + BLOCK <= end else b""
        if position == first:
            _refuse_others(os.pread(descriptor, 32, position) if position < end else b"", where)
        if len(header) < BLOCK:
            raise BadTar(f"tar {where} ends without its end mark at byte {position}: it is cut off, copy it again")
        if not header.strip(b"\0"):
            return _refuse_more(descriptor, position, end, where)
        if _number(header[148:156], where) != sum(header) - sum(header[148:156]) + 8 * 32:
            what = "is not a tar" if position == first else f"is damaged at byte {position}"
            raise BadTar(f"{where} {what}: a header has a wrong checksum")
        kind, size, position = header[156:157], _number(header[124:136], where), position + BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            if size > _LONGEST_NAME or position + size > end:
                raise BadTar(f"tar {where} is damaged at byte {position}: a name of {size} bytes")
            content = os.pread(descriptor, size, position)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind == b"x":
                pax = _pax(content, where)
            elif kind == b"g" and (own := {b"path", b"size", b"linkpath"} & _pax(content, where).keys()):
                raise BadTar(f"tar {where} gives all its files one {min(own).decode()}: pack them anew")
            position += -(-size // BLOCK) * BLOCK
            continue
        raw = header[:100].split(b"\0")[0]
        if header[257:262] == b"ustar" and header[257:265] != b"ustar  \0" and (prefix := header[345:500].split(b"\0")[0]):
            raw = prefix + b"/" + raw
        name = _safe_name(pax.get(b"path", long_name if long_name is not None else raw), where)
        size = _decimal(pax[b"size"], where) if b"size" in pax else size
        if kind in _REFUSED or any(field.startswith(b"GNU.sparse") for field in pax):
            raise BadTar(f"tar {where} holds {name!r}, which is {_REFUSED.get(kind, 'sparse')}: only plain files are read")
        if kind not in (b"0", b"\0", b"7", b"5"):
            raise BadTar(f"tar {where} holds {name!r} of unknown type {kind!r}: only plain files are read")
        folder = kind == b"5" or (kind != b"7" and raw.endswith(b"/"))
        if not folder:
            if position + size > end:
                raise BadTar(f"tar {where} is cut off inside {name!r}: copy it again")
            yield Member(name, position, size)
            position += -(-size // BLOCK) * BLOCK
        long_name, pax = None, {}


def _refuse_more(descriptor: int, position: int, end: int, where: str) -> None:
    """Raise BadTar for what follows the end mark at `position`, as a second tar does: no reader would look there."""
    for first in range(position, end, _CHUNK):
        if more := os.pread(descriptor, min(_CHUNK, end - first), first).lstrip(b"\0"):
            at = min(first + _CHUNK, end) - len(more)
            raise BadTar(
                f"tar {where} has its end mark at byte {position}, and more follows at byte {at}: two tars were joined, or "
                "one was written over another; pack the files in one tar"
            )


def _refuse_others(head: bytes, where: str) -> None:
    """Name what is often found in place of a tar."""
    found = {
        b"version https://git-lfs": "a Git LFS pointer: fetch the real file with `git lfs pull`",
        b"\x1f\x8b": "compressed by gzip: unpack it",
        b"BZh": "compressed by bzip2: unpack it",
        b"\xfd7zXZ": "compressed by xz: unpack it",
        b"(\xb5/\xfd": "compressed by zstd: unpack it",
        b"PK\x03\x04": "a zip file: pack it as a tar",
    }
    for start, words in found.items():
        if head.startswith(start):
            raise BadTar(f"{where} is not a tar but {words}")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise BadTar(f"{where} is not a tar but a web page: download it again")


def _number(field: bytes, where: str) -> int:
    if field[:1] == b"\x80":  # base 256, as GNU writes sizes from 8 GiB on
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", text):  # int() would also take a sign, and a negative size leads back
        raise BadTar(f"{where} is not a tar, or damaged: {field!r} is not an octal number")
    return int(text, 8) if text else 0


def _decimal(text: bytes, where: str) -> int:
    if not text.isdigit() or len(text) > 18:
        raise BadTar(f"tar {where} is damaged: a size of {text[:20]!r}")
    return int(text)


def _pax(content: bytes, where: str) -> dict[bytes, bytes]:
    fields = {}
    while content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or len(length) > 7 or not len(length) + 1 < int(length) <= len(content):
            raise BadTar(f"tar {where} is damaged: a pax header cannot be read")
        name, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[name] = value
        content = content[int(length) :]
    return fields


def _safe_name(raw: bytes, where: str) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise BadTar(f"tar {where} holds a file whose name {raw!r} is not UTF-8: only plain names are read") from None
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or "\\" in name or "\0" in name or not name.isprintable():
        raise BadTar(f"tar {where} holds a file named {name!r}, which points outside: only names below it are read")
    return "/".join(parts)
