"""Which bytes every image of a manifest has: digests that go into the manifest and are checked whenever an image is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpar_core.data.fingerprint import signature
from dpar_core.data.images import BadImage
from dpar_core.data.manifest import Manifest
from dpar_core.data.sources import ImageOpener
from dpar_core.files import atomic_path

_THREADS = 16  # reads at once: disks and networks answer many better than one
_BATCH = 4096
_SCHEMA = pa.schema([("source", pa.string()), ("signature", pa.string()), ("content", pa.string())])


def content_digest(content: bytes) -> str:
    """Return 16 hex digits that name an image file's bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def contents_of(manifest: Manifest, opener: ImageOpener, cache: Path, advance: Callable[[int], object]) -> list[str | None]:
    """Return the digest of every row's image file, None where it cannot be read (tokenizing lists it as a bad image).

    cache: file of digests that earlier calls found, by source and by the size and times of the file it lies in, so that only
        what changed is read.
    advance: receives how many more images are done.
    """
    known = _read_cache(cache)
    signatures: dict[Path, str] = {}
    found: list[str | None] = []
    kept: list[tuple[str, str, str]] = []

    def look(source: str) -> tuple[str, str | None, str | None]:
        try:
            file = opener.file(source)
            if file not in signatures:
                signatures[file] = signature(file.stat())
            now = signatures[file]
            if (content := known.get((source, now))) is None:
                content = content_digest(opener.content(source))
            return source, now, content
        except (BadImage, OSError):
            return source, None, None

    sources = manifest.rows.table["source"]
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(sources), _BATCH):
            batch = sources.slice(first, _BATCH).to_pylist()
            for source, now, content in pool.map(look, batch):
                found.append(content)
                if now is not None and content is not None:
                    kept.append((source, now, content))
            advance(len(batch))
    _write_cache(cache, kept)
    return found


def _read_cache(path: Path) -> dict[tuple[str, str], str]:
    if not path.exists():
        return {}
    try:
        table = pq.read_table(path, schema=_SCHEMA)
    except (pa.ArrowException, OSError, ValueError):
        return {}  # a cache: what it lacks is read again
    return dict(zip(_pairs(table), table["content"].to_pylist()))


def _pairs(table: pa.Table) -> Iterator[tuple[str, str]]:
    yield from zip(table["source"].to_pylist(), table["signature"].to_pylist())


def _write_cache(path: Path, rows: list[tuple[str, str, str]]) -> None:
    columns = list(zip(*dict.fromkeys(rows))) or [[], [], []]
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(list(map(list, columns)), schema=_SCHEMA), temporary, compression="zstd")
