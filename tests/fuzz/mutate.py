"""Mutations of a file's bytes: blind ones, and those that keep a format's own checks satisfied so that more is reached."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dpar_core.files import digest_of

Dice = np.random.Generator
Mutation = Callable[[bytes, Dice], bytes]

NUMBERS = (0, 1, -1, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    -(2**63),
    1e308,
    -0.0,
    0.5,
    True,
    None,
    "",
    "a",
    "../../x",
    "\0",
    "x" * 300,
    "ä\u202e",
    [],
    {},
    [[]],
    {"a": 1},
    [None],
    10**400,
)
TEXT = (b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"- ", b"null", b"NaN", b"1e999", b"&a", b"*a", b"!!python/name:os")


def flip(content: bytes, dice: Dice) -> bytes:
    """One bit."""
    found = bytearray(content)
    if found:
        place = int(dice.integers(8 * len(found)))
        found[place // 8] ^= 1 << place % 8
    return bytes(found)


def flips(content: bytes, dice: Dice) -> bytes:
    """Some bits, near each other or not."""
    for _ in range(int(dice.integers(2, 12))):
        content = flip(content, dice)
    return content


def cut(content: bytes, dice: Dice) -> bytes:
    """The end is missing."""
    return content[: int(dice.integers(len(content) + 1))]


def drop(content: bytes, dice: Dice) -> bytes:
    """A piece is missing."""
    first = int(dice.integers(len(content) + 1))
    return content[:first] + content[first + int(dice.integers(1, 64)) :]


def repeat(content: bytes, dice: Dice) -> bytes:
    """A piece is there twice."""
    first = int(dice.integers(len(content) + 1))
    last = first + int(dice.integers(1, 64))
    return content[:last] + content[first:]


def noise(content: bytes, dice: Dice) -> bytes:
    """A piece is noise, or nothing but zeros or ones."""
    first, size = int(dice.integers(len(content) + 1)), int(dice.integers(1, 33))
    filling = [dice.bytes(size), bytes(size), b"\xff" * size][int(dice.integers(3))]
    return content[:first] + filling + content[first + size :]


def integer(content: bytes, dice: Dice) -> bytes:
    """An integer of 1, 2, 4 or 8 bytes is an unusual one."""
    size, order = int(dice.choice([1, 2, 4, 8])), str(dice.choice(["<", ">"]))
    value = int(NUMBERS[int(dice.integers(len(NUMBERS)))]) % (1 << 8 * size)
    place = int(dice.integers(len(content) + 1))
    return content[:place] + value.to_bytes(size, "little" if order == "<" else "big") + content[place + size :]


def token(content: bytes, dice: Dice) -> bytes:
    """A piece of syntax where none belongs."""
    place = int(dice.integers(len(content) + 1))
    return content[:place] + TEXT[int(dice.integers(len(TEXT)))] + content[place + int(dice.integers(2)) :]


def deep(content: bytes, dice: Dice) -> bytes:
    """Brackets nested far deeper than any parser's stack."""
    place = int(dice.integers(len(content) + 1))
    return content[:place] + bytes(dice.choice(np.array([b"[", b'{"a":']))) * 100_000 + content[place:]


BLIND: tuple[Mutation, ...] = (flip, flip, flips, cut, drop, repeat, noise, integer)
SYNTAX: tuple[Mutation, ...] = (*BLIND, token, token)


def json_values(content: bytes, dice: Dice) -> bytes:
    """Another value somewhere in JSON data, an entry gone or twice; digests and seals that hold are made to hold again."""
    data = json.loads(content)
    for _ in range(int(dice.integers(1, 3))):
        data = changed(data, dice)
    return sealed(data)


def sealed(data: Any) -> bytes:
    """Return JSON data as a file whose digest and seal hold, where it has them."""
    if isinstance(data, dict) and "files" in data and "made_by" in data:  # a folder's summary
        data["digest"] = _digest({name: data[name] for name in ("made_by", "files")})
    elif isinstance(data, dict) and "digest" in data:
        data["digest"] = _digest({name: value for name, value in data.items() if name != "digest"})
    if isinstance(data, dict) and "seal" in data:
        data["seal"] = _digest({name: value for name, value in data.items() if name != "seal"})
    return json.dumps(data).encode()


def _digest(data: Any) -> str:
    try:
        return digest_of(data)
    except ValueError:
        return "0" * 16


def changed(data: Any, dice: Dice) -> Any:
    """Return JSON data with a change at a random place."""
    if isinstance(data, dict) and data and dice.random() < 0.9:
        name = list(data)[int(dice.integers(len(data)))]
        what = dice.random()
        if what < 0.1:
            return {key: value for key, value in data.items() if key != name}
        if what < 0.15:
            return {**data, "another": VALUES[int(dice.integers(len(VALUES)))]}
        return {**data, name: changed(data[name], dice)}
    if isinstance(data, list) and data and dice.random() < 0.9:
        place = int(dice.integers(len(data)))
        what = dice.random()
        if what < 0.1:
            return data[:place] + data[place + 1 :]
        if what < 0.2:
            return data[: place + 1] + data[place:]
        return [*data[:place], changed(data[place], dice), *data[place + 1 :]]
    return VALUES[int(dice.integers(len(VALUES)))]


def yaml_values(content: bytes, dice: Dice) -> bytes:
    """Another value, or none, behind a key of a YAML file."""
    lines = content.decode().split("\n")
    keyed = [number for number, line in enumerate(lines) if ":" in line]
    number = keyed[int(dice.integers(len(keyed)))]
    key = lines[number].partition(":")[0]
    what = dice.random()
    if what < 0.1:
        lines[number : number + 1] = []
    elif what < 0.2:
        lines[number : number + 1] = [lines[number], lines[number]]
    else:
        lines[number] = f"{key}: {json.dumps(VALUES[int(dice.integers(len(VALUES)))])}"
    return "\n".join(lines).encode()


def in_zip(inner: tuple[Mutation, ...]) -> Mutation:
    """Return a mutation of one entry of a zip archive, its checksum made to fit."""

    def mutate(content: bytes, dice: Dice) -> bytes:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
        chosen, target = int(dice.integers(len(entries))), io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            for number, (entry, data) in enumerate(entries):
                if number == chosen:
                    if dice.random() < 0.05:
                        continue
                    data = inner[int(dice.integers(len(inner)))](data, dice)
                archive.writestr(zipfile.ZipInfo(entry.filename), data, entry.compress_type)
        return target.getvalue()

    return mutate


def in_tar(content: bytes, dice: Dice) -> bytes:
    """A damaged header of a tar, its checksum made to fit."""
    headers = [place for place in range(0, len(content) - 511, 512) if content[place + 257 : place + 262] == b"ustar"]
    if not headers:
        return flip(content, dice)
    first = headers[int(dice.integers(len(headers)))]
    header = bytearray(content[first : first + 512])
    for _ in range(int(dice.integers(1, 4))):
        place = int(dice.choice([int(dice.integers(512)), int(dice.integers(124, 136)), 156]))
        header[place] = int(dice.choice(np.frombuffer(b"\0 01234567KLNSgx5AZ/.\xff\x80", np.uint8)))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:first] + bytes(header) + content[first + 512 :]


def in_png(content: bytes, dice: Dice) -> bytes:
    """A damaged chunk of a PNG, its checksum made to fit."""
    chunks, place = [], 8
    while place + 12 <= len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    chosen, found = int(dice.integers(len(chunks))), content[:8]
    for number, (kind, data) in enumerate(chunks):
        if number == chosen:
            data = BLIND[int(dice.integers(len(BLIND)))](data, dice)
        found += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return found


def in_safetensors(content: bytes, dice: Dice) -> bytes:
    """Another header of a safetensors file, its length made to fit."""
    size = int.from_bytes(content[:8], "little")
    header = changed(json.loads(content[8 : 8 + size]), dice)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def csv_cells(content: bytes, dice: Dice) -> bytes:
    """Another cell of a CSV file."""
    lines = content.decode().split("\n")
    number = int(dice.integers(len(lines)))
    cells = lines[number].split(",")
    cells[int(dice.integers(len(cells)))] = str(VALUES[int(dice.integers(len(VALUES)))])
    lines[number] = ",".join(cells)
    return "\n".join(lines).encode()
