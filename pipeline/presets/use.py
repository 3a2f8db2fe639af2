"""The presets in params/, and how one becomes params.yaml."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dpar_core.files import atomic_write
from stages.params import load_params
from stages.terminal import nearest, wrapped


def preset_names(root: Path) -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(file.stem for file in (root / "params").glob("*.yaml"))


def preset_lines(root: Path) -> list[str]:
    """Return a line per preset for a terminal of 80 columns: its name, and the comment at the top of its file."""
    names = preset_names(root)
    width = max(map(len, names), default=0)
    found = []
    for name in names:
        first = (root / "params" / f"{name}.yaml").read_text("utf-8").partition("\n")[0]
        words = first.removeprefix("# ").partition(" Run: ")[0].partition(" Other runs: ")[0].rstrip(".")
        found.append(wrapped(words, first=f"{name:{width}}  ", rest=" " * (width + 2)))
    return found


def preset_of(root: Path) -> str:
    """Return the name of the preset that params.yaml is, "own params" when it is none."""
    file = root / "params.yaml"
    text = file.read_text("utf-8") if file.exists() else ""
    same = (name for name in preset_names(root) if preset_file(root, name).read_text("utf-8") == text)
    return next(same, "own params")


def preset_file(root: Path, name: str) -> Path:
    """Return the file of a preset. Raises ValueError with the nearest names."""
    file = root / "params" / f"{name}.yaml"
    if file.exists():
        return file
    raise ValueError(f"there is no preset {name!r}: {nearest(name, preset_names(root), 'dpar-cli params list')}")


def use_preset(root: Path, name: str, *, force: bool = False) -> str:
    """Write a preset to params.yaml and return a sentence. A changed params.yaml is refused, or kept as .bak with force."""
    file, target = preset_file(root, name), root / "params.yaml"
    load_params(file)
    kept = ""
    if target.exists():
        known = preset_of(root) != "own params"
        if not known and not force:
            raise ValueError(f"{target.name} has changes of yours: --force replaces it and keeps it as {target.name}.bak")
        if not known:
            shutil.copyfile(target, root / "params.yaml.bak")
            kept = "; the old one is params.yaml.bak"
    atomic_write(target, file.read_text("utf-8"))
    return f"params.yaml is now preset {name}{kept}: continue with `dpar-cli run`"


def with_values(text: str, values: dict[str, Any]) -> str:
    """Return the text of a params file with values set by dotted name; its comments are kept. Raises ValueError."""
    yaml = YAML()
    yaml.width = 200
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    content = yaml.load(text)
    for name, value in values.items():
        *sections, key = name.split(".")
        part = content
        for section in sections:
            part = part.get(section, {})
        if key not in part:
            raise ValueError(f"no {name} in the params file: write every value out")
        if isinstance(value, list):
            part[key][:] = value  # keeps the style of the list
        else:
            part[key] = value
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()
