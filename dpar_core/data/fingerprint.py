"""Whether files from outside have changed: sizes and times of a tree, without reading it, and digests kept by them.

A fingerprint holds times, so it differs between machines and is not an identity: it shows that something must be looked at
again. What then decides is the content, whose digests are kept by each file's size and times, so that only files that
changed are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpar_core.files import read_record, sha256_file, write_record

_THREADS = 8  # a folder each: most of the time goes into waiting for the file system


def signature(status: os.stat_result) -> str:
    """Return what changes when a file does: device, inode, size, time of modification, and of its last change of any kind.

    The last (ctime) cannot be set back from a program, so a file edited in place with its time restored is seen as well;
    not so where a clock was set back, nor on systems where it is the time of creation (Windows).
    """
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def fingerprint(path: Path) -> dict[str, Any]:
    """Return how many files and bytes there are, and a digest of every file's name, size and times (`listing`).

    path: a folder, with all below it, links followed; or a file, with the files beside it, as class lists lie there. No
    file is opened: a million take seconds on a local disk. A path that is missing has no files.
    """
    if path.is_dir():
        folders = [path]
        with os.scandir(path) as entries:
            folders += sorted(Path(entry.path) for entry in entries if is_folder(entry))
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = list(pool.map(lambda folder: _part(folder, path, deep=folder != path), folders))
    else:
        beside = [path.parent, path.parent / "data", path.parent / "ILSVRC2012_devkit_t12" / "data"]
        parts = [_part(folder, path.parent, deep=False) for folder in beside if folder.is_dir()]
    whole = hashlib.sha256(json.dumps([part[2] for part in parts]).encode()).hexdigest()[:16]
    return {"files": sum(part[0] for part in parts), "bytes": sum(part[1] for part in parts), "listing": whole}


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one; False for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _part(folder: Path, root: Path, *, deep: bool) -> tuple[int, int, str]:
    """Return files, bytes and the digest of a folder's listing."""
    lines: list[str] = []
    total = _list(str(folder), len(str(root)) + 1, lines, deep=deep, above=())
    lines.sort()
    return len(lines), total, hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _list(folder: str, cut: int, lines: list[str], *, deep: bool, above: tuple[tuple[int, int], ...]) -> int:
    """Add a line for each file of a folder, and with `deep` of all folders below it; return their bytes.

    cut: characters of a path before its name below the root.
    """
    total = 0
    try:
        me = os.stat(folder)
        identity = me.st_dev, me.st_ino
        if identity in above:
            return 0  # a link back
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if not entry.is_dir():
                        found = entry.stat()
                        total += found.st_size
                        lines.append(f"{entry.path[cut:]}\0{signature(found)}")
                    elif deep:
                        total += _list(entry.path, cut, lines, deep=True, above=(*above, identity))
                except OSError:
                    lines.append(f"{entry.path[cut:]}\0unreadable")
    except OSError:
        lines.append(f"{folder[cut:]}\0unreadable")
    return total


class KnownDigests:
    """SHA-256 digests of files, kept in a file by path and signature, so that only what changed is read again."""

    def __init__(self, file: Path) -> None:
        self.file, self._changed = file, False
        self._known: dict[str, list[str]] = {}  # path -> signature, digest
        if file.exists():
            try:
                self._known = read_record(file, way_out="it is made again")["known"]
            except (ValueError, KeyError):
                self._known = {}  # a cache: what it lacks is read again

    def of(self, path: Path) -> str:
        """Return the digest of a file: 64 hex digits. Raises OSError."""
        name, now = str(path.absolute()), signature(path.stat())
        known = self._known.get(name)
        if known is None or known[0] != now:
            known = self._known[name] = [now, sha256_file(path)]
            self._changed = True
        return known[1]

    def save(self) -> None:
        """Write what is known, where something is new."""
        if self._changed:
            write_record(self.file, {"known": self._known})
