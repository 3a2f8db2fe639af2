"""Folders of files that are here, or somewhere fsspec reaches (s3://bucket/tokens) with copies kept here.

Copies are named by the digest of their content, so they are never out of date and any number of readers share them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dpar_core.files import atomic_path

CACHE_VARIABLE = "DPAR_CACHE"
_CHUNK = 8 << 20


def is_remote(address: Path | str) -> bool:
    """Tell whether an address is a URL that fsspec opens, as s3://bucket/tokens."""
    return "://" in str(address)


class Folder:
    """A folder whose files are read through paths on this machine.

    address: a path, or an address with a scheme. cache: where copies of remote files are kept (default: the environment
    variable DPAR_CACHE, or ~/.cache/dpar); it grows to the size of what is read, and may be emptied at any time.
    """

    def __init__(self, address: Path | str, *, cache: Path | None = None) -> None:
        self.remote = is_remote(address)
        self.address = str(address).rstrip("/") if self.remote else Path(address)
        if cache is None:
            cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dpar")
        self.cache = cache

    def __str__(self) -> str:
        return str(self.address)

    def read(self, name: str) -> bytes | None:
        """Return a small file's bytes as they are now, or None when it is missing. Raises OSError."""
        if not self.remote:
            path = self.address / name
            return path.read_bytes() if path.exists() else None
        filesystem, root = self._filesystem()
        try:
            return filesystem.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None

    def path(self, name: str, sha256: str) -> Path:
        """Return a path on this machine to a file with this content, fetched where it is remote.

        Raises FileNotFoundError, or OSError when what was fetched is not what its digest says. A local file is not read
        here: `dpar-cli data check` does that.
        """
        if not self.remote:
            return self.address / name
        copy = self.cache / sha256[:2] / f"{sha256}{Path(name).suffix}"
        if not copy.exists():
            self._fetch(name, sha256, copy)
        return copy

    def _fetch(self, name: str, sha256: str, copy: Path) -> None:
        filesystem, root = self._filesystem()
        digest = hashlib.sha256()
        with atomic_path(copy) as temporary:
            with filesystem.open(f"{root}/{name}", "rb") as source, open(temporary, "wb") as target:
                while block := source.read(_CHUNK):
                    digest.update(block)
                    target.write(block)
            if digest.hexdigest() != sha256:
                raise OSError(
                    f"{self}/{name} has digest {digest.hexdigest()[:16]}, its index says {sha256[:16]}: "
                    "copy the folder there again"
                )

    def _filesystem(self):
        try:
            import fsspec
        except ImportError:
            raise OSError(f"reading {self} needs fsspec and the package of its scheme: pip install fsspec s3fs") from None
        try:
            return fsspec.core.url_to_fs(str(self.address))
        except (ImportError, ValueError) as error:
            raise OSError(f"cannot open {self}: {error}") from None
