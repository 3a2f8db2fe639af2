"""Weights from files that somebody else made: what may be in them, and what is refused before anything is computed."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def check_finite(state: Mapping[str, Tensor], where: Path | str) -> None:
    """Refuse weights that hold NaN or infinity. Raises ValueError, naming the first of them.

    One sum in float64 per tensor tells: it is finite exactly when all values are.
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
            if packed:
                raise ValueError(f"{path} holds {packed[0]}, which unpacks to more than a hundred times its size")
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{path} is damaged: the checksum of {damaged} differs; fetch it again")
            return [one.filename for one in entries]
    except ValueError:
        raise
    except Exception as error:  # zipfile and zlib raise many kinds on damage
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or cut short ({reason[:200]}): fetch it again") from None
