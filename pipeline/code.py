"""Which code made an artifact: the version of the package and the digest of its sources."""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path

from dpar_core.files import digest_of, sha256_file

_PACKAGES = ("dpar_core", "stages", "pipeline")


@functools.cache
def code_identity() -> dict[str, str]:
    """Return {"version", "source"}: the package's version, and 16 hex digits that name all Python files of its packages.

    It is recorded beside artifacts (work/STAGE/last.json) and in MLflow's tags, not in them: a comment that changed must
    neither change an artifact's bytes nor make a stage run again.
    """
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for name in _PACKAGES for path in (root / name).rglob("*.py"))
    source = digest_of([[path.relative_to(root).as_posix(), sha256_file(path)] for path in files])
    try:
        version = metadata.version("dpar")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {"version": version, "source": source}
