"""Images that a model generated, as the ADM evaluator reads them: samples.npz with arr_0 (uint8, NHWC) and arr_1 (labels).

Shapes: N images, S their side in pixels.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpar_core.evaluation.arrays import open_npz
from dpar_core.evaluation.image_sets import read_image_set
from dpar_core.files import atomic_path, npy_header

EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's zero; the same images give the same bytes


@dataclass(frozen=True)
class SampledWith:
    """The weights that samples were made with, by digest: `made_by` in their protocol. entropy_model: None: none ran."""

    model: str
    tokenizer: str
    entropy_model: str | None = None

    def to_json(self) -> dict[str, str]:
        """Return the record as JSON data."""
        return {name: digest for name, digest in asdict(self).items() if digest is not None}


def write_samples(path: Path | str, batches: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write samples.npz, whole or not at all, holding one batch in memory at a time.

    batches: arrays (n, S, S, 3) uint8, N images together.
    labels: (N,) integers.
    Raises ValueError when the images do not number N or differ in size.
    """
    count, written, shape = len(labels), 0, None
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo("arr_0.npy", EPOCH)
        with archive.open(entry, "w", force_zip64=True) as stream:
            for batch in batches:
                if batch.dtype != np.uint8 or batch.ndim != 4 or shape not in (None, batch.shape[1:]):
                    raise ValueError(f"expected images (n, S, S, 3) uint8 of one size; got {batch.shape} {batch.dtype}")
                if shape is None:
                    shape = batch.shape[1:]
                    stream.write(npy_header((count, *shape), "|u1"))
                stream.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != count:
            raise ValueError(f"expected {count} images, one a label; got {written}")
        with archive.open(zipfile.ZipInfo("arr_1.npy", EPOCH), "w", force_zip64=True) as stream:
            stream.write(npy_header((count,), "<i8"))
            stream.write(np.ascontiguousarray(labels, dtype="<i8").data)


def write_arrays(path: Path | str, **arrays: np.ndarray) -> None:
    """Write an npz of small arrays, whole or not at all; the same arrays give the same bytes."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", EPOCH), buffer.getvalue(), zipfile.ZIP_DEFLATED)


class Samples(NamedTuple):
    """images: (N, S, S, 3) uint8.
    labels: (N,) int64.
    """

    images: np.ndarray
    labels: np.ndarray


def read_samples(path: Path | str) -> Samples:
    """Read samples.npz. Raises FileNotFoundError, ValueError in a sentence."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no samples at {path}: run the sample stage")
    with open_npz(path) as content:
        if "arr_1" not in content:
            raise ValueError(f"{path} has no arr_1, expected the labels under that name: run the sample stage again")
        return Samples(read_image_set(path).images, content.array("arr_1", kinds="iu"))
