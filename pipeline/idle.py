"""Values of params.yaml that change nothing where other values stand as they do: whoever set them should know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpar_core.choices import READ_ENTROPIES

if TYPE_CHECKING:
    from stages.params import Params

TRAINED = ("commitment", "steps", "batch_size", "lr", "warmup_steps")  # of the tokenizer, where its weights are not read


class Idle(NamedTuple):
    """A value without effect. section: of params.yaml."""

    section: str
    found: str
    way_out: str


def idle_values(params: Params, root: Path) -> Iterator[Idle]:
    """Yield the values that were set and have no effect. root: the project's folder, whose demo has the usual values."""
    from pipeline.presets.published import PATCHES
    from pipeline.state import lookup, read_yaml
    from stages.params import flattened

    values = flattened(params)
    unset: dict[str, Any] = {
        "patching.threshold": None,
        "patching.target_mean_length": None,
        "sample.gate": "entropy_model",
        "sample.cfg_schedule": "constant",
        "sample.cfg_interval": [0.0, 1.0],
    }
    reasons: list[tuple[str, str, tuple[str, ...]]] = []  # the value in the way, what it does, the values without effect
    patching, longest = params.patching, params.patching.max_patch_length
    if patching.mode not in READ_ENTROPIES:
        names: tuple[str, ...] = ("patching.threshold", "patching.target_mean_length", "sample.gate")
        if patching.threshold in {threshold for _, threshold in PATCHES}:
            names = names[1:]  # as in the ablations, each of which differs from DPAR in one value
        reasons.append(("patching.mode", "reads no entropies", names))
    if patching.mode == "static" and longest is not None and patching.static_length > longest:
        unset["patching.static_length"] = longest
        reasons.append(("patching.max_patch_length", "cuts every patch", ("patching.static_length",)))
    if params.sample.cfg_scale == 1:
        reasons.append(("sample.cfg_scale", "guides nothing", ("sample.cfg_schedule", "sample.cfg_interval")))
    elif params.sample.cfg_schedule != "interval":
        reasons.append(("sample.cfg_schedule", "guides every token", ("sample.cfg_interval",)))
    if params.tokenizer.weights is not None and (demo := root / "params" / "demo.yaml").exists():
        trained = tuple(f"tokenizer.{name}" for name in TRAINED)
        unset |= {name: lookup(read_yaml(demo), name) for name in trained}
        reasons.append(("tokenizer.weights", "is not trained here", trained))
    for cause, does, names in reasons:
        for name in names:
            if values[name] != unset[name]:
                usual = "null" if unset[name] is None else unset[name]
                found = f"{name} {values[name]} has no effect: {cause} {values[cause]} {does}"
                yield Idle(name.partition(".")[0], found, f"set it to {usual}, or change {cause}")
