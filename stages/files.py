"""Digests of artifacts and the place where a stage's long work lives until it is whole."""

from __future__ import annotations

import json
from pathlib import Path

from dpar_core.files import digest_of, sha256_file

SUMMARY = "summary.json"


def artifact_digest(path: Path) -> str:
    """Return 16 hex digits that name the content of an artifact.

    A file is named by its bytes; a folder by the `digest` that its maker stored in summary.json (so that hundreds of
    gigabytes of shards are not read again), or by the digests of all its files where it has none.
    Raises FileNotFoundError with the way out.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `dvc repro`, or the stage that makes it")
    if path.is_file():
        return sha256_file(path)[:16]
    summary = path / SUMMARY
    if summary.exists():
        stored = json.loads(summary.read_text()).get("digest")
        if isinstance(stored, str):
            return stored
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest_of([[file.relative_to(path).as_posix(), sha256_file(file)] for file in files])
