"""Trained models ready to sample: reading and checking artifacts, tokens to pixels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpar_core.data.splits import first_few
from dpar_core.evaluation.sample_files import SampledWith
from dpar_core.generation.generate import DPARGenerator, Generated, GPTGenerator, OnTokens
from dpar_core.generation.sampling import SampleSettings
from dpar_core.models.dpar import DPAR
from dpar_core.models.gpt import GPT
from dpar_core.models.load import Trained, read_trained
from dpar_core.models.vq import VQ, to_uint8
from dpar_core.patches.maps import precision_in, read_rule, rule_precision
from dpar_core.patches.rule import PatchRule
from dpar_core.precision import dtype_of
from stages import params as P
from stages.artifacts import artifact_digest
from stages.tracker import Tracker

DECODE_BATCH = 16  # images a decoder call on a GPU, always filled up


@dataclass(frozen=True)
class Files:
    """Artifacts that a sampler is made of. entropy_model, rule: DPAR's only."""

    model: Path
    tokenizer: Path
    entropy_model: Path | None = None
    rule: Path | None = None


def log_inputs(tracker: Tracker, inputs: object, *names: str) -> None:
    """Tell a tracker which files a stage samples from: fields of its Inputs."""
    for name in names:
        path = getattr(inputs, name)
        tracker.log_input(name, path, artifact_digest(path))


def settings_of(sample: P.Sample, rule: PatchRule | None) -> SampleSettings:
    """Turn the params section into settings; `rule` is the training rule, which the section may override."""
    if rule is not None:
        threshold = rule.threshold if sample.threshold is None else sample.threshold
        longest = rule.max_patch_length if sample.max_patch_length is None else sample.max_patch_length
        rule = replace(rule, threshold=threshold, max_patch_length=longest)
    return SampleSettings(
        cfg_scale=sample.cfg_scale,
        cfg_schedule=sample.cfg_schedule,
        cfg_interval=(sample.cfg_interval[0], sample.cfg_interval[1]),
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        gate=sample.gate,
        rule=rule,
    )


class Sampler:
    """A DPAR or its baseline with its tokenizer, from artifacts to pixels.

    Raises ValueError or FileNotFoundError in a sentence when files are missing or do not belong together.
    """

    def __init__(self, files: Files, sample: P.Sample, *, device: str) -> None:
        self.files, self.sample, self.device = files, sample, torch.device(device)
        self.is_dpar = files.rule is not None
        tokenizer = read_trained(files.tokenizer, "tokenizer")
        self.trained_with = {"tokenizer": tokenizer.digest}
        trained = read_trained(files.model, "dpar" if self.is_dpar else "llamagen", made_with=self.trained_with)
        self.weights = trained.weights
        self.vq: VQ = tokenizer.build(self.device)
        self.made_by = SampledWith(trained.digest, tokenizer.digest)
        self.rule = None if files.rule is None else read_rule(files.rule)
        self.gate_precision = "fp32" if files.rule is None else rule_precision(files.rule)
        self.settings = settings_of(sample, self.rule)
        self.gate = None if self.rule is None else self._gate(trained, self.rule)
        self.model: DPAR | GPT = trained.build(self.device)
        self.generator = self._generator()
        self.config, self.num_classes = self.generator.config, self.generator.num_classes
        config = tokenizer.config
        if self.config.codebook_size != config.codebook_size:
            raise ValueError(
                f"{files.model} predicts {self.config.codebook_size} codes, {files.tokenizer} has "
                f"{config.codebook_size}: run `dpar-cli run {'train_dpar' if self.is_dpar else 'train_llamagen'}`"
            )
        self.image_size = self.config.row_width * config.downsample
        names = self.weights.meta.get("classes") or []
        self.class_names = [*names, *(f"class {i}" for i in range(len(names), self.num_classes))]
        self.untrained = frozenset(self.weights.meta.get("untrained_classes") or [])
        # Samples of a class without training images would only show an embedding as it was initialized.
        self.trained_labels = [label for label in range(self.num_classes) if label not in self.untrained]

    def _generator(self) -> DPARGenerator | GPTGenerator:
        dtype = dtype_of(self.sample.precision)
        if isinstance(self.model, DPAR):
            gate_dtype = dtype_of(self.gate_precision)
            return DPARGenerator(self.model, self.gate, self.settings, dtype=dtype, gate_dtype=gate_dtype)
        return GPTGenerator(self.model, self.settings, dtype=dtype)

    def with_settings(self, sample: P.Sample) -> Sampler:
        """Return a sampler of the same networks, which stay where they are in memory, with other settings.

        Raises ValueError when the gate is another: it decides which networks there are.
        """
        other = copy.copy(self)
        other.sample, other.settings = sample, settings_of(sample, self.rule)
        if other.settings.gate != self.settings.gate:
            raise ValueError(f"the networks were read for gate {self.settings.gate}, not {other.settings.gate}")
        other.generator = other._generator()
        return other

    def _gate(self, trained: Trained, rule: PatchRule) -> GPT | None:
        """Return the entropy model that gates DPAR, None where nothing reads entropies.

        The rule must be the one DPAR was trained with, and be made with this very entropy model.
        """
        files = self.files
        found, now = trained.meta.get("rule"), asdict(rule)
        if found is not None and found != now:
            raise ValueError(
                f"{files.model} was trained with the patch rule {found}, but {files.rule} holds {now}: run "
                "`dpar-cli run train_dpar`, or set sample.threshold to sample with another one"
            )
        if not self.asks_model:
            return None
        assert files.entropy_model is not None and files.rule is not None
        trained_on = precision_in(trained.meta)
        if found is not None and trained_on != self.gate_precision:
            raise ValueError(
                f"{files.model} was trained on patches cut by entropies in {trained_on}, but {files.rule} holds those "
                f"in {self.gate_precision}: run `dpar-cli run train_dpar`, or set entropies.precision to {trained_on}"
            )
        entropy_model = read_trained(files.entropy_model, "entropy_model", made_with=self.trained_with)
        read_rule(files.rule, entropy_model=entropy_model.digest)
        self.made_by = replace(self.made_by, entropy_model=entropy_model.digest)
        gate: GPT = entropy_model.build(self.device)
        return gate

    @property
    def asks_model(self) -> bool:
        """Whether the entropy model cuts patches while sampling."""
        rule = self.settings.rule
        return rule is not None and self.settings.gate == "entropy_model" and rule.reads_entropies

    def generate(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        *,
        given: Tensor | None = None,
        progress: OnTokens | None = None,
    ) -> Generated:
        """Sample tokens, see dpar_core.generation.generate. Raises ValueError for a class without training images."""
        if unknown := sorted(self.untrained & set(labels)):
            names = first_few(self.class_names[label] for label in unknown)
            raise ValueError(f"{self.files.model} has seen no training image of {names}: sample other classes")
        return self.generator.generate(torch.as_tensor(labels, dtype=torch.int64), seeds, given=given, progress=progress)

    def pixels(self, tokens: Tensor, *, resize: int | None = None) -> np.ndarray:
        """Decode tokens (B, T) to images (B, S, S, 3) uint8; `resize`: bicubic without antialias, before clamping.

        An image's bytes do not depend on its neighbours nor on the number of threads: on the CPU every image is decoded
        alone on one core, several at a time.
        """
        codes = tokens.view(len(tokens), self.config.row_width, self.config.row_width)
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                images = list(pool.map(lambda one: self._decode(one, resize), codes.split(1)))
            torch.set_num_threads(threads)
            return torch.cat(images).numpy()
        filled = F.pad(codes, (0, 0, 0, 0, 0, -len(codes) % DECODE_BATCH))
        images = [self._decode(part, resize).cpu() for part in filled.split(DECODE_BATCH)]
        return torch.cat(images)[: len(codes)].numpy()

    @torch.inference_mode()
    def _decode(self, codes: Tensor, resize: int | None) -> Tensor:
        images = self.vq.decode(codes.to(self.device))
        if resize is not None and resize != images.shape[-1]:
            images = F.interpolate(images, size=(resize, resize), mode="bicubic", antialias=False, align_corners=False)
        return to_uint8(images)

    def protocol(self) -> dict[str, Any]:
        """Return what an image depends on besides its label and seed, as JSON data."""
        settings = asdict(self.settings)
        settings["cfg_interval"] = list(settings["cfg_interval"])
        if not self.is_dpar:
            del settings["rule"], settings["gate"]
        if self.asks_model:
            settings["gate_precision"] = self.gate_precision
        if self.untrained:
            settings["untrained_classes"] = sorted(self.untrained)
        model = "dpar" if self.is_dpar else "llamagen"
        return {"model": model, "made_by": self.made_by.to_json(), "precision": self.sample.precision, **settings}
