"""Files that one step hands to the next: digests, atomic writes, records that carry their digest, weights as safetensors.

Whatever is read here is held against the digest it carries: a file that was damaged or edited is refused, never used.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:  # torch takes seconds to import, and most who write a file have no tensors
    from torch import Tensor


# Where a run keeps what `dpar_core.load_run` reads. stages.artifacts builds on these names and has all others.
RUN_FOLDER = "artifacts"
RUN_FILES = {
    "tokenizer": "tokenizer/tokenizer.safetensors",
    "entropy_model": "entropy_model/model.safetensors",
    "dpar": "models/dpar/model.safetensors",
    "llamagen": "models/llamagen/model.safetensors",
    "rule": "patch_maps/rule.json",
}

# What new files may be, as for any file of this user. Read once, as the process's mask can only be read by setting it.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


class Damaged(ValueError):
    """A file is not what its own digest says, or cannot be read as what it is; the message names it and the way out."""


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(obj: Any) -> str:
    """Return the one JSON text of `obj`: sorted keys, no spaces, no NaN (ValueError)."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest_of(obj: Any) -> str:
    """Return 16 hex digits that name JSON data: equal data, equal digest."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()[:16]


def sync_folder(folder: Path | str) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path, *, wait: bool) -> int | None:
    """Lock a temporary file or folder for as long as this process lives; return its descriptor.

    Returns None where another process has it, or where there are no such locks: on Windows, and on some network drives.
    """
    if sys.platform == "win32":  # where an open file could not be renamed either
        return None
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def temporary(make: Callable[[], str], left: Iterable[Path]) -> Iterator[Path]:
    """Yield the temporary file or folder that `make` makes, which is removed at the end where it still is.

    left: its like, of which those are removed now whose process was killed: nobody has them locked.
    """
    for one in left:
        with suppress(OSError):  # of another user, or just gone
            if (descriptor := _lock(one, wait=False)) is not None:
                remove(one)
                os.close(descriptor)
    while True:
        path = Path(make())
        descriptor = _lock(path, wait=True)
        if path.exists():  # else it was taken for left behind before it was locked
            break
    try:
        yield path
    finally:
        remove(path)
        if descriptor is not None:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, where it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sibling(path: Path, make: Callable[..., str]) -> AbstractContextManager[Path]:
    """Return a context with a temporary sibling of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left = [*path.parent.glob(f".{glob.escape(path.name)}.*.tmp"), *path.parent.glob(f".{glob.escape(path.name)}.*.old")]
    return temporary(lambda: make(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"), left)


def _new_file(*, dir: Path, prefix: str, suffix: str) -> str:
    handle, name = tempfile.mkstemp(dir=dir, prefix=prefix, suffix=suffix)
    os.close(handle)
    return name


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; it is synced and renamed onto `path` only when the block ends well.

    Raises OSError where `path` is a folder, a device or a pipe, which a renamed file must not take the place of.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is {'a folder' if path.is_dir() else 'a device or a pipe'}, expected the name of a file")
    with _sibling(path, _new_file) as written:
        yield written
        with open(written, "rb") as stream:
            os.fsync(stream.fileno())
        written.chmod(0o666 & ~_UMASK)
        os.replace(written, path)
        sync_folder(path.parent)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Write a whole file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path | str, obj: Any) -> None:
    """Write JSON data in a readable, deterministic form, whole or not at all."""
    atomic_write(path, json.dumps(obj, indent=2, sort_keys=True, allow_nan=False) + "\n")


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """Return the bytes before the values of an npy file, format 1.0, values in C order. dtype: as "<u2"."""
    import numpy as np

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def write_record(path: Path | str, content: Mapping[str, Any]) -> str:
    """Write JSON data with its own digest (the entry `digest`, 16 hex digits), whole or not at all; return the digest."""
    plain = json.loads(canonical_json({name: value for name, value in content.items() if name != "digest"}))
    digest = digest_of(plain)
    write_json(path, {**plain, "digest": digest})
    return digest


def read_record(path: Path | str, *, way_out: str) -> dict[str, Any]:
    """Return what `write_record` wrote, its digest included.

    way_out: what to do about a missing or damaged file, as "run `dpar-cli run data`". Raises FileNotFoundError, or Damaged
    when the content is not what its digest says.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {way_out}") from None
    return parse_record(content, where=str(path), way_out=way_out)


def read_json(path: Path | str, *, way_out: str, digest: bool = False) -> Any:
    """Return the JSON data of a file that may have been written by others: checked against a `digest` where it holds one.

    digest: whether it has to hold one, as what was written together with it does: files of version 0.1.0 held none.
    Raises FileNotFoundError, or Damaged when it is not JSON or not what its digest says.
    """
    try:
        content = Path(path).read_bytes()
        found = json.loads(content)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({str(error) or 'no JSON'}): {way_out}") from None
    if digest or (isinstance(found, dict) and "digest" in found):
        return parse_record(content, where=str(path), way_out=way_out)
    return found


def parse_record(content: bytes, *, where: str, way_out: str) -> dict[str, Any]:
    """Return the JSON data of a record's bytes, checked against the digest in it. Raises Damaged."""
    try:
        record: dict[str, Any] = json.loads(content)
        found = digest_of({name: value for name, value in record.items() if name != "digest"})
        stored = record["digest"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = "is empty" if not content.strip() else "is damaged, or of an older version (it holds no record with a digest)"
        raise Damaged(f"{where} {what}: {way_out}") from None
    if found != stored:
        raise Damaged(f"{where} is damaged or was edited (digest {found}, it says {stored}): {way_out}")
    return record


def seal_holds(summary: Mapping[str, Any]) -> bool:
    """Return whether all entries of a summary are what its `seal` says; summaries of version 0.1.0 have none.

    A summary's `digest` names the content it lists and stays the same when facts about it change; the seal covers both.
    Without a seal readers take what the digest covers, and of the rest what they can hold against files.
    """
    return "seal" not in summary or summary["seal"] == digest_of({k: v for k, v in summary.items() if k != "seal"})


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; it takes the place of `path` only when the block ends well."""
    path = Path(path)
    with _sibling(path, tempfile.mkdtemp) as written:
        yield written
        written.chmod(0o777 & ~_UMASK)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, old / path.name)
            os.replace(written, path)
            shutil.rmtree(old)
        else:
            os.replace(written, path)
        sync_folder(path.parent)


@dataclass(frozen=True)
class Weights:
    """Weights read from a file: tensors by name, the config, what they were made from, the digest of the file."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    meta: dict[str, Any]
    digest: str


def save_weights(
    path: Path | str, state: Mapping[str, Tensor], *, kind: str, config: Mapping[str, Any], meta: Mapping[str, Any]
) -> str:
    """Write weights as safetensors, whole or not at all, and return the file's digest (16 hex digits).

    state: tensors by name, any device (written contiguous, from the CPU).
    kind: what they are, as "dpar" or "gpt".
    config, meta: JSON data.

    The same input gives the same bytes: one metadata entry, as the header's order of several is not fixed. The entry holds
    the digest of the tensors and one of itself, which readers check.
    """
    import safetensors.torch

    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in sorted(state.items())}
    facts = {"kind": kind, "config": dict(config), "meta": dict(meta), "tensors": digest_of_tensors(tensors)}
    header = canonical_json({**facts, "digest": digest_of(facts)})
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"dpar": header})
    return sha256_file(path)[:16]


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of tensors on the CPU, as 64 hex digits."""
    import torch

    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return whole.hexdigest()


_READ_WHOLE = 1 << 30  # bytes of a file of tensors
_HEADER, _OLD_HEADER = {"kind", "config", "meta", "tensors", "digest"}, {"kind", "config", "meta"}


def read_weights_header(path: Path | str) -> dict[str, Any]:
    """Return {"kind", "config", "meta", ...} without reading tensors. Raises ValueError, FileNotFoundError.

    Files of version 0.1.0 hold neither `tensors` nor `digest`: they are read as they are.
    """
    import safetensors

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: run the stage that makes them")
    try:
        with safetensors.safe_open(str(path), framework="pt") as stream:
            header = (stream.metadata() or {}).get("dpar")
    except (safetensors.SafetensorError, ValueError) as error:
        if path.stat().st_size == 0:
            raise Damaged(f"{path} is empty: run the stage that makes it, or copy it again") from None
        raise ValueError(
            f"{path} is not a safetensors file ({error}): weights travel as safetensors here, never as pickles; "
            "published checkpoints come in through tokenizer.weights or `dpar-cli verify`"
        ) from None
    if header is None:
        raise ValueError(f"{path} was not written by this project (its header has no entry `dpar`)")
    damaged = Damaged(f"{path} is damaged or was edited (its header is not what its digest says): make it again")
    try:
        facts: dict[str, Any] = json.loads(header)
        names = set(facts)
        # Who writes `precision` or `weights` into meta writes both digests as well.
        older = names == _OLD_HEADER and not {"precision", "weights"} & set(facts["meta"])
        sound = older or (
            names == _HEADER and digest_of({name: facts[name] for name in names - {"digest"}}) == facts["digest"]
        )
    except (ValueError, TypeError, RecursionError):
        raise damaged from None
    if not sound:
        raise damaged
    return facts


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, to the CPU. Raises SafetensorError, OSError.

    Up to 1 GiB the file is read whole. A larger one is mapped, so that the processes of a machine share its pages; one that
    is cut off or written over in place changes under its reader then, and may end it (SIGBUS).
    """
    import safetensors.torch

    path = Path(path)
    if path.stat().st_size > _READ_WHOLE:
        return safetensors.torch.load_file(str(path))
    return safetensors.torch.load(path.read_bytes())


def load_weights(path: Path | str, *, kind: str) -> Weights:
    """Read a weights file made by `save_weights`. Raises ValueError for another kind, Damaged when its digests do not match.

    Costs two hashes of the file beside reading it, together about a second for each GB.
    """
    import safetensors

    header = read_weights_header(path)
    if header["kind"] != kind:
        raise ValueError(f"{path} holds weights of kind {header['kind']!r}, expected {kind!r}: check the path")
    damaged = Damaged(f"{path} is damaged or was edited (its tensors are not what its digest says): make it again")
    try:
        state = load_tensors(path)
    except safetensors.SafetensorError:  # cut off since its header was read
        raise damaged from None
    if "tensors" in header and digest_of_tensors(state) != header["tensors"]:
        raise damaged
    return Weights(state, header["config"], header["meta"], sha256_file(path)[:16])
