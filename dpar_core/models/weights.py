"""Weights from files that somebody else made: read under plain names, or refused with the true reason.

Nothing here unpickles code: .pt files are read with weights_only=True. What a file is follows from its content, not from
its ending.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpar_core.data.splits import first_few
from dpar_core.files import load_tensors
from dpar_core.models.vq import UNUSED_BUFFER
from dpar_core.signatures import Kind, described, kind_of

HOLDERS = ("model", "module", "state_dict", "ema", "model_ema", "ema_model")  # the first one there is read
# DDP, torch.compile, FSDP, checkpointed blocks, a LightningModule's network
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "model.")
COMPUTED = ("freqs_cis", UNUSED_BUFFER)  # buffers that nobody needs to read
READ_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_IN_PARTS = "a checkpoint in several files: join them into one safetensors file first"
EXPECTED = "expected weights, as a .safetensors file or a PyTorch checkpoint"


@dataclass(frozen=True)
class TensorFile:
    """Tensors of a file. state: by name without wrappers' prefixes, float32, on the CPU, none sharing memory.

    holder: the key that held them, None where they are bare.
    others: keys beside it that hold whole sets of weights too, as "ema" beside "model".
    stored: the names of the dtypes that they had.
    """

    state: dict[str, Tensor]
    holder: str | None = None
    others: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()

    @property
    def note(self) -> str | None:
        """Return what a reader of the result has to know, None where there was no choice."""
        if not self.others:
            return None
        others = " and ".join(self.others)
        way_out = "name it (tokenizer.weights_key), or save it alone"
        return f"holds {self.holder} and {others}: {self.holder} is read; to use {others}, {way_out}"


def read_checkpoint(path: Path | str, *, holder: str | None = None) -> TensorFile:
    """Read tensors by name from a .safetensors file or a PyTorch checkpoint, bare or under one of HOLDERS.

    holder: the key to read where there are several, or another one than those. float16, bfloat16 and float64 become
    float32, and other types are refused. Raises FileNotFoundError, and ValueError in one sentence for a file of another
    kind, a damaged one, one that holds code, or weights that are not finite.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: check the path")
    kind = kind_of(path)
    if kind == "safetensors":
        content: Any = _read_safetensors(path)
    elif kind == "zip":
        content = _read_zip(path)
    elif kind == "pickle":  # as PyTorch before 1.6 wrote it
        content = _load(path)
    else:
        raise ValueError(_other_kind(path, kind))
    key, others = _choose(content, holder, path)
    state = content if key is None else content[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(one, Tensor) for one in state.values()):
        held = first_few(map(str, state if isinstance(state, Mapping) else content), 6) or "nothing"
        raise ValueError(
            f"{path} holds no state dict (it holds {held}): expected tensors by name, bare or under {', '.join(HOLDERS)}"
        )
    plain = _plain_names({str(name): tensor for name, tensor in state.items()}, path)
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in plain.values()})
    found: dict[str, Tensor] = {}
    taken: set[int] = set()  # memory of tensors so far: tied weights come apart, as safetensors wants them
    for name, tensor in plain.items():
        alone = _float32(name, tensor, path)
        found[name] = alone.clone() if alone.numel() and alone.data_ptr() in taken else alone
        taken.add(found[name].data_ptr())
    check_finite(found, path)
    return TensorFile(found, key, others, tuple(stored))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path)
    except Exception as error:  # SafetensorError, and what torch makes of sizes that cannot be
        raise ValueError(f"{path} is not a whole safetensors file ({_words(error)}): fetch it again") from None


def _read_zip(path: Path) -> Any:
    names = check_zip(path)
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{path} is a TorchScript program, {EXPECTED}: save its state_dict() instead")
    if not any(name.endswith("data.pkl") for name in names):
        what = "an npz of NumPy arrays" if any(name.endswith(".npy") for name in names) else "a zip archive without weights"
        shown = ", ".join(names[:3]) or "nothing"
        raise ValueError(f"{path} is {what} (it holds {shown}), {EXPECTED}")
    return _load(path)


def _load(path: Path) -> Any:
    try:
        # Training checkpoints of LlamaGen keep their command line's Namespace beside the weights: plain values.
        # The stream, not the path: torch takes a path that ends in .safetensors for what it is named.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it wants to run {found[1]}" if found else "it is not a plain set of tensors"
        raise ValueError(
            f"{path} is refused: {what}, and a pickle may run any code when it is read; convert it to safetensors where "
            "you trust it"
        ) from None
    except Exception as error:  # torch raises many kinds on damage: RuntimeError, EOFError, KeyError, IndexError ...
        raise ValueError(f"{path} is not a whole PyTorch checkpoint ({_words(error)}): fetch it again") from None


def _words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _other_kind(path: Path, kind: Kind) -> str:
    problem = described(path, kind) or f"{path} is not a file of weights"
    if kind == "folder":
        names = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".pth", ".bin"))
        if any(re.search(r"-\d+-of-\d+\.", name) for name in names):
            return f"{path} holds {_IN_PARTS}"
        held = f": give one of its files ({', '.join(names[:3])})" if names else ""
        return f"{problem}, {EXPECTED}{held}"
    if kind == "json" and _is_index(path):
        return f"{path} is the index of {_IN_PARTS}"
    return problem if ": " in problem.removeprefix(str(path)) else f"{problem}, {EXPECTED}"


def _is_index(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.loads(stream.read(1 << 26))
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(found, dict) and "weight_map" in found


def _choose(content: Any, holder: str | None, path: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return the key that weights are read from (None: the file holds them bare) and the keys of other whole sets."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds one {type(content).__name__} without names, expected tensors by name")
    known = dict.fromkeys((*HOLDERS, *([holder] if holder else [])))
    there = [key for key in known if isinstance(content.get(key), Mapping) and content[key]]
    if holder is not None and holder not in there:
        held = ", ".join(there) or f"none of {', '.join(HOLDERS)}"
        raise ValueError(f"{path} has no weights under {holder!r}: it has {held}")
    if not there:
        return None, ()
    key = holder or there[0]
    return key, tuple(other for other in there if other != key)


def _plain_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return tensors without the prefixes of DDP, torch.compile and FSDP, and without buffers that are computed."""
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = name
        while wrapper := next((one for one in WRAPPERS if short.startswith(one)), None):
            short = short.removeprefix(wrapper)
        for wrapper in WRAPPERS[1:4]:
            short = short.replace(f".{wrapper}", ".")
        if short in COMPUTED:
            continue
        if short in plain:
            raise ValueError(f"{path} holds {short} twice, with and without a wrapper's prefix: keep one of them")
        plain[short] = tensor
    return plain


def _float32(name: str, tensor: Tensor, path: Path) -> Tensor:
    if tensor.dtype not in READ_DTYPES:
        dtype = str(tensor.dtype).removeprefix("torch.")
        known = ", ".join(str(one).removeprefix("torch.") for one in READ_DTYPES)
        raise ValueError(f"{path}: {name} is {dtype}, expected one of {known}: unpack quantized weights first")
    if tensor.is_meta:
        raise ValueError(f"{path}: {name} was saved without its values (on PyTorch's meta device): save it anew")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else "sparse"
        raise ValueError(f"{path}: {name} is a {kind} tensor, expected a dense one: save it as one")
    tensor = tensor.to(torch.float32)
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def check_finite(state: Mapping[str, Tensor], where: Path | str) -> None:
    """Refuse weights that hold NaN or infinity. Raises ValueError, naming the first of them.

    One sum in float64 per tensor is enough: it is finite exactly when all values are.
    """
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not _finite(tensor)]
    if bad:
        raise ValueError(
            f"{where} holds weights that are not finite in {len(bad)} of {len(state)} tensors ({', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}): its training diverged or the file is damaged, take another checkpoint"
        )


def _finite(tensor: Tensor) -> bool:
    tensor = tensor.detach()
    if tensor.device.type == "mps":  # has no float64
        return bool(torch.isfinite(tensor).all())
    if tensor.element_size() == 1:  # float8 types cannot be added
        tensor = tensor.float()
    return bool(torch.isfinite(tensor.sum(dtype=torch.float64)))


def check_zip(path: Path) -> list[str]:
    """Read every entry of a zip archive against its checksum and return their names.

    So damage is found before a native parser meets it, which may ask for gigabytes first. PyTorch stores entries as they
    are; a compressed one could unpack to any size and is refused. Raises ValueError in one sentence.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            held = path.stat().st_size
            packed = [one.filename for one in entries if one.file_size > max(100 * one.compress_size, held)]
            damaged = None if packed else archive.testzip()
    except Exception as error:  # zipfile and zlib raise many kinds on damage
        raise ValueError(f"{path} is damaged or cut short ({_words(error)}): fetch it again") from None
    if packed:
        raise ValueError(f"{path} holds {packed[0]}, which unpacks to more than a hundred times its size: it is refused")
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} differs; fetch it again")
    return [one.filename for one in entries]
