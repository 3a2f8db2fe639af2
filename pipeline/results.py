"""What each stage found out, in one line, from the files that it wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.headline import read_headline, speeds
from stages import artifacts as A
from stages.artifacts import Artifact

Found = dict[str, Any]
BUSY = 0.20  # drift of the pace above which no speed is shown (see pipeline/report/speeds.py)


def result_line(stage: str, root: Path) -> str:
    """Return a stage's result in a few words; an empty text when its files are not there. root: the project's folder."""
    if stage not in _LINES:
        return ""
    file, words = _LINES[stage]
    try:
        found = json.loads((root / file.path).read_text("utf-8"))
        if stage in ("time_training", "time_sampling"):
            found["flops_allow"] = _flops_allow(root, stage.removeprefix("time_"))
        return words(found)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, StopIteration):
        return ""


# What the numbers of artifacts/metrics.json are.
MEANINGS = {
    "psnr_db": "reconstruction of the tokenizer, dB",
    "patches_per_image": "runs of the large transformer per image",
    "flops_saved": "share of the FLOPs that DPAR saves, forward",
    "dpar_loss": "validation loss of DPAR, nats per token",
    "baseline_loss": "of the baseline at equal steps",
    "baseline_loss_equal_time": "of the baseline at equal training time",
    "dpar_distance": "Frechet distance of DPAR, by score.features",
    "baseline_distance": "of the baseline at equal steps",
    "equal_time_step": "of the baseline, for equal training time",
    "training_speed": "times the baseline's, measured in turns",
    "sampling_speed": "times the baseline's, measured in turns",
}


def metrics_table(root: Path) -> str:
    """Return artifacts/metrics.json as a table. Raises FileNotFoundError, ValueError with the way out."""
    from dpar_core.files import read_json
    from stages.terminal import table

    found = read_json(A.SUMMARY_METRICS.require(root / A.FOLDER), way_out="run `dvc repro -sf report`")
    values = {name: f"{one:,}" if isinstance(one, int) else f"{one:.4g}" for name, one in found.items()}
    rows = [(name, values[name], words) for name, words in MEANINGS.items() if name in values]
    return table(("metric", "value", "what it is"), rows)


def _data(found: Found) -> str:
    images = f"{found['data/train_images']:,} training and {found['data/validation_images']:,} validation images"
    return f"{images}, {found['data/classes']:,} classes"


def _tokenizer(found: Found) -> str:
    used = found["tokenizer/codes_used"]
    return f"{found['tokenizer/psnr_db']:.1f} dB, {used:,} of {round(used / found['tokenizer/codebook_use']):,} codes"


def _tokens(found: Found) -> str:
    return (
        f"{found['tokens/images']:,} images in {found['tokens/shards']:,} shards, {found['tokens/bad_images']:,} unreadable"
    )


def _entropies(found: Found) -> str:
    return f"{found['facts']['mean_nats']:.2f} nats per token on average"


def _patches(found: Found) -> str:
    threshold = found.get("patch/threshold_nats")
    cut = "" if threshold is None else f", threshold {threshold:.2f} nats"
    return f"{found['patch/mean_length']:.2f} tokens per patch, {found['patch/patches_per_image']:.1f} per image{cut}"


def _loss(found: Found) -> str:
    return f"{found['validation/loss']:.3f} nats per token on validation after {found['steps']:,} steps"


def _flops_allow(root: Path, what: str) -> float:
    """Return the ratio of speeds that FLOPs allow, as the last report counted them; before the first report any."""
    if (headline := read_headline(root)) is None:
        return math.inf
    return speeds(headline)[what]["flops_allow"]


def _speed(found: Found) -> str:
    drift = max(found["drift"])
    if drift > BUSY:
        return f"the machine was busy (pace moved by {100 * drift:.0f} %): no speed"
    low, high = found["interval"]
    if low > found["flops_allow"]:
        return f"the machine was busy (ratio {found['ratio']:.2f}, where FLOPs allow {found['flops_allow']:.2f}): no speed"
    step = f"; baseline taken at step {found['equal_time']['step']:,}" if "equal_time" in found else ""
    return f"DPAR {found['ratio']:.2f} times the baseline ({low:.2f} to {high:.2f}){step}"


def _sampled(found: Found) -> str:
    return f"{found['sample/images']:,} images, {found['patch/patches_per_image']:.1f} runs of the transformer each"


def _scored(found: Found) -> str:
    from dpar_core.evaluation.protocol import scores_in
    from stages.terminal import figures

    scores = scores_in(found, Path("scores"))
    key = next(name for name in scores.values if name.startswith(("eval/fid", "eval/fd_")))
    interval = scores.intervals.get(key)
    ends = "" if interval is None else f" ({figures(interval.low, 3)} to {figures(interval.high, 3)})"
    return f"{key.removeprefix('eval/')} {figures(scores.values[key], 3)}{ends}"


def _report(found: Found) -> str:
    return str(found["headline"])


_LINES: dict[str, tuple[Artifact, Callable[[Found], str]]] = {
    "data": (A.DATA_METRICS, _data),
    "tokenizer": (A.TOKENIZER_METRICS, _tokenizer),
    "features": (A.CLASSIFIER_METRICS, lambda found: f"accuracy {found['features/validation_accuracy']:.2f} on validation"),
    "sources": (A.IMAGES_SEEN, lambda found: "files from outside, looked at on every run"),
    "tokenize_images": (A.TOKENS_METRICS, _tokens),
    "entropy_model": (A.TRAINED_ENTROPY_MODEL["metrics"], _loss),
    "entropies": (Artifact(f"{A.ENTROPIES.name}/{A.SUMMARY}", "entropies"), _entropies),
    "patch_maps": (A.PATCH_METRICS, _patches),
    "train_dpar": (A.TRAINED_DPAR["metrics"], _loss),
    "train_llamagen": (A.TRAINED_LLAMAGEN["metrics"], _loss),
    "time_training": (A.TRAINING_SPEED, _speed),
    "time_sampling": (A.SAMPLING_SPEED, _speed),
    "sample_dpar": (Artifact(f"{A.SAMPLES['dpar'].name}/{A.METRICS}", "sample_dpar"), _sampled),
    "sample_llamagen": (Artifact(f"{A.SAMPLES['llamagen'].name}/{A.METRICS}", "sample_llamagen"), _sampled),
    "score_dpar": (A.SCORES["dpar"]["scores"], _scored),
    "score_llamagen": (A.SCORES["llamagen"]["scores"], _scored),
    "report": (A.HEADLINE, _report),
}
