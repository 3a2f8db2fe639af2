"""Which code made an artifact: the version of the package, the digest of its sources, the commit, and the packages used."""

from __future__ import annotations

import functools
import subprocess
from importlib import metadata
from pathlib import Path

from dpar_core.files import digest_of, sha256_file

_PACKAGES = ("dpar_core", "stages", "pipeline")
_USED = ("numpy", "ray", "mlflow", "dvc")


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


def commit_of(root: Path) -> str:
    """Return the commit of a project, 12 hex digits and `-dirty` where files differ from it; empty outside git."""
    commit = git(root, "rev-parse", "HEAD")[:12]
    return f"{commit}-dirty" if commit and git(root, "status", "--porcelain", "--untracked-files=no") else commit


def packages_used() -> dict[str, str]:
    """Return the versions of packages that a run uses; those of Python and torch stand with the machine (machine_words)."""
    return {name: metadata.version(name) for name in _USED}


def git(root: Path, *words: str) -> str:
    """Return what a git command prints; an empty text where it fails, or there is no git."""
    try:
        found = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
