"""Checkpoints of a training run: whole or not there, the newest whole one found again, some kept.

A checkpoint is a folder `step-00000150/` of `model.safetensors` (a weights file like any other),
`optimizer.safetensors` (`exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`) and `state.json` (step, what the model is,
seed, history, digests of the two files and of itself). Data position and random streams are functions of seed and step
(data_order.py, train.py).
Nothing is pickled. On a file system it is written to a temporary sibling, synced and renamed; on an object store
`state.json` goes up last and makes it whole.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dpar_core.files import (
    atomic_folder,
    atomic_path,
    load_tensors,
    parse_record,
    read_weights_header,
    save_weights,
    sha256_file,
    temporary,
    write_record,
)

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_CACHE = "dpar-checkpoints-"  # beginning of the names of folders for checkpoints of an object store
_NAME = re.compile(r"step-(\d{8,})")
_FORMAT = 2  # with a digest of its own; 1, of version 0.1.0, had none and is still read
_DAMAGE = (FileNotFoundError, ValueError)  # what a damaged checkpoint raises


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, in one sentence that names the last good one."""


@dataclass(frozen=True)
class Architecture:
    """What the weights belong to: the kind ("dpar", "gpt") and the config of the model as JSON data."""

    kind: str
    config: dict[str, Any]

    def difference(self, other: Architecture) -> str:
        """Return words for how two differ ("" when they do not)."""
        if self.kind != other.kind:
            return f"kind {self.kind} against {other.kind}"
        names = sorted(set(self.config) | set(other.config))
        parts = [(name, self.config.get(name), other.config.get(name)) for name in names]
        return ", ".join(f"{name} {mine} against {theirs}" for name, mine, theirs in parts if mine != theirs)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on this machine's disk. state: JSON data as given to `save`."""

    step: int
    folder: Path
    state: dict[str, Any]
    fetched_into: object = field(default=None, repr=False)  # keeps the copy of a remote checkpoint on disk

    def model(self) -> dict[str, Tensor]:
        """Return the weights, on the CPU."""
        return load_tensors(self.folder / _MODEL)

    def optimizer(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors, on the CPU."""
        return load_tensors(self.folder / _OPTIMIZER)

    @property
    def model_file(self) -> Path:
        return self.folder / _MODEL


class CheckpointStore:
    """The checkpoints of one run, in a folder or at an fsspec/pyarrow address (s3://bucket/path).

    keep_last: newest checkpoints that stay.
    keep_best: how many stay besides them for their score (lowest first).
    warn: receives one sentence for every damaged checkpoint that is passed over.
    """

    def __init__(
        self,
        root: str | Path,
        architecture: Architecture,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.architecture, self.keep_last, self.keep_best, self.warn = architecture, keep_last, keep_best, warn
        self._place: _Folder | _Remote = _Remote(str(root)) if "://" in str(root) else _Folder(Path(root))

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that look whole from outside, oldest first."""
        found = [_NAME.fullmatch(name) for name in self._place.names()]
        return sorted(int(match[1]) for match in found if match)

    def where(self, step: int) -> str:
        """Return the address of the checkpoint of a step."""
        return self._place.address(_folder_name(step))

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, None when there is none.

        Partial and damaged ones are passed over with a warning. Raises ValueError when it is whole but belongs to
        another architecture, OSError when the storage cannot be read: the checkpoint may be whole.
        """
        for step in reversed(self.steps()):
            try:
                checkpoint = self.read(step)
            except _DAMAGE as error:
                self.warn(f"checkpoint {self.where(step)} is damaged and passed over: {error}")
                continue
            stored = Architecture(**checkpoint.state["architecture"])
            difference = stored.difference(self.architecture)
            if difference:
                raise ValueError(
                    f"checkpoint {self.where(step)} belongs to another architecture ({difference} of this run): "
                    "give the run another storage, or bring the model section of params.yaml back"
                )
            return checkpoint
        return None

    def read(self, step: int) -> Checkpoint:
        """Fetch the checkpoint of a step and check it file by file. Raises one of _DAMAGE for a damaged one, OSError."""
        folder = self._place.fetch(_folder_name(step))
        state = _read_state((folder / _STATE).read_bytes(), step)
        for name, expected in state["files"].items():
            found = sha256_file(folder / name)
            if found != expected:
                raise ValueError(f"{name} has digest {found[:12]}, state.json says {expected[:12]}")
        if "digest" not in state and "digest" in read_weights_header(folder / _MODEL):
            raise ValueError(f"{_STATE} holds no digest, as those of version 0.1.0, and its {_MODEL} is of a later one")
        return Checkpoint(step, folder, state, self._place.cache)

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        score: float | None = None,
    ) -> str:
        """Write a checkpoint, then delete those beyond keep_last and keep_best, and return its address.

        model, optimizer: full (unsharded) tensors by name.
        state: JSON data.
        score: for keep_best, lower is better.
        Raises CheckpointError when it cannot be written (earlier checkpoints are untouched then) or others not dropped.
        """
        name = _folder_name(step)
        try:
            with self._place.create(name) as folder:
                self._write_model(folder / _MODEL, step, model)
                with atomic_path(folder / _OPTIMIZER) as temporary:
                    tensors = {key: value.detach().to("cpu").contiguous() for key, value in sorted(optimizer.items())}
                    safetensors.torch.save_file(tensors, temporary)
                files = {file: sha256_file(folder / file) for file in (_MODEL, _OPTIMIZER)}
                whole = {"format": _FORMAT, "step": step, "score": score, "files": files}
                architecture = {"kind": self.architecture.kind, "config": self.architecture.config}
                write_record(folder / _STATE, {**state, **whole, "architecture": architecture})
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(self._failure("checkpoint", step, error)) from error
        try:
            self._drop_old(step)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} is written, but older ones could not be removed from "
                f"{self._place.address('')} ({_reason(error)}): allow that there and run the same command again, it goes "
                f"on from step {step}"
            ) from error
        return self.where(step)

    def save_snapshot(self, step: int, model: Mapping[str, Tensor]) -> str:
        """Keep the weights of a step for good, beside the checkpoints, and return their address."""
        name = _snapshot_name(step)
        try:
            with self._place.create(name) as folder:
                self._write_model(folder / _MODEL, step, model)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(self._failure("snapshot", step, error)) from error
        return self._place.address(name)

    def snapshot_file(self, step: int) -> Path:
        """Return the weights file of a snapshot on this machine. Raises FileNotFoundError."""
        path = self._place.fetch(_snapshot_name(step)) / _MODEL
        read_weights_header(path)
        return path

    def _write_model(self, path: Path, step: int, model: Mapping[str, Tensor]) -> None:
        save_weights(path, model, kind=self.architecture.kind, config=self.architecture.config, meta={"step": step})

    def last_good(self) -> str:
        """Return words for where a run that stops now would go on."""
        try:
            good = self.steps()
        except OSError as error:
            return f"no checkpoint could be listed ({_reason(error)})"
        return f"the last good checkpoint is {self.where(good[-1])}" if good else "there is no checkpoint yet"

    def _failure(self, what: str, step: int, error: Exception) -> str:
        return (
            f"the {what} of step {step} could not be written to {self._place.address('')} ({_reason(error)}); "
            f"{self.last_good()}: make room there and run the same command again, it goes on from that"
        )

    def _drop_old(self, newest: int) -> None:
        steps = self.steps()
        kept = set(steps[-self.keep_last :]) | {newest}
        if self.keep_best:
            scores = {step: self._score(step) for step in steps}
            ranked = sorted((score, step) for step, score in scores.items() if score is not None)
            kept |= {step for _, step in ranked[: self.keep_best]}
        for step in steps:
            if step not in kept:
                self._place.remove(_folder_name(step))

    def _score(self, step: int) -> float | None:
        try:
            state = _read_state(self._place.read_bytes(f"{_folder_name(step)}/{_STATE}"), step)
        except _DAMAGE:
            return None
        score: float | None = state["score"]
        return score


def _read_state(content: bytes, step: int) -> dict[str, Any]:
    """Return a checkpoint's state.json, checked against its digest. Raises ValueError."""
    try:
        state: dict[str, Any] = json.loads(content)
        version, found = state["format"], state["step"]
        files = state["files"]
        known = set(files) == {_MODEL, _OPTIMIZER} and all(isinstance(digest, str) for digest in files.values())
        known &= isinstance(Architecture(**state["architecture"]).config, dict)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{_STATE} holds no state of a checkpoint") from None
    if version not in (1, _FORMAT) or found != step or not known:
        raise ValueError(f"{_STATE} has format {version} and step {found}, expected format {_FORMAT} and step {step}")
    if version == _FORMAT or "digest" in state:
        parse_record(content, where=_STATE, way_out="the checkpoint before it is taken")
    return state


def file_system(address: str) -> tuple[Any, str]:
    """Return (pyarrow file system, path on it) of a folder or an address that pyarrow or fsspec knows."""
    from pyarrow import fs

    if "://" not in address:
        return fs.LocalFileSystem(), address
    try:
        files, path = fs.FileSystem.from_uri(address)
    except (ValueError, NotImplementedError):
        import fsspec

        from dpar_core.training.object_store import object_store

        store, path = fsspec.core.url_to_fs(address)
        files = object_store(store)
    return files, path


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _snapshot_name(step: int) -> str:
    return f"snapshot-{step:08d}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


class _Folder:
    """A folder of a local or shared file system."""

    cache = None

    def __init__(self, root: Path) -> None:
        self.root = root

    def address(self, name: str) -> str:
        return str(self.root / name)

    def names(self) -> list[str]:
        return [path.name for path in self.root.iterdir()] if self.root.is_dir() else []

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        for left in [*self.root.glob(".step-*.tmp"), *self.root.glob(".snapshot-*.tmp")]:
            shutil.rmtree(left)  # of a writer that was killed; there is one writer a run
        with atomic_folder(self.root / name) as folder:
            yield folder

    def fetch(self, name: str) -> Path:
        if not (self.root / name).is_dir():
            raise FileNotFoundError(f"{self.root / name} is missing")
        return self.root / name

    def read_bytes(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def remove(self, name: str) -> None:
        # Renamed first: what is half deleted never looks like a checkpoint.
        doomed = self.root / f".{name}.old"
        if doomed.exists():
            shutil.rmtree(doomed)
        (self.root / name).rename(doomed)
        shutil.rmtree(doomed)


class _Cache:
    """A temporary folder, removed with this object; after a kill, by the next process that makes one."""

    def __init__(self) -> None:
        left = Path(tempfile.gettempdir()).glob(f"{_CACHE}*")
        context = temporary(partial(tempfile.mkdtemp, prefix=_CACHE), left)
        self.folder = context.__enter__()
        weakref.finalize(self, context.__exit__, None, None, None)


class _Remote:
    """An object store or any other address that pyarrow or fsspec knows."""

    def __init__(self, address: str) -> None:
        self.base = address.rstrip("/")
        self.files, self.root = file_system(self.base)
        self.cache = _Cache()

    def address(self, name: str) -> str:
        return f"{self.base}/{name}"

    def names(self) -> list[str]:
        from pyarrow import fs

        found = self.files.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        names = [Path(info.path).name for info in found if info.type == fs.FileType.Directory]
        states = self.files.get_file_info([f"{self.root}/{name}/{_STATE}" for name in names])
        return [name for name, state in zip(names, states) if state.type == fs.FileType.File]

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.cache.folder) as written:
            folder = Path(written)
            yield folder
            self.remove(name)  # there is one only if it was found damaged
            try:
                self.files.create_dir(f"{self.root}/{name}", recursive=True)
                # state.json last: without it the folder is not a checkpoint.
                for file in sorted(folder.iterdir(), key=lambda path: path.name == _STATE):
                    target_path = f"{self.root}/{name}/{file.name}"
                    with open(file, "rb") as source, self.files.open_output_stream(target_path) as target:
                        shutil.copyfileobj(source, target, 1 << 24)
            except BaseException:
                with suppress(Exception):  # the first error is the one to report; what stays is not a checkpoint
                    self.remove(name)
                raise

    def fetch(self, name: str) -> Path:
        from pyarrow import fs

        target = self.cache.folder / name
        target.mkdir(exist_ok=True)
        for info in self.files.get_file_info(fs.FileSelector(f"{self.root}/{name}")):
            with self.files.open_input_stream(info.path) as source, open(target / Path(info.path).name, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 24)
        return target

    def read_bytes(self, name: str) -> bytes:
        with self.files.open_input_stream(f"{self.root}/{name}") as stream:
            content: bytes = stream.read()
        return content

    def remove(self, name: str) -> None:
        from pyarrow import fs

        path = f"{self.root}/{name}"
        if self.files.get_file_info(path).type == fs.FileType.NotFound:
            return
        state = f"{path}/{_STATE}"
        if self.files.get_file_info(state).type == fs.FileType.File:
            self.files.delete_file(state)
        self.files.delete_dir(path)
