"""A whole artifacts/ folder of a tiny run: real stages where they take no time, random weights and made-up curves else."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import torch
from ruamel.yaml import YAML

from dpar_core.data.shards import TokenShards
from dpar_core.evaluation.protocol import Interval, Protocol, Scores
from dpar_core.files import save_weights, write_json, write_record
from dpar_core.models.dpar import DPAR, DPARConfig
from dpar_core.models.gpt import GPT, GPTConfig
from dpar_core.models.vq import VQ
from dpar_core.patches.maps import PatchMaps
from dpar_core.turns import Turns
from pipeline.report.page import Inputs
from pipeline.runner import STAGES, load_stage
from stages.params import Params, parse_params, select
from stages.shared.configs import vq_config
from stages.shared.pace import Pace, write_pace
from stages.tracker import NullTracker
from tests.helpers.paths import ROOT

SIZE, GRID, CODES = 16, 4, 16
SCORES = {"eval/fd_demo": 20.0, "eval/is_demo": 3.0, "eval/precision": 0.5, "eval/recall": 0.25, "eval/kid_demo": 0.1}


def tiny_params(**sections: dict) -> Params:
    """Return the demo's params cut down to 4 x 4 tokens of 16 pixels; keyword sections change values."""
    raw = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    raw["data"] |= {"image_size": SIZE}
    raw["data"]["builtin"] |= {"train_crops": 18, "validation_crops": 18, "crop_min": 48, "crop_max": 64}
    raw["tokenizer"] |= {
        "codebook_size": CODES,
        "codebook_dim": 4,
        "base_width": 8,
        "channel_multipliers": [1, 1, 1],
        "z_channels": 8,
        "norm_groups": 4,
    }
    raw["tokenize_images"] |= {"shard_images": 9}
    raw["entropy_model"] |= {"width": 16, "heads": 1, "layers": 1, "ffn_multiple": 16}
    raw["model"] |= {"width": 32, "heads": 2, "patch_layers": 1, "decoder_layers": 1, "ffn_multiple": 32}
    raw["train"] |= {"steps": 500}
    raw["sample"] |= {"images": 18, "batch_size": 18}
    raw["score"] |= {"images": 18, "allow_singular": True}
    raw["report"] |= {"examples": 4}
    for name, values in sections.items():
        raw[name] |= values
    return parse_params(raw)


def run_stage(name: str, root: Path, params: Params) -> None:
    """Run a real stage in a folder."""
    stage = load_stage(name)
    inputs, outputs = stage.bind(root)
    for path in vars(outputs).values():
        path.parent.mkdir(parents=True, exist_ok=True)
    work = root / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    stage.run(select(params, stage.params), inputs, outputs, NullTracker(), device="cpu", work=work)


@torch.no_grad()
def random_weights(model: torch.nn.Module, seed: int, *, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Give a model weights that make it prefer something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(parameter.mean() + scale * torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


def write_curves(folder: Path, losses: list[tuple[int, float]], *, seconds: float) -> None:
    """Write curve.csv and timings.json of a training that took `seconds`, at an even rate."""
    last = losses[-1][0]
    with open(folder / "curve.csv", "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["step", "train/loss", "validation/loss"])
        writer.writerows([step, loss - 0.1, loss] for step, loss in losses)
    rate = 32 * last / seconds
    points = [{"step": step, "seconds": seconds * step / last, "images_per_s": rate} for step, _ in losses]
    write_record(folder / "timings.json", {"seconds": seconds, "images_per_s": rate, "curve": points})
    write_json(folder / "metrics.json", {"validation/loss": losses[-1][1]})


def write_speed(file: Path, dpar: list[float], baseline: list[float]) -> None:
    """Write the seconds of both models' turns: per step (training.json) or per image (sampling.json)."""
    unit, images = ("step", 32) if file.stem == "training" else ("image", 18)
    write_pace(file, Pace(unit, images, Turns(tuple(dpar), tuple(baseline))))


def write_scores(file: Path, *, splits: int = 10, intervals: dict | None = None, features: int = 8, **values: float) -> None:
    """Write a score file; values by short name (fd_demo=12.0), intervals by full name, features an image has."""
    scores = SCORES | {f"eval/{name}": value for name, value in values.items()}
    given = {"eval/fd_demo": 1.0, "eval/is_demo": 0.2} if intervals is None else {}
    ends = {name: (scores[name] - half, scores[name] + half) for name, half in given.items()} | (intervals or {})
    protocol = Protocol("demo", "f" * 16, "train", "r" * 16, 18, 18, SIZE, SIZE, ("samples.npz",), 3, splits)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_record(
        file, Scores(scores, {name: Interval(*two) for name, two in ends.items()}, protocol, {}, features).to_json()
    )


def write_artifacts(root: Path, params: Params, *, ratio: float = 1.04, snapshot_step: int = 480) -> Inputs:
    """Write everything that the report reads below root/artifacts.

    Both models train for 500 steps. ratio: how many times as fast as the baseline's per step of DPAR is (FLOPs allow 1.06).
    """
    torch.set_num_threads(1)
    made = root / "artifacts"
    run_stage("data", root, params)
    vq = vq_config(params.tokenizer)
    state = random_weights(VQ(vq), 1)
    tokenizer = save_weights(
        made / "tokenizer/tokenizer.safetensors", state, kind="vq", config=asdict(vq), meta={"image_size": SIZE}
    )
    metrics = {"psnr_db": 12.3, "ssim": 0.4, "codes_used": 9, "perplexity": 7.5, "codebook_use": 0.56}
    write_json(made / "tokenizer/metrics.json", {f"tokenizer/{name}": value for name, value in metrics.items()})
    run_stage("tokenize_images", root, params)
    shards = TokenShards(made / "tokens", "train")
    meta = {"tokenizer": tokenizer, "tokens": shards.digest, "classes": list(shards.meta.classes)}

    def save(path: str, model: torch.nn.Module, kind: str, seed: int, **more: object) -> None:
        weights = random_weights(model, seed)
        save_weights(made / path, weights, kind=kind, config=asdict(model.config), meta={**meta, **more})

    gate = GPTConfig(CODES, GRID, 16, 1, 1, ffn_multiple=16)
    save("entropy_model/model.safetensors", GPT(gate), "gpt", 2)
    write_curves(made / "entropy_model", [(50, 2.7), (100, 2.6)], seconds=3.0)
    run_stage("entropies", root, params)
    run_stage("patch_maps", root, params)
    assert PatchMaps(made / "patch_maps", shards).made_by.entropy_model
    classes = len(shards.meta.classes)
    dpar = DPARConfig(CODES, GRID, 32, 2, 1, 1, 1, classes, 32)
    baseline = GPTConfig(CODES, GRID, 32, 2, 3, ffn_multiple=32, num_classes=classes)
    save("models/dpar/model.safetensors", DPAR(dpar), "dpar", 3, step=500)
    save("models/llamagen/model.safetensors", GPT(baseline), "gpt", 4, step=500)
    save("models/llamagen/equal_time.safetensors", GPT(baseline), "gpt", 5, step=snapshot_step)
    write_curves(made / "models/dpar", [(100, 2.7), (300, 2.5), (500, 2.4)], seconds=10.0)
    write_curves(made / "models/llamagen", [(100, 2.65), (300, 2.5), (500, 2.42)], seconds=10.0 * ratio)
    run_stage("sample_dpar", root, params)
    run_stage("sample_llamagen", root, params)
    write_speed(made / "speed/training.json", [0.02] * 8, [0.02 * ratio] * 8)
    write_speed(made / "speed/sampling.json", [0.1] * 8, [0.095] * 8)
    for name in ("dpar", "llamagen", "llamagen_equal_time"):
        write_scores(made / f"scores/{name}.json")
    return Inputs(**{name: root / path for name, path in STAGES["report"].inputs.items()})


def edit_json(file: Path, **values: object) -> None:
    """Change entries of a JSON file; its digest, where it has one, follows."""
    content = json.loads(file.read_text())
    (write_record if "digest" in content else write_json)(file, content | values)
