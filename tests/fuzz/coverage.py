"""Coverage-guided fuzzing (atheris) of parsers that are Python alone: `make fuzz-coverage TARGET=tar SECONDS=60`.

The tests do not need atheris. A finding ends the run and leaves its input as crash-* in the working folder. Records are not
here: their syntax is parsed by C code, which is not instrumented, so that coverage guides nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dpar_core"]):
    from dpar_core.data import classes, tars

FOLDER = Path(tempfile.gettempdir(), f"dpar-coverage-{os.getuid()}")  # emptied by the next run: libFuzzer ends the process
FILE = FOLDER / "input"
MOST = 8192  # bytes of an input


def read_tar(content: bytes) -> None:
    """Every member of a tar lies within it, or the tar is refused."""
    FILE.write_bytes(content)
    for member in tars.members(FILE):
        assert 0 <= member.offset <= member.offset + member.size <= len(content), member
        assert not member.name.startswith("/") and ".." not in member.name.split("/"), member


def read_names(content: bytes) -> None:
    """A list of class names gives names that are not empty."""
    FILE.write_bytes(content)
    assert all(classes.read_class_names(FILE))


def with_checksums(content: bytes, most: int, _seed: int) -> bytes:
    """Mutate a tar and let the checksums of its headers fit."""
    found = bytearray(atheris.Mutate(bytes(content), most))
    for first in range(0, len(found) - 511, 512):
        if found[first + 257 : first + 262] == b"ustar":
            found[first + 148 : first + 156] = b" " * 8
            found[first + 148 : first + 156] = b"%06o\0 " % sum(found[first : first + 512])
    return bytes(found[:most])


def seeds(name: str) -> list[bytes]:
    """Return inputs to begin from."""
    if name == "names":
        return [b"ape\nbee\n", b"0 tench\n1 goldfish\n", "\ufeffä ö\r\nb\r\n".encode()]
    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
            for member in ("a.png", "b/" + "x" * (90 if kind == tarfile.USTAR_FORMAT else 150)):
                entry = tarfile.TarInfo(member)
                entry.size = 5
                archive.addfile(entry, io.BytesIO(b"hello"))
        found.append(stream.getvalue()[:MOST])
    return found


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[bytes, int, int], bytes] | None]] = {
    "tar": (read_tar, with_checksums),
    "names": (read_names, None),
}


def main(name: str, seconds: str) -> None:
    read, mutator = TARGETS[name]
    shutil.rmtree(FOLDER, ignore_errors=True)
    corpus = FOLDER / "corpus"
    corpus.mkdir(parents=True)
    for number, content in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(content)

    def one(content: bytes) -> None:
        with contextlib.suppress(ValueError, OSError):  # refused, in a sentence
            read(content)

    limits = [f"-max_total_time={seconds}", f"-max_len={MOST}", "-timeout=5", "-rss_limit_mb=1024", "-seed=1"]
    atheris.Setup([sys.argv[0], str(corpus), *limits], one, **({"custom_mutator": mutator} if mutator else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
