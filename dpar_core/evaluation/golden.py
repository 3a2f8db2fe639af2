"""Compare this implementation with recorded outputs of the published code, case by case.

A folder in the format of tests/golden (see the README there) holds weights as safetensors and arrays as npz; any file
of another run of the published code will do as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from dpar_core.choices import PatchMode, PositionEncoding
from dpar_core.evaluation import metrics
from dpar_core.evaluation.features import flatten_spatial
from dpar_core.generation.generate import DPARGenerator, GPTGenerator
from dpar_core.generation.sampling import SampleSettings, filter_logits
from dpar_core.models import published
from dpar_core.models.dpar import DPAR
from dpar_core.models.gpt import GPT, next_token_entropies, next_token_loss
from dpar_core.models.rope import Rotary
from dpar_core.models.vq import VQ, config_of
from dpar_core.patches.layout import PatchLayout
from dpar_core.patches.rule import PatchRule, lengths_from_starts, patch_starts, patch_starts_numpy
from dpar_core.training.optim import OptimSettings, adamw, clip_gradients

LOGITS = 1e-4  # two code paths of the published code itself differ by 6e-6; CPUs differ more
ENCODINGS: tuple[PositionEncoding, ...] = ("4d", "3d", "1d")
MODES: dict[str, PatchMode] = {
    "entropy": "entropy",
    "entropy_row_boundary": "entropy_rows",
    "static2": "static",
    "token": "token",
}


@dataclass(frozen=True)
class Case:
    """One comparison. difference: the largest (absolute, relative, or a count of what differs), as `name` says."""

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return bool(self.difference <= self.tolerance)  # nan never passes


def verify_folder(folder: Path | str) -> list[Case]:
    """Run every case whose files the folder holds. Raises ValueError when it holds none, or weights do not fit."""
    folder = Path(folder)
    makers: dict[str, Callable[[Path], Iterator[Case]]] = {
        "llamagen_gpt_c2i.npz": _gpt_c2i,
        "llamagen_gpt_ucond.npz": _gpt_ucond,
        "llamagen_vq.npz": _vq,
        "dpar_reference.npz": _dpar,
        "dpar_intermediates.npz": _intermediates,
        "patcher_cases.npz": _patcher,
        "sampling_filters.npz": _filters,
        "adm_evaluator.npz": _evaluator,
    }
    there = [name for name in makers if (folder / name).exists()]
    if not there:
        raise ValueError(f"{folder} holds none of {', '.join(makers)}: give a folder in the format of tests/golden")
    return [case for name in there for case in makers[name](folder)]


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).long()


def _largest(found: Tensor | np.ndarray | None, expected: np.ndarray) -> float:
    if found is None:
        return float("nan")
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    if found.shape != expected.shape:
        return float("nan")
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))


def _relative(found: float, expected: np.ndarray) -> float:
    return abs(found - float(expected)) / abs(float(expected))


def _heads(path: Path) -> tuple[int, int]:
    """Return (heads, row width) that a weights file's metadata names; the recorded models have 2 heads on an 8 x 8 grid."""
    with safe_open(str(path), framework="pt") as stream:
        stored: Mapping[str, str] = stream.metadata() or {}
    return int(stored.get("n_head", stored.get("heads", 2))), int(stored.get("grid", 8))


def _gpt(folder: Path, name: str) -> GPT:
    path = folder / f"{name}.safetensors"
    heads, row_width = _heads(path)
    state, config = published.read_gpt(path, heads=heads, row_width=row_width)
    model = GPT(config).eval()
    model.load_state_dict(state)
    return model


def _dpar_model(folder: Path, encoding: PositionEncoding) -> DPAR:
    path = folder / "dpar_reference.safetensors"
    heads, row_width = _heads(path)
    state, config = published.read_dpar(path, heads=heads, row_width=row_width, position_encoding=encoding)
    model = DPAR(config).eval()
    model.load_state_dict(state)
    return model


def _greedy(cfg_scale: float, rule: PatchRule | None) -> SampleSettings:
    return SampleSettings(cfg_scale=cfg_scale, top_k=1, rule=rule)


def _gpt_c2i(folder: Path) -> Iterator[Case]:
    z, model = _load(folder / "llamagen_gpt_c2i.npz"), _gpt(folder, "llamagen_gpt_c2i")
    tokens, labels = _tensor(z["tokens"]), _tensor(z["labels"])
    yield Case("GPT with class: logits", _largest(model(tokens, labels), z["logits"]), LOGITS)
    loss = next_token_loss(model, tokens, labels).item()
    yield Case("GPT with class: loss", abs(loss - float(z["loss"])), 1e-5)
    table = torch.stack([model.rotary.cos, model.rotary.sin], dim=-1)
    yield Case("GPT with class: rotary table", _largest(table, z["rope_table"]), 1e-6)
    for scale in (1, 2):
        chosen = _tensor(z["gen_labels"])
        sampled = GPTGenerator(model, _greedy(scale, None)).generate(chosen, [0] * len(chosen), keep_logits=True)
        wrong = int((sampled.tokens.numpy() != z[f"gen_tokens_cfg{scale}"]).sum())
        yield Case(f"GPT with class: greedy tokens that differ, cfg {scale}", wrong, 0)
        if scale == 2:
            yield Case("GPT with class: guided logits", _largest(sampled.logits, z["gen_logits_cfg2"]), LOGITS)


def _gpt_ucond(folder: Path) -> Iterator[Case]:
    z, model = _load(folder / "llamagen_gpt_ucond.npz"), _gpt(folder, "llamagen_gpt_ucond")
    tokens = _tensor(z["tokens"])
    logits = model(tokens)
    yield Case("entropy model: logits", _largest(logits, z["logits"]), LOGITS)
    yield Case("entropy model: entropies, nats", _largest(next_token_entropies(logits), z["entropies"]), 1e-5)
    yield Case("entropy model: loss", abs(next_token_loss(model, tokens).item() - float(z["loss"])), 1e-5)
    table = torch.stack([model.rotary.cos, model.rotary.sin], dim=-1)
    yield Case("entropy model: rotary table", _largest(table, z["rope_table"]), 1e-6)


def _vq(folder: Path) -> Iterator[Case]:
    z, state = _load(folder / "llamagen_vq.npz"), published.read_vq(folder / "llamagen_vq.safetensors")
    model = VQ(config_of(state)).eval()
    model.load_state_dict(state)
    images = torch.from_numpy(z["image"])
    with torch.inference_mode():
        out = model(images)
        yield Case("VQ: latents", _largest(model.latents(images), z["z_before_quant"]), LOGITS)
        clear = z["code_gap"] >= 1e-5
        yield Case("VQ: codes that differ", int((out.codes.numpy() != z["codes"])[clear].sum()), 0)
        yield Case("VQ: quantized latents", _largest(model.quantize(model.latents(images)).latents, z["quantized"]), LOGITS)
        yield Case("VQ: reconstruction", _largest(out.images, z["reconstruction"]), LOGITS)
        side = int(z["free_codes"].shape[1] ** 0.5)
        free = model.decode(_tensor(z["free_codes"]).view(-1, side, side))
        yield Case("VQ: image of free codes", _largest(free, z["free_codes_image"]), LOGITS)


def _dpar(folder: Path) -> Iterator[Case]:
    z = _load(folder / "dpar_reference.npz")
    tokens, labels = _tensor(z["tokens"]), _tensor(z["labels"])
    rule = PatchRule("entropy_rows", 8, float(z["threshold"]), int(z["max_patch_length"]))
    entropies = np.pad(z["entropies"], ((0, 0), (1, 0)))
    plan = lengths_from_starts(patch_starts_numpy(entropies, rule))
    wrong = sum(not np.array_equal(a, b[b > 0]) for a, b in zip(plan, z["patch_lengths"]))
    yield Case("DPAR: patch plans that differ", wrong, 0)
    layout = PatchLayout.from_lengths(plan, row_width=8)
    for encoding in ENCODINGS:
        model = _dpar_model(folder, encoding)
        logits = model(tokens, labels, layout)
        yield Case(f"DPAR {encoding}: logits", _largest(logits, z[f"logits_{encoding}"]), LOGITS)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        yield Case(f"DPAR {encoding}: loss", abs(loss.item() - float(z[f"loss_{encoding}"])), 1e-5)
        rotary = model.patch_table(layout)
        yield Case(f"DPAR {encoding}: rotary table", _rotary_difference(rotary, layout, z[f"rope_{encoding}"]), 1e-6)
        if encoding == "4d":
            yield from _dpar_plans(model, tokens, labels, z)
            loss.backward()
            yield from _gradients(folder, model, z)
    yield from _training_trace(folder, tokens, labels, layout, z)
    gate = _gpt(folder, "llamagen_gpt_ucond")
    for run in sorted(name.removeprefix("gen_labels_") for name in z if name.startswith("gen_labels_")):
        yield from _generation(folder, gate, run, rule, z)


def _rotary_difference(rotary: Rotary, layout: PatchLayout, expected: np.ndarray) -> float:
    found = torch.stack([rotary.cos, rotary.sin], dim=-1).numpy()
    worst = 0.0
    for image, (first, end) in enumerate(zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist())):
        table = expected if expected.ndim == 3 else expected[image]
        worst = max(worst, _largest(found[first:end], table[: end - first]))
    return worst


def _dpar_plans(model: DPAR, tokens: Tensor, labels: Tensor, z: dict[str, Any]) -> Iterator[Case]:
    for plan in ("token", "static2", "entropy_nomax"):
        layout = PatchLayout.from_lengths(z[f"patch_lengths_alt_{plan}"], row_width=8)
        found = model(tokens, labels, layout)
        yield Case(f"DPAR 4d, plan {plan}: logits", _largest(found, z[f"logits_4d_alt_{plan}"]), LOGITS)
    layout = PatchLayout.from_lengths(z["prefix20_patch_lengths"], row_width=8)
    found = model(tokens[:, :20], labels, layout)
    yield Case("DPAR 4d, first 20 tokens: logits", _largest(found, z["prefix20_logits_4d"]), LOGITS)


def _gradients(folder: Path, model: DPAR, z: dict[str, Any]) -> Iterator[Case]:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    worst = max(_largest(gradients.get(n.removeprefix("grad_4d/")), z[n]) for n in z if n.startswith("grad_4d/"))
    yield Case("DPAR 4d: gradients", worst, 1e-5)
    file = folder / "dpar_reference_gradnorms.json"
    if file.exists():
        stored = json.loads(file.read_text("utf-8"))
        norms = stored.get("4d", stored)
        known = {n: v for n, v in norms.items() if n in gradients and isinstance(v, int | float)}
        worst = max(abs(float(gradients[n].norm()) - v) / max(abs(v), 1e-8) for n, v in known.items())
        yield Case(f"DPAR 4d: gradient norms of {len(known)} parameters, relative", worst, 1e-3)


def _training_trace(folder: Path, tokens: Tensor, labels: Tensor, layout: PatchLayout, z: dict[str, Any]) -> Iterator[Case]:
    model = _dpar_model(folder, "4d")  # in eval mode, as recorded
    optimizer = adamw(model.named_parameters(), OptimSettings(lr=1e-3))
    losses, norms = [], []
    for _ in range(len(z["train_loss_trace"])):
        loss = F.cross_entropy(model(tokens, labels, layout).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(clip_gradients(list(model.parameters()), 1.0)))
        losses.append(loss.item())
        optimizer.step()
    yield Case("DPAR 4d: losses of ten training steps", _largest(np.array(losses), z["train_loss_trace"]), 1e-3)
    yield Case("DPAR 4d: gradient norms of ten training steps", _largest(np.array(norms), z["train_gradnorm_trace"]), 1e-2)


def _generation(folder: Path, gate: GPT, run: str, rule: PatchRule, z: dict[str, Any]) -> Iterator[Case]:
    name, _, scale = run.partition("_cfg")
    encoding = cast(PositionEncoding, name)
    labels = _tensor(z[f"gen_labels_{run}"])
    generator = DPARGenerator(_dpar_model(folder, encoding), gate, _greedy(float(scale), rule))
    sampled = generator.generate(labels, [0] * len(labels), keep_logits=True)
    wrong = int((sampled.tokens.numpy() != z[f"gen_tokens_{run}"]).sum())
    yield Case(f"DPAR {run}: greedy tokens that differ", wrong, 0)
    plans = zip(sampled.patch_lengths, z[f"gen_patch_lengths_{run}"])
    yield Case(f"DPAR {run}: patch plans that differ", sum(not np.array_equal(a, b[b > 0]) for a, b in plans), 0)
    yield Case(f"DPAR {run}: entropies, nats", _largest(sampled.entropies[:, 1:], z[f"gen_entropies_{run}"]), 1e-4)
    if f"gen_logits_{run}" in z:
        yield Case(f"DPAR {run}: guided logits", _largest(sampled.logits, z[f"gen_logits_{run}"]), LOGITS)


def _intermediates(folder: Path) -> Iterator[Case]:
    z, batch = _load(folder / "dpar_intermediates.npz"), _load(folder / "dpar_reference.npz")
    tokens, labels = _tensor(batch["tokens"]), _tensor(batch["labels"])
    layout = PatchLayout.from_lengths(list(batch["patch_lengths"]), row_width=8)
    counts = layout.offsets.diff().tolist()
    for encoding in ENCODINGS:
        model = _dpar_model(folder, encoding)
        with torch.inference_mode():
            x, patches = model.encode(tokens[:, :-1], layout)
            states = model.transform_patches(patches, labels, layout)
            expected = z[f"{encoding}_patch_states"]
            rows = np.concatenate([expected[image, :count] for image, count in enumerate(counts)])
            yield Case(f"DPAR {encoding}: patch states", _largest(states[: layout.patches], rows), LOGITS)
            if encoding == "4d":
                yield Case("DPAR 4d: encoder tokens", _largest(x, z["4d_encoder_tokens"]), LOGITS)
                whole = z["4d_patch_embeddings"]
                rows = np.concatenate([whole[image, : count - 1] for image, count in enumerate(counts)])
                yield Case("DPAR 4d: patch embeddings", _largest(patches[: len(rows)], rows), LOGITS)
                decoded = model.decode(x, states, layout)
                yield Case("DPAR 4d: decoder states", _largest(decoded, z["4d_decoder_states"]), LOGITS)


def _patcher(folder: Path) -> Iterator[Case]:
    z = _load(folder / "patcher_cases.npz")
    entropies = np.pad(z.pop("entropies").astype(np.float32), ((0, 0), (1, 0)))
    wrong, plans = 0, 0
    for name, expected in z.items():
        mode, *rest = name.split("/")
        values = {part[0]: part[1:] for part in rest[:-1]}
        longest = None if values["m"] == "none" else int(values["m"])
        rule = PatchRule(MODES[mode], 16, float(values["t"]) if "t" in values else None, longest)
        given = entropies if rest[-1] == "next" else entropies[:, :-1]
        found = lengths_from_starts(patch_starts(torch.from_numpy(given), rule).numpy())
        fast = lengths_from_starts(patch_starts_numpy(given, rule))
        # Plans that do not read entropies are stored once for all images.
        for a, b, c in zip(found, fast, expected if len(expected) > 1 else np.repeat(expected, len(found), axis=0)):
            plans += 1
            wrong += not (np.array_equal(a, c[c > 0]) and np.array_equal(a, b))
    yield Case(f"patch plans that differ, of {plans}", wrong, 0)


def _filters(folder: Path) -> Iterator[Case]:
    z = _load(folder / "sampling_filters.npz")
    logits = torch.from_numpy(z.pop("logits"))
    for name, expected in z.items():
        values = {part[0]: float(part[1:]) for part in name.removeprefix("probs_").split("_")}
        kept = filter_logits(logits, temperature=values["T"], top_k=int(values["k"]), top_p=values["p"])
        yield Case(f"sampling filter {name}", _largest(kept.softmax(dim=-1), expected), 1e-6)


def _evaluator(folder: Path) -> Iterator[Case]:
    z = _load(folder / "adm_evaluator.npz")

    def distance(sample: str, reference: str, count: int | None = None) -> float:
        a, b = (metrics.FeatureMoments.of(z[name][:count]) for name in (sample, reference))
        return metrics.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

    yield Case("evaluator: FID, relative", _relative(distance("sample_pool", "ref_pool"), z["fid"]), 1e-6)
    yield Case("evaluator: sFID, relative", _relative(distance("sample_spatial", "ref_spatial"), z["sfid"]), 1e-6)
    yield Case("evaluator: sFID of maps against stored statistics, relative", _spatial_order(z), 1e-6)
    yield Case("evaluator: FID of 40, relative", _relative(distance("sample_pool", "ref_pool", 40), z["fid_40"]), 1e-6)
    for name, key, size in (("sample", "is_sample", 5000), ("ref", "is_ref", 5000), ("sample", "is_sample_split128", 128)):
        found = metrics.inception_score(z[f"{name}_softmax"], split_size=size)
        yield Case(f"evaluator: IS ({key}), relative", _relative(found, z[key]), 1e-6)
    paths = (("", 1, 512, 1 / 512), ("_300", 1, 300, 2 / 300), ("_fp32path", z["fp32path_scale"], 512, 1e-9))
    for ending, factor, count, tolerance in paths:
        pair = metrics.precision_recall(z["ref_pool"] * factor, z["sample_pool"][:count] * factor)
        yield Case(f"evaluator: precision{ending}", abs(pair.precision - float(z[f"precision{ending}"])), tolerance)
        yield Case(f"evaluator: recall{ending}", abs(pair.recall - float(z[f"recall{ending}"])), tolerance)


def _spatial_order(z: dict[str, np.ndarray]) -> float:
    """Return how far the sFID of maps as torch gives them is from the recorded one, relative.

    The recorded spatial features of the samples are put back into maps of 2 rows, 4 columns and 6 channels, in the order
    of the evaluator (row, column, channel); the reference is the recorded statistics `mu_s, sigma_s`, as ADM publishes
    them. Flattened channel first, the distance is 34 instead of 2.35.
    """
    recorded = torch.from_numpy(z["sample_spatial"])
    maps = recorded.view(len(recorded), 2, 4, 6).permute(0, 3, 1, 2).contiguous()  # (n, channels, rows, columns)
    found = metrics.FeatureMoments.of(flatten_spatial(maps).numpy())
    distance = metrics.frechet_distance(found.mean, found.covariance, z["mu_s_ref"], z["sigma_s_ref"])
    return _relative(distance, z["sfid"])
