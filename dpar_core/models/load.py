"""The one reader of trained models: a weights file, checked against what it is used with, as a module ready to run.

Sampling, entropies, tokenizing, the probe, timing, the report and its pictures read models through this module, so that
none of them skips a check: the digests in the file, its kind, its config, and what it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dpar_core.files import Weights, load_weights, read_weights_header
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.vq import VQ, VQConfig
from dpar_core.models.weights import check_finite

Role = Literal["tokenizer", "entropy_model", "dpar", "llamagen"]
Config = VQConfig | GPTConfig | DPARConfig


@dataclass(frozen=True)
class _Kind:
    """What stands in a file of a role: the kind in its header, its classes, the stage that makes it."""

    kind: str
    config: type[Any]
    model: type[nn.Module]
    stage: str


_KINDS: dict[str, _Kind] = {
    "tokenizer": _Kind("vq", VQConfig, VQ, "tokenizer"),
    "entropy_model": _Kind("gpt", GPTConfig, GPT, "entropy_model"),
    "dpar": _Kind("dpar", DPARConfig, DPAR, "train_dpar"),
    "llamagen": _Kind("gpt", GPTConfig, GPT, "train_llamagen"),
}
_WORDS = {
    "tokenizer": "on tokens of tokenizer",
    "tokens": "on token shards",
    "entropy_model": "on patches of entropy model",
    "patch_maps": "on patch maps",
    "rule": "with the patch rule",
}


@dataclass(frozen=True)
class Trained:
    """A trained model as it was read. weights: its tensors on the CPU, what it was made from, the digest of its file."""

    path: Path
    role: Role
    config: Any
    weights: Weights

    @property
    def digest(self) -> str:
        """The digest of the file: 16 hex digits."""
        return self.weights.digest

    @property
    def meta(self) -> dict[str, Any]:
        """What the model was made from, as its stage recorded it."""
        return self.weights.meta

    def build(self, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None) -> Any:
        """Return the module in eval mode, without gradients, on a device. dtype: of its floating-point parameters.

        Raises ValueError when the tensors are not those of the config.
        """
        model = _KINDS[self.role].model(self.config)
        found, state = model.state_dict(), self.weights.state
        wrong = sorted(set(found) ^ set(state)) or [name for name in found if found[name].shape != state[name].shape]
        if wrong:
            raise ValueError(
                f"{self.path} does not fit its own config ({len(wrong)} tensors, first {wrong[0]}): "
                f"run `dvc repro -sf {_KINDS[self.role].stage}`"
            )
        check_finite(state, self.path)
        model.load_state_dict(state)
        return model.to(device, dtype).eval().requires_grad_(False)


def read_trained(path: Path, role: Role, *, made_with: Mapping[str, Any] | None = None) -> Trained:
    """Read a trained model and check that it belongs to what it is used with.

    made_with: what the reader has, by name: the digests of the `tokenizer`, the `tokens`, the `entropy_model`, or the `rule`
        as plain data; each is compared with what the file says.
    Raises FileNotFoundError, Damaged, or ValueError in a sentence.
    """
    kind = _KINDS[role]
    if not path.exists():
        raise FileNotFoundError(f"no trained model at {path}: run `dpar-cli run {kind.stage}`")
    weights = load_weights(path, kind=kind.kind)
    try:
        config = kind.config(**weights.config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a config of another version ({error}): run `dvc repro -sf {kind.stage}`") from None
    classes = getattr(config, "num_classes", None)
    if role == "entropy_model" and classes is not None:
        raise ValueError(f"{path} is conditioned on classes, an entropy model has none: run `dpar-cli run entropy_model`")
    if role == "llamagen" and classes is None:
        raise ValueError(f"{path} is an entropy model, which knows no classes: expected a model of {kind.stage}")
    for name, expected in (made_with or {}).items():
        found = weights.meta.get(name)
        if found != expected:
            raise ValueError(
                f"{path} was trained {_WORDS[name]} {found}, but this run has {expected}: run `dpar-cli run {kind.stage}`"
            )
    return Trained(path, role, config, weights)


def role_of(path: Path) -> Role:
    """Return which model is in a file: tokenizer, entropy model, DPAR or the LlamaGen baseline. Raises ValueError."""
    header = read_weights_header(path)
    if header["kind"] == "gpt":
        return "entropy_model" if header["config"].get("num_classes") is None else "llamagen"
    roles: dict[str, Role] = {"vq": "tokenizer", "dpar": "dpar"}
    if header["kind"] not in roles:
        raise ValueError(f"{path} holds weights of kind {header['kind']!r}, expected a model of this project")
    return roles[header["kind"]]
