"""DVC's cache of outputs: what it lacks, and how that is put back.

DVC runs a stage again whose outputs are there and unchanged, but not in its cache, and removes them first: after the cache
was emptied for its room, or in a copy of the project without it, days of training would be gone.
"""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def cache_folder(root: Path) -> Path:
    """Return where DVC keeps outputs by their MD5, by the settings of the user and of the project."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    found = root / ".dvc" / "cache"
    for file in (home / "dvc" / "config", root / ".dvc" / "config", root / ".dvc" / "config.local"):
        settings = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            settings.read(file, "utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # DVC says what is wrong with it
        found = file.parent / settings.get("cache", "dir", fallback=str(found))
    return found / "files" / "md5"


def lacks(cache: Path, stage: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Whether the cache lacks an output of a stage.

    stage, recorded: its entries of dvc.yaml and dvc.lock.
    """
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind) or []]
    kept_elsewhere = {
        path for entry in entries if isinstance(entry, dict) for path, how in entry.items() if how.get("cache") is False
    }
    digests = [one["md5"] for one in recorded.get("outs", []) if one["path"] not in kept_elsewhere and one.get("md5")]
    return not all(_is_there(cache, digest) for digest in digests)


def _is_there(cache: Path, digest: str) -> bool:
    try:
        content = (cache / digest[:2] / digest[2:]).read_bytes() if digest.endswith(".dir") else None
        members = [] if content is None else [one["md5"] for one in json.loads(content)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all((cache / one[:2] / one[2:]).exists() for one in members or ([digest] if content is None else []))


def put_back(root: Path, stages: Sequence[str]) -> list[str]:
    """Put the outputs of stages into DVC's cache as they are; return the stages that DVC finds changed, which will run."""
    command = [sys.executable, "-P", "-m", "dvc", "commit", "--quiet"]

    def committed(names: Sequence[str]) -> bool:
        return subprocess.run([*command, *names], cwd=root, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0

    return [] if committed(stages) else [name for name in stages if not committed([name])]
