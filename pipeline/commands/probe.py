"""`dpar-cli probe`: linear probe of the trained models' frozen features, as table, JSON and figure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stages.tools.probe import ProbeReport

# Top-1 and top-5 of the paper, ImageNet 256, frozen features
PUBLISHED = {"DPAR-L": (37.82, 61.15), "LlamaGen-L": (32.62, 56.61)}


def probe(
    models: Annotated[str, typer.Option(help="Trained models, separated by commas.")] = "dpar,llamagen",
    images: Annotated[int, typer.Option(min=0, help="Training images the probe is fitted on (0: all).")] = 5000,
    held_out: Annotated[int, typer.Option(min=0, help="Validation images it is tested on (0: all).")] = 5000,
    out: Annotated[Path | None, typer.Option(help="Folder for probe.json and probe.png; default artifacts/probe.")] = None,
) -> None:
    """Fit a linear classifier on the frozen features of every block of the trained models.

    Reads artifacts/models, artifacts/tokens and artifacts/patch_maps; the class token is the null class, so features do
    not know the label. Prints top-1 and top-5 on validation images; writes probe.json and probe.png. Train first:
    `dpar-cli run train_dpar train_llamagen`.
    """
    import torch

    from dpar_core.files import write_json
    from stages.artifacts import FOLDER, PROBE
    from stages.terminal import print_fitted

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name.strip() for name in models.split(",")]
    found = probe_models(names, images, held_out, device=device, artifacts=Path(FOLDER))
    out = out or Path(PROBE.path)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "probe.json", asdict(found))
    plot_accuracies(found, out / "probe.png")
    print_fitted(f"{table(found)}\n\n{out / 'probe.png'} shows every block")


def probe_models(names: list[str], images: int, held_out: int, *, device: str, artifacts: Path) -> ProbeReport:
    """Return for each model its blocks' shares of held-out images classified right, and what was used.

    artifacts: the folder that holds them. Raises ValueError for an unknown model.
    """
    from dpar_core.data.shards import TokenShards
    from stages.artifacts import MODELS, PATCH_MAPS, TOKENS
    from stages.tools.probe import ProbedModel, ProbeReport, features_of, load_model, probe
    from stages.tracker import PrintTracker

    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"--models names {unknown[0]!r}, expected some of {', '.join(MODELS)}")
    train, validation = (TokenShards(TOKENS.below(artifacts), split) for split in ("train", "validation"))
    tracker, results = PrintTracker(), {}
    for name in names:
        model, weights = load_model(MODELS[name].below(artifacts), train)
        splits = [
            features_of(model, shards, PATCH_MAPS.below(artifacts), count, tracker, device=device)
            for shards, count in ((train, images), (validation, held_out))
        ]
        blocks = probe(model, *splits)
        best = max(blocks, key=lambda block: block.top1)
        results[name] = ProbedModel(weights.digest, weights.meta["step"], best, blocks)
    used = {"train": len(splits[0].labels), "held_out": len(splits[1].labels), "classes": len(train.meta.classes)}
    return ProbeReport(results, used, train.digest)


def table(found: ProbeReport) -> str:
    """Lay out the best block of each model."""
    used = found.images
    lines = [
        f"fitted on {used['train']} images, tested on {used['held_out']} (the best block is chosen on them, too), "
        f"{used['classes']} classes",
        f"{'model':14}{'best block':>14}{'top-1 %':>10}{'top-5 %':>10}",
    ]
    for name, one in found.models.items():
        best = one.best
        lines.append(f"{name:14}{best.block:>14}{100 * best.top1:>10.2f}{100 * best.top5:>10.2f}")
    published = ", ".join(f"{name} {top1} / {top5}" for name, (top1, top5) in PUBLISHED.items())
    return "\n".join([*lines, f"published on ImageNet 256 (another data set than any of ours): {published}"])


def plot_accuracies(found: ProbeReport, path: Path) -> None:
    """Draw top-1 accuracy over the depth of each model."""
    from pipeline.figures import new_figure, save_figure

    figure, axes = new_figure(7, 4)
    for name, one in found.models.items():
        depth = [(number + 1) / len(one.blocks) for number in range(len(one.blocks))]
        axes.plot(depth, [100 * block.top1 for block in one.blocks], marker="o", label=name)
    chance = 100 / found.images["classes"]
    axes.axhline(chance, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="depth (share of blocks)", ylabel="top-1 on validation images, %")
    axes.set_title("Linear probe of frozen features")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
