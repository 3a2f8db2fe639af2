"""Files from the web: with progress, whole or not at all, their digest checked."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpar_core.files import atomic_path, sha256_file
from stages.tracker import LineProgress

CHUNK = 1 << 20
SCHEMES = ("http", "https", "ftp", "file")


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder and those above it; where the block fails, remove them again."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # something else is in it by now
                folder.rmdir()
        raise


def download(url: str, to: Path, *, sha256: str | None = None) -> str:
    """Fetch a file and return its SHA-256. A file that is there already is kept when its digest is right.

    Raises ConnectionError when the address does not answer, ValueError when it is none or the digest is another; then
    nothing is left.
    """
    try:
        known = urllib.parse.urlsplit(url).scheme in SCHEMES
    except ValueError:  # brackets without an end
        known = False
    if not known:
        raise ValueError(f"{url!r} is no address that can be read, expected one that begins with {', '.join(SCHEMES)}")
    if to.exists():
        digest = sha256_file(to)
        if sha256 is None or digest == sha256.lower():
            return digest
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, _folder(to.parent), atomic_path(to) as temporary:
            size, found = int(answer.headers.get("Content-Length") or 0), hashlib.sha256()
            progress = LineProgress(max(size >> 20, 1), to.name, done=0, unit="MiB")
            read = 0
            with open(temporary, "wb") as stream:
                while chunk := answer.read(CHUNK):
                    stream.write(chunk)
                    found.update(chunk)
                    read += len(chunk)
                    progress.advance((read >> 20) - progress.done)
            if size and read != size:
                raise ConnectionError(f"{url} broke off after {read:,} of {size:,} bytes: run the same command again")
            if sha256 is not None and found.hexdigest() != sha256.lower():
                raise ValueError(f"{url} has SHA-256 {found.hexdigest()}, expected {sha256.lower()}: it is another file")
    except urllib.error.URLError as error:
        code = f"answers {error.code}" if isinstance(error, urllib.error.HTTPError) else "does not answer"
        raise ConnectionError(f"{url} {code} ({error.reason}): fetch it elsewhere and put it at {to}") from None
    except (http.client.HTTPException, ConnectionResetError, TimeoutError) as error:
        what = str(error) or type(error).__name__
        raise ConnectionError(f"{url} broke off ({what}): run the same command again, or put the file at {to}") from None
    return found.hexdigest()
