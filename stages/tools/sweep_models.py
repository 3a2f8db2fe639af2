"""Models for `dpar-cli sweep threshold --retrain`: patch maps and a DPAR trained anew for every threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from dpar_core.files import digest_of
from dpar_core.patches.maps import RULE
from stages import params as P
from stages import patch_maps, train
from stages.artifacts import CURVE, METRICS, TIMINGS, WEIGHTS, artifact_digest
from stages.shared.sampler import Files
from stages.tracker import Tracker

Track = Callable[[str, P.Params], AbstractContextManager[Tracker]]


def retrain(
    params: P.Params,
    thresholds: Sequence[float],
    files: Files,
    *,
    tokens: Path,
    entropies: Path,
    folder: Path,
    work: Path,
    device: str,
    track: Track,
) -> dict[float | None, Files]:
    """Cut patches and train a DPAR at each threshold; return threshold -> its files, None -> those given.

    folder: a model stays there as THRESHOLD-DIGEST/ and is taken from there when params and data are the same.
    work: an interrupted training goes on from its last checkpoint in it.
    track: opens a tracker for a stage.
    """
    models: dict[float | None, Files] = {None: files}
    for threshold in thresholds:
        patching = params.patching.model_copy(update={"threshold": threshold, "target_mean_length": None})
        train_params = train.Params(params.seed, params.model, params.train)
        inputs = [artifact_digest(tokens), artifact_digest(entropies)]
        content = [patching.model_dump(), params.seed, params.model.model_dump(), params.train.model_dump(), inputs]
        home = folder / f"{threshold:g}-{digest_of(content)[:8]}"
        maps, model = home / "patch_maps", home / WEIGHTS
        if not (maps / RULE).exists():
            cut = patch_maps.Outputs(maps, home / "patch_maps_metrics.json", home / "patch_lengths.csv")
            home.mkdir(parents=True, exist_ok=True)
            with track(f"patch_maps {threshold:.12g}", params) as tracker:
                patch_maps.run(
                    patch_maps.Params(patching),
                    patch_maps.Inputs(tokens, entropies),
                    cut,
                    tracker,
                    device=device,
                    work=_made(work / home.name / "patch_maps"),
                )
        if not model.exists():
            outputs = train.DPAROutputs(model, home / METRICS, home / CURVE, home / TIMINGS)
            with track(f"train_dpar {threshold:.12g}", params) as tracker:
                train.run_dpar(
                    train_params,
                    train.DPARInputs(tokens, maps),
                    outputs,
                    tracker,
                    device=device,
                    work=_made(work / home.name / "train"),
                )
        models[threshold] = Files(model, files.tokenizer, files.entropy_model, maps / RULE)
    return models


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
