"""Stage report: one offline page that sets DPAR beside its LlamaGen twin, with the pictures behind the numbers."""

from __future__ import annotations

import base64
import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpar_core import flops
from dpar_core.dpar import DPARConfig
from dpar_core.files import atomic_folder, load_weights, read_weights_header, write_json
from dpar_core.gpt import GPTConfig
from dpar_core.patch_maps import EntropyMaps, PatchMaps
from dpar_core.pictures import patch_overview, save_png
from dpar_core.shards import TokenShards
from dpar_core.tokenizer import VQ, VQConfig, to_uint8
from pipeline.charts import bar_chart, line_chart
from stages import params as P
from stages.tracker import Tracker

# Table of the paper (arXiv 2512.21867; LlamaGen 2406.06525): ImageNet, 50,000 samples, ADM evaluator.
PUBLISHED = [
    ("LlamaGen-B", "111M", 5.46, 193.61, 0.84, 0.46, 256),
    ("DPAR-B (cfg 2.1)", "120M", 3.98, 250.62, 0.83, 0.49, 142),
    ("LlamaGen-L", "343M", 3.80, 248.30, 0.83, 0.52, 256),
    ("DPAR-L (cfg 1.9)", "352M", 2.93, 269.34, 0.81, 0.56, 142),
    ("LlamaGen-XL", "775M", 3.39, 227.10, 0.81, 0.54, 256),
    ("DPAR-XL (cfg 2.0)", "789M", 2.67, 281.65, 0.82, 0.56, 142),
    ("LlamaGen-384-B", "111M", 6.09, 182.53, 0.84, 0.42, 576),
    ("DPAR-384-B (cfg 2.1)", "120M", 4.29, 254.54, 0.83, 0.47, 280),
    ("LlamaGen-384-L", "343M", 3.07, 256.06, 0.83, 0.52, 576),
    ("DPAR-384-L (cfg 1.9)", "352M", 2.79, 283.84, 0.81, 0.55, 280),
    ("LlamaGen-384-XL", "775M", 2.62, 244.08, 0.80, 0.57, 576),
    ("DPAR-384-XL (cfg 1.9)", "789M", 2.60, 285.43, 0.81, 0.57, 280),
    ("LlamaGen-384-XXL", "1.4B", 2.34, 253.91, 0.81, 0.60, 576),
    ("DPAR-384-XXL (cfg 1.75)", "1.4B", 2.30, 287.37, 0.82, 0.59, 280),
]
ROWS = ("dpar", "llamagen", "llamagen_equal_time")
NAMES = {"dpar": "DPAR", "llamagen": "LlamaGen twin", "llamagen_equal_time": "twin, equal time"}


@dataclass(frozen=True)
class Params:
    report: P.Report


@dataclass(frozen=True)
class Inputs:
    manifest: Path
    tokenizer: Path
    tokens: Path
    entropy_model: Path
    entropies: Path
    patch_maps: Path
    histogram: Path
    models: Path
    samples: Path
    scores: Path


@dataclass(frozen=True)
class Outputs:
    report: Path


@dataclass(frozen=True)
class Comparison:
    """One quantity of DPAR and of the twin. winner: "DPAR", "twin" or "" when the intervals overlap."""

    name: str
    dpar: str
    twin: str
    winner: str


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write index.html with everything inside it, the pictures beside it, and the headline as JSON."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    facts = gather(inputs)
    with atomic_folder(outputs.report) as folder:
        examples = draw_examples(inputs, folder, params.report.examples)
        facts |= {
            "examples": [_inline(folder / name) for name in examples],
            "reconstructions": _inline(inputs.tokenizer / "reconstructions.png"),
            "grids": {NAMES[name]: _inline(inputs.samples / name / "grid.png") for name in ROWS},
        }
        environment = Environment(loader=PackageLoader("pipeline"), autoescape=select_autoescape(), trim_blocks=True)
        page = environment.get_template("report.html.j2").render(**facts)
        (folder / "index.html").write_text(page)
        write_json(folder / "headline.json", {"headline": facts["headline"], "verdicts": facts["verdicts"]})
    for name in examples[:3]:
        tracker.log_picture(outputs.report / name)
    tracker.log_artifact(outputs.report / "index.html")


def gather(inputs: Inputs) -> dict[str, Any]:
    """Collect every number of the page from the artifacts."""
    scores = {name: json.loads((inputs.scores / f"{name}.json").read_text()) for name in ROWS}
    if len({score["protocol_id"] for score in scores.values()}) > 1:
        raise ValueError("scores were made under different protocols and are not compared: run `dvc repro` to score anew")
    curves = {name: _curve(inputs.models / name / "curve.csv") for name in ("dpar", "llamagen")}
    timings = {name: json.loads((inputs.models / name / "timings.json").read_text()) for name in curves}
    seconds = {name: [(p["seconds"], p["step"]) for p in timing["curve"]] for name, timing in timings.items()}
    twin_steps = read_weights_header(inputs.models / "llamagen" / "equal_time.safetensors")["meta"].get("step")
    equal_step = twin_steps or _step_of(inputs, "llamagen_equal_time")
    loss = {name: dict(curve) for name, curve in curves.items()}
    patch = json.loads((inputs.patch_maps / "rule.json").read_text())
    shards = TokenShards(inputs.tokens, "train")
    per_image = _patches_per_image(inputs, shards)
    models = {name: read_weights_header(inputs.models / name / "model.safetensors")["config"] for name in curves}
    dpar_flops = flops.dpar_forward_flops(DPARConfig(**models["dpar"]), per_image)
    twin_flops = flops.gpt_forward_flops(GPTConfig(**models["llamagen"]))
    last = {name: curve[-1] for name, curve in curves.items()}
    times = {name: timing["seconds"] for name, timing in timings.items()}
    at_time = _interpolate(seconds["llamagen"], loss["llamagen"], times["dpar"])
    verdicts = {
        "at equal steps": compare(scores["dpar"], scores["llamagen"], last["dpar"][1], last["llamagen"][1]),
        "at equal training time": compare(scores["dpar"], scores["llamagen_equal_time"], last["dpar"][1], at_time),
    }
    by_time = {n: [(s, loss[n][step]) for s, step in seconds[n] if step in loss[n]] for n in curves}
    return {
        "headline": headline(verdicts),
        "verdicts": {k: [vars(c) for c in v] for k, v in verdicts.items()},
        "steps": last["dpar"][0], "equal_step": equal_step, "times": times,
        "equal_time_seconds": _seconds_at(seconds["llamagen"], equal_step),
        "speed": timings["dpar"]["images_per_s"] / timings["llamagen"]["images_per_s"],
        "images_per_s": {NAMES[n]: timings[n]["images_per_s"] for n in curves},
        "flops": {"DPAR": dpar_flops, "LlamaGen twin": twin_flops}, "flop_ratio": twin_flops / dpar_flops,
        "tokens": shards.meta.tokens, "patches": per_image, "rule": patch["rule"],
        "mean_length": shards.meta.tokens / per_image,
        "classes": shards.meta.classes, "image_size": shards.meta.image_size, "codebook": shards.meta.codebook_size,
        "published": PUBLISHED, "ours": [_our_row(name, scores[name], models, inputs) for name in ROWS],
        "distance_name": _distance_name(scores["dpar"]), "protocol": scores["dpar"]["protocol"],
        "protocol_id": scores["dpar"]["protocol_id"],
        "tokenizer": json.loads((inputs.tokenizer / "metrics.json").read_text()),
        "entropy_model": json.loads((inputs.entropy_model / "metrics.json").read_text()),
        "by_step": line_chart(curves, x="optimizer steps", y="validation loss", names=NAMES),
        "by_time": line_chart(by_time, x="seconds of training", y="validation loss", names=NAMES),
        "histogram": bar_chart(_histogram(inputs.histogram), x="tokens in a patch", y="share of patches"),
        "models": models, "entropy_limit": math.log(shards.meta.codebook_size),
        "protocol_cfg": scores["dpar"]["samples"].get("cfg_scale", "as in params.yaml"),
    }  # fmt: skip


def compare(ours: dict, twin: dict, our_loss: float, twin_loss: float) -> list[Comparison]:
    """Set every quantity side by side. Bootstrapped ones have a winner only when their intervals do not overlap."""
    rows = [Comparison("validation loss, nats a token", f"{our_loss:.3f}", f"{twin_loss:.3f}", _lower(our_loss, twin_loss))]
    for name, value in ours.items():
        if not name.startswith("eval/"):
            continue
        mine, other = ours["intervals"].get(name), twin["intervals"].get(name)
        higher = name.startswith(("eval/is", "eval/precision", "eval/recall"))
        winner = ""
        if mine and other:
            if mine[1] < other[0]:
                winner = "twin" if higher else "DPAR"
            elif other[1] < mine[0]:
                winner = "DPAR" if higher else "twin"
        rows.append(Comparison(name.removeprefix("eval/"), _shown(value, mine), _shown(twin[name], other), winner))
    return rows


def _shown(value: float, ends: list[float] | None) -> str:
    return f"{value:.3g}" + (f" ({ends[0]:.3g} to {ends[1]:.3g})" if ends else "")


def _lower(a: float, b: float) -> str:
    return "DPAR" if a < b else "twin" if b < a else ""


def headline(verdicts: dict[str, list[Comparison]]) -> list[str]:
    """Say in one sentence for each comparison who wins what."""
    sentences = []
    for when, rows in verdicts.items():
        loss, rest = rows[0], [row for row in rows[1:] if row.winner]
        who = {"DPAR": "DPAR has", "twin": "the twin has", "": "neither has"}[loss.winner]
        words = f"{when.capitalize()}, {who} the lower validation loss ({loss.dpar} for DPAR, {loss.twin} for the twin)"
        won = [f"{row.name} goes to {'DPAR' if row.winner == 'DPAR' else 'the twin'}" for row in rest]
        sentences.append(words + ("; " + ", ".join(won) if won else "; no difference in the images is beyond chance") + ".")
    return sentences


def _curve(path: Path) -> list[tuple[int, float]]:
    with open(path, newline="") as stream:
        return [(int(row["step"]), float(row["validation/loss"])) for row in csv.DictReader(stream)]


def _interpolate(seconds: list[tuple[float, int]], loss: dict[int, float], when: float) -> float:
    known = [(s, loss[step]) for s, step in seconds if step in loss]
    return float(np.interp(when, [s for s, _ in known], [value for _, value in known]))


def _seconds_at(seconds: list[tuple[float, int]], step: int) -> float:
    return float(np.interp(step, [n for _, n in seconds], [s for s, _ in seconds]))


def _step_of(inputs: Inputs, name: str) -> int:
    made_by = json.loads((inputs.samples / name / "samples.json").read_text())
    return int(made_by.get("model_step", 0))


def _patches_per_image(inputs: Inputs, shards: TokenShards) -> float:
    maps = PatchMaps(inputs.patch_maps, shards)
    count = len(shards) * shards.meta.num_views
    bits = np.load(inputs.patch_maps / "train.starts.npy", mmap_mode="r", allow_pickle=False)
    assert bits.shape[0] == len(shards) and maps.rule is not None
    return float(np.unpackbits(bits, axis=-1, count=shards.meta.tokens).sum() / count)


def _histogram(path: Path) -> list[tuple[str, float]]:
    with open(path, newline="") as stream:
        rows = [(row["length"], int(row["train"])) for row in csv.DictReader(stream)]
    total = sum(count for _, count in rows)
    return [(length, count / total) for length, count in rows][:24]


def _distance_name(score: dict) -> str:
    return next(name for name in score if name.startswith(("eval/fd_", "eval/fid"))).removeprefix("eval/")


def _our_row(name: str, score: dict, models: dict, inputs: Inputs) -> dict[str, Any]:
    is_dpar = name == "dpar"
    config = DPARConfig(**models["dpar"]) if is_dpar else GPTConfig(**models["llamagen"])
    metrics = json.loads((inputs.samples / name / "metrics.json").read_text())
    patches = next((v for k, v in metrics.items() if k in ("patch/patches_per_image", "patch/per_image")), None)
    find = {k.removeprefix("eval/"): v for k, v in score.items() if k.startswith("eval/")}
    return {
        "name": NAMES[name], "params": f"{config.num_parameters / 1e6:.2f}M", "scores": find,
        "steps": patches if is_dpar and patches else config.tokens,
    }  # fmt: skip


def draw_examples(inputs: Inputs, folder: Path, count: int) -> list[str]:
    """Draw validation images as the tokenizer sees them, with their entropies and patches; one a class first."""
    shards = TokenShards(inputs.tokens, "validation")
    maps, entropies = PatchMaps(inputs.patch_maps, shards), EntropyMaps(inputs.entropies, shards).all()
    weights = load_weights(inputs.tokenizer / "tokenizer.safetensors", kind="vq")
    vq = VQ(VQConfig(**weights.config)).eval()
    vq.load_state_dict(weights.state)
    order = sorted(range(len(shards)), key=lambda i: (list(shards.labels[:i]).count(shards.labels[i]), shards.labels[i]))
    names = []
    for number, index in enumerate(order[:count]):
        at = (np.array([index]), np.array([0]))
        tokens = torch.from_numpy(shards.tokens(*at).astype(np.int64)).view(1, shards.meta.row_width, -1)
        with torch.inference_mode():
            image = to_uint8(vq.decode(tokens))[0].numpy()
        picture = patch_overview(
            image, entropies[index * shards.meta.num_views], maps.lengths(*at)[0], shards.meta.row_width,
            threshold=maps.rule.threshold, title=shards.meta.classes[shards.labels[index]],
        )  # fmt: skip
        names.append(f"patches-{number:02d}.png")
        save_png(picture, folder / names[-1])
    return names


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
