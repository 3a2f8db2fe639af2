"""What scores are: their values, and the protocol without which they mean nothing. Read without torch.

`scores` computes them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from dpar_core.files import digest_of, read_record

# What scores are called: names of the field only where the field's own network was used.
DISTANCE_NAMES = {"demo": "fd_demo", "inception": "fid", "dinov2": "fd_dinov2"}
SPATIAL_ORDER = "row, column, channel"
SPLIT_SIZE = 5000  # images per part of the inception score, as the ADM evaluator has it


class ScoreError(ValueError):
    """Features that no score can be computed from; the message names the fault."""


class Interval(NamedTuple):
    """Ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Protocol:
    """What scores must have in common to be compared.

    reference names the reference for people; its digest counts.
    image_height, image_width: pixels of the samples.
    formats: how the samples were stored, see `ImageSet`.
    spatial_order: how spatial features were flattened.
    """

    features: str
    features_digest: str
    reference: str
    reference_digest: str
    reference_images: int
    images: int
    image_height: int
    image_width: int
    formats: tuple[str, ...]
    neighbours: int
    splits: int
    spatial_order: str = SPATIAL_ORDER

    @property
    def id(self) -> str:
        """Return the short id: eight hex digits. The reference counts by its content, not by its name."""
        counted = {name: value for name, value in self.to_json().items() if name != "reference"}
        if self.images % SPLIT_SIZE and self.splits == -(-self.images // SPLIT_SIZE) > 1:
            counted["split_size"] = SPLIT_SIZE  # such scores were of equal parts before, and had the id without it
        return digest_of(counted)[:8]

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as JSON data."""
        return {**asdict(self), "formats": list(self.formats)}


@dataclass(frozen=True)
class Scores:
    """Scores by name (as "eval/fid"), 95 % intervals of those that have one, their protocol, and how samples were made.

    feature_count: pooled features per image; 0 where a file does not say.
    """

    values: dict[str, float]
    intervals: dict[str, Interval]
    protocol: Protocol
    samples: dict[str, Any]
    feature_count: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the content of a score file."""
        return {
            **self.values,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "protocol": self.protocol.to_json(),
            "protocol_id": self.protocol.id,
            "samples": self.samples,
            "feature_count": self.feature_count,
        }


def read_scores(path: Path) -> Scores:
    """Read a score file: it must be what its digest says, and its protocol have the id that it names.

    Raises FileNotFoundError, ScoreError, Damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"no scores at {path}: make them with `dpar-cli score --out {path}`")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        found = None
    if not isinstance(found, dict) or not {"protocol", "protocol_id", "intervals"} <= found.keys():
        raise ScoreError(f"{path} is not a score file: expected one that `dpar-cli score` or `dpar-cli run` has written")
    return scores_in(read_record(path, way_out="score the images again"), path)


def scores_in(found: Mapping[str, Any], path: Path) -> Scores:
    """Return the scores in the content of a score file. path: for sentences. Raises ScoreError."""
    protocol = _read_protocol(found["protocol"], path)
    if found["protocol_id"] != protocol.id:
        raise ScoreError(
            f"{path} names protocol {found['protocol_id']}, but its protocol has the id {protocol.id}: it was "
            "changed by hand or damaged, score again"
        )
    values = {name: value for name, value in found.items() if name.startswith("eval/")}
    intervals = found["intervals"]
    pairs = intervals.values() if isinstance(intervals, dict) else [None]
    whole = all(_is_number(value) for value in values.values()) and all(
        isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends)) for ends in pairs
    )
    if not whole or not isinstance(found.get("samples", {}), dict):
        raise ScoreError(f"{path} holds scores that are not finite numbers: score again")
    pairs_by_name = {name: Interval(*ends) for name, ends in intervals.items()}
    count = found.get("feature_count", 0)
    return Scores(values, pairs_by_name, protocol, found.get("samples", {}), count if type(count) is int else 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _read_protocol(found: object, path: Path) -> Protocol:
    """Return a protocol from JSON data. Raises ScoreError for another layout, as older versions wrote it."""
    names = {one.name: one.type for one in fields(Protocol)}
    if not isinstance(found, dict) or found.keys() != names.keys():
        differing = ", ".join(sorted(names.keys() ^ found.keys())) if isinstance(found, dict) else "no protocol"
        raise ScoreError(
            f"{path} has a protocol of another version of this project (differing: {differing}): score its images again"
        )
    kinds = {"str": str, "int": int}
    right = all(type(found[name]) is kinds[kind] for name, kind in names.items() if kind in kinds)
    formats = found["formats"]
    if not right or not (isinstance(formats, list) and all(isinstance(one, str) for one in formats)):
        raise ScoreError(f"{path} has a damaged protocol: score its images again")
    return Protocol(**{**found, "formats": tuple(formats)})


def differences(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return, in words, where protocols (as JSON data) differ."""
    names = dict.fromkeys(name for one in protocols for name in one)
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in protocols}) > 1]
    return [f"{name} {' / '.join(_words(one.get(name)) for one in protocols)}" for name in differing]


def _words(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def refuse_mixed(found: Sequence[Scores], names: Sequence[str]) -> None:
    """Refuse to set scores of different protocols beside each other. Raises ScoreError in one sentence."""
    if len({one.protocol.id for one in found}) > 1:
        ids = ", ".join(f"{name} {one.protocol.id}" for name, one in zip(names, found))
        raise ScoreError(
            f"these scores are of different protocols ({ids}) and are not compared: they differ in "
            f"{'; '.join(differences([one.protocol.to_json() for one in found]))}; score both alike, or give --force"
        )
