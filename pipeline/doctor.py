"""What this machine and this project have, and what is in the way of a run: one line each, with the way out."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from stages.params import Params

PACKAGES = (
    "torch",
    "numpy",
    "ray",
    "mlflow",
    "dvc",
    "pyarrow",
    "pydantic",
    "typer",
    "safetensors",
    "pillow",
    "scikit-image",
)
LOW_MEMORY, LOW_DISK = 3e9, 3e9  # bytes below which the demo may not fit
LARGEST_HASHED = 300e6  # bytes of a file whose digest is compared here; larger ones are checked where they are read
REMOTE_SECONDS = 2.0  # that a server may take to answer


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. fix: what to do about it, where it is not ok. fail: no run can succeed."""

    name: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def examine(root: Path) -> list[Check]:
    """Look at everything that a run depends on; nothing is changed and nothing is downloaded. root: the project's folder."""
    from pipeline.idle import idle_values

    params, faults = _read_params(root)
    checks = [*_python(root), *_versions(root), *_git(root), *faults]
    if params:
        checks += [Check("params.yaml", "warn", one.found, one.way_out) for one in idle_values(params, root)]
    checks += [*_device(params), _memory(), _disk(root), *_writable(root), _ray(), _store(root)]
    return [*checks, *(paths(params) if params else [])]


def _read_params(root: Path) -> tuple[Params | None, list[Check]]:
    from stages.params import ParamsError, load_params

    try:
        return load_params(root / "params.yaml"), [Check("params.yaml", "ok", "valid")]
    except ParamsError as error:
        return None, [
            Check("params.yaml", "fail", sentence, "see `dpar-cli params show demo`") for sentence in error.sentences
        ]
    except FileNotFoundError as error:
        return None, [Check("params.yaml", "fail", str(error), "dpar-cli params use demo")]


def _python(root: Path) -> Iterator[Check]:
    wanted = "unknown"
    if (root / "pyproject.toml").exists():
        wanted = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"].get("requires-python", wanted)
    version = platform.python_version()
    inside = all(_holds(sys.version_info[:2], bound) for bound in wanted.split(",")) if wanted != "unknown" else True
    fix = "" if inside else f"make the environment with a Python that is {wanted}: make PYTHON=python3.12 .venv"
    yield Check("python", "ok" if inside else "fail", f"{version} ({wanted} is supported)", fix)


def _holds(version: tuple[int, ...], bound: str) -> bool:
    found = re.fullmatch(r"\s*(>=|<=|<|>)\s*(\d+)\.(\d+)\s*", bound)
    if found is None:
        return True
    other = (int(found[2]), int(found[3]))
    return {">=": version >= other, "<=": version <= other, "<": version < other, ">": version > other}[found[1]]


def _versions(root: Path) -> Iterator[Check]:
    file = root / "constraints.txt"
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    wanted = {
        line.split("==")[0].strip().lower(): line.split("==")[1].split(";")[0].strip() for line in lines if "==" in line
    }
    missing, other = [], []
    for name in PACKAGES:
        try:
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if name in wanted and found != wanted[name]:
            other.append(f"{name} {found} (pinned {wanted[name]})")
    fix = "pip install -c constraints.txt -e ."
    if missing:
        yield Check("packages", "fail", f"missing: {', '.join(missing)}", fix)
    if other:
        yield Check("packages", "warn", f"not as pinned: {', '.join(other)}", fix)
    if not missing and not other:
        yield Check("packages", "ok", f"{len(PACKAGES)} checked, all as pinned")


def _git(root: Path) -> Iterator[Check]:
    from pipeline.state import read_lock, read_stages

    if not (root / ".dvc").is_dir():  # some copies lack hidden folders
        yield Check("dvc", "fail", "no folder .dvc beside dvc.yaml", "git checkout .dvc; outside git: dvc init --no-scm")
    for read in (read_stages, read_lock):
        try:
            read(root)
        except ValueError as error:
            found, _, fix = str(error).partition("; ")
            yield Check("dvc", "fail", found, fix)
    if any((folder / ".git").exists() for folder in (root, *root.parents)):
        yield Check("git", "ok", "the project is under git")
    else:
        yield Check("git", "warn", "not under git: `dvc exp` and `dvc diff` need it, runs do not", "git init && git add -A")


def _device(params: Params | None) -> Iterator[Check]:
    import torch

    from dpar_core.precision import multiplies_bf16
    from dpar_core.system import cpus
    from stages.params import Section, precision_lines

    asked = params.compute.device if params else "auto"
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield Check("cpu", "ok", f"{cpus()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    if gpus:
        yield Check("gpu", "ok", ", ".join(gpus))
    elif asked == "cuda":
        yield Check(
            "gpu", "fail", "compute.device is cuda, but no CUDA device is visible", "set compute.device to auto or cpu"
        )
    else:
        yield Check("gpu", "ok", "none, everything runs on the CPU")
    device = "cuda" if gpus and asked != "cpu" else "cpu"
    precision, does = ("bf16", "multiplies") if multiplies_bf16(device) else ("fp32", "only emulates")
    yield Check(
        "precision",
        "ok",
        f"auto means {precision}: this {device} {does} bfloat16",
    )
    for name in type(params).model_fields if params else ():
        section = getattr(params, name)
        lines = precision_lines(name, section, device) if isinstance(section, Section) else []
        for line in lines:
            if "emulates: " in line:
                found, _, fix = line.partition("; ")
                yield Check("precision", "warn", found, fix)
    if params:
        yield from _room(params, device)


def _room(params: Params, device: str) -> Iterator[Check]:
    """Look whether this machine has room for the workers of params: else a stage refuses them only when it begins."""
    from stages.workers.cluster import expected, require

    if (here := expected()) is None:  # another cluster is asked when it is joined
        return
    gpu = int(device == "cuda")
    trainings = {"entropy_model.train": params.entropy_model.train, "train": params.train}
    wanted = [(name, one.workers, one.cpus_per_worker, one.gpus_per_worker or gpu) for name, one in trainings.items()]
    others = ("tokenize_images", "entropies", "sample", "score")
    wanted += [(name, getattr(params, name).workers, 1, gpu) for name in others]
    for section, workers, cpus, gpus in wanted:
        try:
            require(here, workers=workers, cpus=cpus, gpus=gpus, section=section)
        except ValueError as error:
            found, _, fix = str(error).partition(": ")
            yield Check("workers", "warn", found, fix)


def _memory() -> Check:
    import psutil

    from stages.terminal import size

    memory = psutil.virtual_memory()
    found = f"{size(memory.available)} of {size(memory.total)} free"
    if memory.available < LOW_MEMORY:
        return Check("memory", "warn", found, f"the demo needs about {size(LOW_MEMORY)}: close other programs")
    return Check("memory", "ok", found)


def _disk(root: Path) -> Check:
    from stages.terminal import size

    free = shutil.disk_usage(root).free
    found = f"{size(free)} free (DVC keeps a second copy of artifacts in .dvc/cache)"
    if free < LOW_DISK:
        return Check(
            "disk", "warn", found, "free some space, or `dvc gc -w` removes artifacts of earlier runs from the cache"
        )
    return Check("disk", "ok", found)


def _writable(root: Path) -> Iterator[Check]:
    from stages.artifacts import FOLDER

    for name in (".", ".dvc", "work", FOLDER):
        folder = root / name
        if folder.exists() and not os.access(folder, os.W_OK):
            yield Check("project", "fail", f"{folder.resolve()} cannot be written", "change its owner or its mode")


def _ray() -> Check:
    from dpar_core.secrets import redacted
    from stages.workers.cluster import foreign_address

    address = foreign_address()
    if address is None:
        return Check("ray", "ok", "a cluster of its own on this machine, where one is needed")
    shown = redacted(address)
    if address == "auto" or _answers(address if "://" in address else f"ray://{address}", 6379):
        return Check("ray", "ok", f"RAY_ADDRESS {shown}")
    return Check("ray", "fail", f"RAY_ADDRESS is {shown}, where nothing answers", "start that cluster, or unset RAY_ADDRESS")


def _store(root: Path) -> Check:
    from dpar_core.secrets import redacted
    from pipeline.tracking.store import tracking_uri

    uri = tracking_uri(root)
    if uri.startswith(("http:", "https:")) and not _answers(uri, 443 if uri.startswith("https:") else 80):
        fix = "start that server, or unset MLFLOW_TRACKING_URI; a run goes on without it and sends its records later"
        return Check("mlflow", "warn", f"{redacted(uri)} does not answer", fix)
    return Check("mlflow", "ok", redacted(uri))


def _answers(address: str, default_port: int) -> bool:
    try:
        parts = urlsplit(address)
        with socket.create_connection((parts.hostname or "", parts.port or default_port), timeout=REMOTE_SECONDS):
            return bool(parts.hostname)
    except (OSError, ValueError):  # ValueError: no address
        return False


def paths(params: Params) -> list[Check]:
    """Look at every path that params name: whether it is there, and for a file its size and known digest."""
    named = {
        "data.train": params.data.train,
        "data.validation": params.data.validation,
        "tokenizer.weights": params.tokenizer.weights,
        "score.features_file": params.score.features_file,
        "score.reference": None if params.score.reference in ("train", "validation") else params.score.reference,
    }
    found = [check_path(name, path) for name, path in named.items() if path is not None]
    stores = {"entropy_model.train.storage": params.entropy_model.train.storage, "train.storage": params.train.storage}
    return found + [_check_storage(name, path) for name, path in stores.items() if path is not None]


def check_path(name: str, text: str) -> Check:
    """Look at one path of params. An address (s3://...) is not followed: checkpoints alone may be kept at one."""
    from dpar_core.evaluation.features import INCEPTION_SHA256, INCEPTION_URL
    from dpar_core.secrets import redacted
    from dpar_core.signatures import described, kind_of
    from stages.terminal import size

    if "://" in text and name.endswith(".storage"):
        return Check(name, "ok", f"{redacted(text)} (an address: checked when it is read)")
    if "://" in text:
        return Check(name, "fail", f"{redacted(text)} is an address, and files are read here", "fetch it, and name the file")
    path = Path(text)
    if not path.exists():
        near = path.parent
        while not near.exists():
            near = near.parent
        there = "" if near in (Path(), Path("/")) else f" ({near} exists)"
        get = f"dpar-cli fetch inception --to {text}" if path.name == INCEPTION_URL.rpartition("/")[2] else "put it there"
        return Check(name, "fail", f"{text} does not exist", f"{get}, or change {name}{there}")
    if path.is_dir() and name in ("tokenizer.weights", "score.features_file"):
        return Check(name, "fail", f"{text} is a folder", "name the file itself")
    if path.is_dir():
        empty = next(path.iterdir(), None) is None
        return Check(
            name,
            "fail" if empty else "ok",
            f"{text} is {'an empty' if empty else 'a'} folder",
            f"fill it, or change {name}" if empty else "",
        )
    length = path.stat().st_size
    if (kind := kind_of(path)) in ("empty", "lfs", "html", "xml", "zeros", "special", "unreadable"):
        found, _, fix = str(described(path, kind)).partition(": ")
        return Check(name, "fail", found, fix or "name a file of its kind")
    known = {"inception-2015-12-05.pt": INCEPTION_SHA256}.get(path.name)  # as its makers distribute it
    if known is not None and length <= LARGEST_HASHED:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != known:
            wanted = f"{known[:16]}... as published"
            return Check(name, "warn", f"{text} has SHA-256 {digest[:16]}..., expected {wanted}", "fetch it again")
        return Check(name, "ok", f"{text}, {size(length)}, SHA-256 as published")
    return Check(name, "ok", f"{text}, {size(length)}")


def _check_storage(name: str, text: str) -> Check:
    if "://" in text:
        return check_path(name, text)
    near = Path(text)
    while not near.exists():
        near = near.parent
    if os.access(near, os.W_OK):
        return Check(name, "ok", f"{text} can be written")
    return Check(name, "fail", f"{text} cannot be written", f"change {name}, or the mode of {near.resolve()}")


def lines(checks: list[Check], *, only_problems: bool = False) -> list[str]:
    """Return the checks for a terminal, a fix under each that is not ok."""
    from stages.terminal import colour, wrapped

    marks: dict[str, Any] = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}
    found = []
    for check in checks:
        if only_problems and check.verdict == "ok":
            continue
        mark, shade = marks[check.verdict]
        text = wrapped(f"{check.name:11} {check.found}", first=f"{mark}  ", rest=" " * 18)
        found.append(colour(mark, shade) + text[len(mark) :])
        if check.fix:
            found.append(wrapped(check.fix, first=" " * 18 + "-> ", rest=" " * 21))
    return found
