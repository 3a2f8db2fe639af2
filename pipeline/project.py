"""The project's folder: entered from any folder below it, with git or without, and with a home that cannot be written."""

from __future__ import annotations

import functools
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from stages.terminal import note

DVC_LOCAL = Path(".dvc", "config.local")
_SECTION = "[core]"
_NO_SCM = "    no_scm = true  # dpar-cli: outside git\n"
# Places that libraries below us would make in the home folder; platformdirs names ours alone, and none for a home that is
# read-only. A value the user has set in the environment wins.
_CACHES = {
    "DPAR_CACHE": "dpar",
    "MPLCONFIGDIR": "matplotlib",
    "TRITON_HOME": "triton",
    "XDG_CACHE_HOME": "cache",
}


def find_project(start: Path) -> Path | None:
    """Return the nearest folder at or above `start` that holds dvc.yaml, None when there is none. A sweep's has one too."""
    folders = (folder for folder in (start, *start.parents) if folder.parent.name != "sweeps")
    return next((folder for folder in folders if (folder / "dvc.yaml").is_file()), None)


def project_folder() -> Path:
    """Return the project's folder, which a command line has entered. Raises FileNotFoundError where it is none."""
    here = Path.cwd()
    if not (here / "dvc.yaml").exists():
        raise FileNotFoundError(f"no dvc.yaml in {here} nor above it: go to the project's folder first")
    return here


def enter_project() -> Path | None:
    """Make the project's folder the working folder and return where the command was started, None outside a project.

    Outside git DVC works only when so configured, which is done here. One line on standard error names each
    of these changes.
    """
    started = Path.cwd()
    root = find_project(started)
    if root is None:
        return None
    if root != started:
        os.chdir(root)
        note(f"working in {root}")
    try:
        configure_dvc(root)
    except OSError as error:
        note(f"{root / DVC_LOCAL} cannot be written ({error.strerror}): outside git DVC does not work so")
    return started


def configure_dvc(root: Path) -> None:
    """Set `core.no_scm` in DVC's local configuration outside git, and remove it once the project is under git.

    Only the line that was written here is ever removed. Raises OSError when the file cannot be written.
    """
    if not (root / ".dvc").is_dir():
        return
    under_git = any((folder / ".git").exists() for folder in (root, *root.parents))
    file = root / DVC_LOCAL
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if under_git and _NO_SCM in text:
        left = text.replace(_NO_SCM, "")
        file.unlink() if left.strip() == _SECTION else file.write_text(left, encoding="utf-8")
        note(f"this project is under git now: removed core.no_scm from {file}")
    elif not under_git and "no_scm" not in text:
        head, found, tail = text.partition(f"{_SECTION}\n")
        new = f"{head}{found}{_NO_SCM}{tail}" if found else f"{text}{_SECTION}\n{_NO_SCM}"
        file.write_text(new, encoding="utf-8")
        note(
            f"this project is outside git: set core.no_scm in {file}, so that DVC works without it "
            "(`dvc exp` and `dvc diff` need git)"
        )


def keep_caches_writable() -> None:
    """Send caches to the temporary folder when the home folder is missing or cannot be written, and print one line."""
    home = Path(os.path.expanduser("~"))
    if _writable(home):
        return
    missing = [name for name in _CACHES if name not in os.environ]
    if not missing:
        return
    base = Path(tempfile.gettempdir()) / f"dpar-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise PermissionError(f"{base} belongs to another user: set DPAR_CACHE and XDG_CACHE_HOME to folders of yours")
    for name in missing:
        os.environ[name] = str(base / _CACHES[name])
    note(f"the home folder {home} cannot be written: caches go to {base}")


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def follow_paths(app: typer.Typer, started: Path) -> None:
    """Let paths on the command line mean what they mean in `started`, the folder the command was started in.

    Defaults stay relative to the project, except those of pictures, which are written where the command was started.
    """
    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = _from(started, command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            follow_paths(group.typer_instance, started)


def _from(started: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    defaults = {name: found.default for name, found in inspect.signature(function).parameters.items()}

    def moved(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [moved(name, one) for one in value]
        if isinstance(value, Path) and (value != defaults[name] or value.suffix == ".png"):
            return started / value
        return value

    @functools.wraps(function)
    def call(**values: Any) -> Any:
        return function(**{name: moved(name, value) for name, value in values.items()})

    return call
