"""Folders of files that are here, or somewhere fsspec reaches (s3://bucket/tokens) with copies kept here.

Every file is read whole and held against its digest once per machine, when somebody first asks for it. Copies are named by
the digest of their content, so they are never out of date and any number of readers share them. A note is kept that a file,
or a copy, was found sound, which holds as long as it is the same one (device, inode), of the same size, with the same time
of modification and, since that can be set back, of its last change in the file system (ctime).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from dpar_core.files import atomic_path, sha256_file

CACHE_VARIABLE = "DPAR_CACHE"
_CHUNK = 8 << 20


def is_remote(address: Path | str) -> bool:
    """Return whether an address is a URL that fsspec opens, as s3://bucket/tokens."""
    return "://" in str(address)


def cache_folder() -> Path:
    """Return DPAR_CACHE, or `dpar` among the user's caches; by hand, as the core does not depend on platformdirs."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpar"


class Folder:
    """A folder whose files are read through paths on this machine.

    address: a path, or an address with a scheme.
    cache: where copies of remote files are kept, and notes of what was found sound (default: see `cache_folder`); it grows
        to the size of what is read from elsewhere, and may be emptied at any time.
    """

    def __init__(self, address: Path | str, *, cache: Path | None = None) -> None:
        self.remote = is_remote(address)
        self.address = str(address).rstrip("/") if self.remote else Path(address)
        self.cache = cache_folder() if cache is None else cache
        self._sound: set[Path] = set()  # notes already seen or written by this process

    def __str__(self) -> str:
        return str(self.address)

    def read(self, name: str) -> bytes | None:
        """Return a small file's bytes as they are now, or None when it is missing. Raises OSError."""
        if not self.remote:
            path = Path(self.address) / name
            return path.read_bytes() if path.exists() else None
        filesystem, root = self._filesystem()
        try:
            content: bytes = filesystem.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None
        return content

    def path(self, name: str, sha256: str) -> Path:
        """Return a path on this machine to a file with this content, fetched where it is remote.

        Raises FileNotFoundError, OSError when what was fetched is not what its digest says, ValueError when a local file
        is not.
        """
        if self.remote:
            copy = self.cache / sha256[:2] / f"{sha256}{Path(name).suffix}"
            if not copy.exists() or self._other_digest(copy, sha256):  # damaged since it was fetched
                self._fetch(name, sha256, copy)
                self._record(self._note(copy, sha256))
            return copy
        path, mend = Path(self.address) / name, "run `dpar-cli data check --repair`"
        try:
            if digest := self._other_digest(path, sha256):
                raise ValueError(f"{path} is damaged (digest {digest[:16]}, expected {sha256[:16]}): {mend}")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: {mend}") from None
        return path

    def _other_digest(self, path: Path, sha256: str) -> str | None:
        """Return a file's digest where it is not the expected one; no file is read of which a note records that it is.

        Raises OSError.
        """
        note = self._note(path, sha256)
        if note in self._sound or note.exists():
            return None
        if (digest := sha256_file(path)) != sha256:
            return digest
        self._record(note)
        return None

    def _note(self, path: Path, sha256: str) -> Path:
        """Return where it is noted that a file has this digest. Raises OSError."""
        found = path.stat()
        times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
        same = f"{path.absolute()} {found.st_dev} {found.st_ino} {found.st_size} {times} {sha256}"
        name = hashlib.sha256(same.encode()).hexdigest()
        return self.cache / "sound" / name[:2] / name

    def _record(self, note: Path) -> None:
        with contextlib.suppress(OSError):  # without a place for notes every process looks for itself
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
        self._sound.add(note)

    def _fetch(self, name: str, sha256: str, copy: Path) -> None:
        filesystem, root = self._filesystem()
        digest = hashlib.sha256()
        with atomic_path(copy) as temporary:
            try:
                with filesystem.open(f"{root}/{name}", "rb") as source, open(temporary, "wb") as target:
                    while block := source.read(_CHUNK):
                        digest.update(block)
                        target.write(block)
            except FileNotFoundError:
                raise FileNotFoundError(f"{self}/{name} is missing: copy the folder there again") from None
            if digest.hexdigest() != sha256:
                raise OSError(
                    f"{self}/{name} has digest {digest.hexdigest()[:16]}, its index says {sha256[:16]}: "
                    "copy the folder there again"
                )

    def _filesystem(self) -> tuple[Any, str]:
        try:
            import fsspec
        except ImportError:
            raise OSError(f"reading {self} needs fsspec and the package of its scheme: pip install fsspec s3fs") from None
        try:
            filesystem, root = fsspec.core.url_to_fs(str(self.address))
        except (ImportError, ValueError) as error:
            raise OSError(f"cannot open {self}: {error}") from None
        return filesystem, root
