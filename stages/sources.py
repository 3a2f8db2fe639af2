"""Look at what a run reads from outside: images, published weights, the reference and the network of scores.

The stage runs on every `dvc repro`, reads nothing that has not changed, and writes three small files. Stages that use a
source depend on its file, so DVC runs again what depends on a change, and only that. See docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

from dpar_core.data.fingerprint import KnownDigests, fingerprint, signature
from dpar_core.files import read_record, sha256_file, write_record
from stages import params as P
from stages.synset_lists import list_files
from stages.tracker import Tracker

# Photographs that ship inside scikit-image (CC0 or public domain) and scikit-learn (CC BY 2.0).
PHOTOGRAPHS = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "china": ("sklearn.datasets.images", "china.jpg"),
    "coffee": ("skimage.data", "coffee.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "hubble_deep_field": ("skimage.data", "hubble_deep_field.jpg"),
    "ihc": ("skimage.data", "ihc.png"),
    "retina": ("skimage.data", "retina.jpg"),
    "rocket": ("skimage.data", "rocket.jpg"),
}
SPLIT_NAMES = ("train", "validation")


@dataclass(frozen=True)
class Params:
    data: P.Data
    weights: str | None = field(metadata={"section": "tokenizer.weights"})
    reference: str = field(metadata={"section": "score.reference"})
    features_file: str | None = field(metadata={"section": "score.features_file"})


@dataclass(frozen=True)
class Inputs:
    pass


@dataclass(frozen=True)
class Outputs:
    images: Path
    weights: Path
    scoring: Path


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker | None, *, device: str, work: Path) -> None:
    """Record each source; a missing one is recorded as missing, and the stage that reads it reports it."""
    known = KnownDigests(work / "known.json")
    write_record(outputs.images, {"source": params.data.source, **_images(params.data, known)})
    write_record(outputs.weights, {"tokenizer.weights": _file(params.weights, known)})
    reference = None if params.reference in SPLIT_NAMES else _file(params.reference, known)
    write_record(outputs.scoring, {"score.reference": reference, "score.features_file": _file(params.features_file, known)})
    known.save()


def _images(data: P.Data, known: KnownDigests) -> dict[str, Any]:
    if data.source == "builtin":
        # By content: these files are small, and the demo's artifacts are the same on every machine.
        return {name: known.of(photograph_file(name)) for name in PHOTOGRAPHS}
    seen: dict[str, Any] = {split: fingerprint(Path(getattr(data, split))) for split in SPLIT_NAMES}
    if data.source in ("imagefolder", "ilsvrc") and (lists := list_files(Path(data.validation or ""))):
        seen["validation_list"] = [known.of(file) for file in lists]  # which may lie above the images
    return seen


def _file(name: str | None, known: KnownDigests) -> dict[str, Any] | None:
    """Return the digest of a file, or the fingerprint of a folder."""
    if name is None:
        return None
    path = Path(name)
    if path.is_dir():
        return fingerprint(path)
    return {"sha256": known.of(path)} if path.is_file() else {"missing": True}


def photograph_file(name: str) -> Path:
    """Return where a built-in photograph lies. The package it ships in is found, not imported."""
    package, file = PHOTOGRAPHS[name]
    top, *below = package.split(".")
    found = util.find_spec(top)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"the built-in photographs need {top}, which is not installed: run `make install`")
    return Path(found.submodule_search_locations[0], *below, file)


@contextmanager
def checked_file(record: Path, name: str, path: Path) -> Iterator[str]:
    """Yield the SHA-256 of a source file, which is to be read within the block.

    record: what stage sources wrote about it.
    name: its name in params.yaml.
    Raises ValueError when the file has changed since, or does within the block, FileNotFoundError when it is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"{name} {path} is missing: check params.yaml")
    if not path.is_file():
        raise ValueError(f"{name} {path} is {'a folder' if path.is_dir() else 'no plain file'}: name the file itself")
    before = signature(path.stat())
    noted, found = read_record(record, way_out="run `dpar-cli run sources`").get(name), sha256_file(path)
    expected = noted.get("sha256") if noted else None
    if found != expected:
        raise ValueError(
            f"{name} {path} has changed since stage sources looked (digest {found[:16]}, it noted {str(expected)[:16]}): "
            "run `dpar-cli run`"
        )
    yield found
    if signature(path.stat()) != before:
        raise ValueError(f"{name} {path} changed while it was read: run `dpar-cli run`")
