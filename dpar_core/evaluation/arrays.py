"""Arrays of npz files that anyone may have made: never unpickled, never larger in memory than the file can fill."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from dpar_core.evaluation.protocol import ScoreError
from dpar_core.signatures import described, kind_of

CHUNK = 1 << 22  # bytes read at once
BOMB_RATIO, BOMB_BYTES = 100, 1 << 28  # an entry this large that was compressed this far is refused


class Header(NamedTuple):
    """What an entry says of its array. offset: bytes before its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Npz:
    """The arrays of an open npz by name. All methods raise ScoreError, with the file's name, for what cannot be read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        entries = archive.infolist()
        self.entries = {one.filename.removesuffix(".npy"): one for one in entries if one.filename.endswith(".npy")}
        if len({one.filename for one in entries}) < len(entries):
            raise ScoreError(f"{path} holds two entries of one name: make it again")

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def header(self, name: str) -> Header:
        """Return shape and dtype without reading values, checked against the size that the entry really has."""
        with self._entry(name) as stream:
            return self._header(name, stream)

    def array(self, name: str, *, kinds: str = "biuf") -> np.ndarray:
        """Read an array. kinds: NumPy's letters of the dtypes that are expected (bool, int, unsigned, float)."""
        with self._entry(name) as stream:
            header = self._header(name, stream)
            if header.dtype.kind not in kinds:
                raise ScoreError(f"{self.path}: {name} is {header}, expected numbers")
            try:
                flat = np.empty(math.prod(header.shape), header.dtype)
            except MemoryError:
                raise ScoreError(
                    f"{self.path}: {name} needs {header.size / 2**30:.1f} GiB of memory, more than there is: "
                    "score it in parts or on a larger machine"
                ) from None
            held, done = flat.view(np.uint8), 0
            while done < header.size:
                if not (chunk := stream.read(min(CHUNK, header.size - done))):
                    raise EOFError(f"{name} ends after {done:,} of {header.size:,} bytes")
                held[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
                done += len(chunk)
            stream.read(1)  # at the end of an entry its checksum is compared
        return flat.reshape(header.shape, order="F" if header.fortran_order else "C")

    @contextmanager
    def _entry(self, name: str) -> Iterator[IO[bytes]]:
        info = self.entries[name]
        if info.file_size > BOMB_BYTES and info.file_size > BOMB_RATIO * info.compress_size:
            raise ScoreError(
                f"{self.path}: {name} is {info.file_size:,} bytes packed into {info.compress_size:,}, a decompression bomb "
                "and no set of images"
            )
        with _as_sentences(self.path), self.archive.open(info) as stream:
            yield stream

    def _header(self, name: str, stream: IO[bytes]) -> Header:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ScoreError(f"{self.path}: {name} has the npy format {version[0]}.{version[1]}, expected 1.0 or 2.0")
        first = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
        header = Header(tuple(map(int, shape)), dtype, fortran_order, stream.tell())
        if dtype.hasobject:
            raise ScoreError(f"{self.path}: {name} holds pickled objects, which are never read: store plain numbers")
        held = self.entries[name].file_size - header.offset
        if min(header.shape, default=0) < 0 or header.size != held:
            raise ScoreError(
                f"{self.path}: {name} claims {header}, {header.size:,} bytes, but holds {held:,}: it is damaged"
            )
        return header


@contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """Open an npz. Raises FileNotFoundError, and ScoreError in one sentence for a file of another kind or a damaged one."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected an npz")
    if (kind := kind_of(path)) != "zip":
        problem = described(path, kind) or f"{path} is not an npz"
        advice = {
            "npy": ": store it as an npz with numpy.savez(FILE, arr_0=ARRAY)",
            "text": ", expected an npz",
            "json": ", expected an npz",
            "pickle": ", which is never read: expected an npz",
            "safetensors": ", expected an npz",
            "image": ", expected an npz, or the folder of all pictures",
        }.get(kind, "" if ":" in problem.removeprefix(str(path)) else ": expected an npz")
        raise ScoreError(problem + advice)
    with _as_sentences(path):
        archive = zipfile.ZipFile(path)
    with archive:
        yield Npz(path, archive)


@contextmanager
def _as_sentences(path: Path) -> Iterator[None]:
    """Turn whatever damage makes zipfile, zlib and NumPy raise into one sentence."""
    try:
        yield
    except ScoreError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ScoreError(f"{path} is damaged or cut short ({reason[:200]}): make it or fetch it again") from None
