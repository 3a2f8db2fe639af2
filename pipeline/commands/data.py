"""`dpar-cli data ...` and `dpar-cli patches ...`: looking at data, checking it, choosing a threshold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dpar_core.choices import READ_ENTROPIES
from pipeline.project import project_folder

data_app = typer.Typer(
    no_args_is_help=True, help="Look at an image through every step, or check tokens and maps against their digests."
)


class _ImageByDefault(TyperGroup):
    """`patches FILE` means `patches image FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["image", *args]
        return super().parse_args(ctx, args)


patches_app = typer.Typer(
    cls=_ImageByDefault,
    no_args_is_help=True,
    help="Show the patches of an image file (`dpar-cli patches IMAGE`), or how long patches would be for other thresholds "
    "(`dpar-cli patches stats`).",
)


@patches_app.command("image")
def patches_image(
    image: Annotated[Path, typer.Argument(help="Any image file.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("patches.png"),
) -> None:
    """Show an image's entropy map and patches with the trained models. `dpar-cli patches IMAGE` does the same.

    Reads the image, the tokenizer, the entropy model and the patch rule under artifacts/ (made by `dpar-cli run`);
    writes one PNG: image, entropies in nats, patch borders.

        dpar-cli patches photo.jpg --out patches.png
    """
    from pipeline.report.overlay import draw_patches
    from stages.terminal import print_fitted

    print_fitted(draw_patches(image, out, artifacts=_artifacts()))


@patches_app.command("stats")
def patches_stats(
    thresholds: Annotated[
        str | None, typer.Option(help="Nats: FIRST:LAST:STEP, or numbers with commas; else quantiles of the entropies.")
    ] = None,
    max_lengths: Annotated[
        str | None,
        typer.Option(help="Tokens, with commas, none: no maximum; else 1, 2, 4, 8 and patching.max_patch_length."),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="entropy_rows (patches end with their row) or entropy; else patching.mode.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
    maps: Annotated[int, typer.Option(min=1, help="Views to look at, chosen at random.")] = 20_000,
    out: Annotated[Path, typer.Option(help="PNG of the curves to write.")] = Path("patch_stats.png"),
) -> None:
    """Print how long patches would be for other thresholds and maximum lengths, and draw the curves.

    Reads params.yaml, artifacts/tokens and artifacts/entropies (made by `dpar-cli run entropies`); trains and changes
    nothing. To take a threshold over: set patching.threshold in params.yaml and patching.target_mean_length to null, then
    `dpar-cli run`.

        dpar-cli patches stats --thresholds 7.6:8.1:0.1 --max-lengths 1,2,4,8
    """
    from pipeline.report.curves import draw_curves
    from stages.artifacts import ENTROPIES, TOKENS
    from stages.params import load_params
    from stages.terminal import shortened, table, wrapped
    from stages.tools.patch_stats import parse_max_lengths, parse_range, patch_stats

    artifacts = _artifacts()
    patching = load_params(Path("params.yaml")).patching
    rule = mode or patching.mode
    if rule not in READ_ENTROPIES:
        named = f"--mode {rule}" if mode else f"patching.mode {rule} of params.yaml"
        raise ValueError(f"{named} has no threshold: give --mode {' or --mode '.join(READ_ENTROPIES)}")
    longest = [1, 2, 4, 8, patching.max_patch_length] if max_lengths is None else parse_max_lengths(max_lengths)
    stats = patch_stats(
        TOKENS.below(artifacts),
        ENTROPIES.below(artifacts),
        thresholds=None if thresholds is None else parse_range(thresholds),
        max_lengths=sorted(set(longest), key=lambda most: most or math.inf),
        mode=rule,
        split=split,
        limit=maps,
    )
    whole = "all" if stats.whole else "a sample of"
    print(wrapped(f"{rule}, {whole} {stats.maps:,} {split} views of {stats.tokens} tokens"))
    rows = [
        (
            "any" if cell.max_length == 1 else f"{cell.threshold:g}",
            "none" if cell.max_length is None else str(cell.max_length),
            f"{cell.mean_length:.2f}",
            f"{cell.patches:.1f}",
            f"{cell.low:.0f} to {cell.high:.0f}",
            f"{cell.fewest.patches:.1f} {shortened(cell.fewest.name, 12)}",
            f"{cell.most.patches:.1f} {shortened(cell.most.name, 12)}",
        )
        for cell in stats.cells
        if cell.max_length != 1 or cell.threshold == stats.cells[0].threshold
    ]
    print(table(("nats", "max", "length", "patches", "90 % of them", "fewest", "most"), rows))
    draw_curves(stats, out)
    print(out)


@data_app.command("inspect")
def data_inspect(
    key: Annotated[str, typer.Argument(help="Key of an image, or the end of its path, as cats/0001.jpg.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("inspect.png"),
) -> None:
    """Show an image, its views, tokens, entropies and patches.

    Reads params.yaml and what there is under artifacts/ (`dpar-cli run` makes it); writes one PNG, a row for each view.
    """
    from dpar_core.files import atomic_path
    from dpar_core.pictures import save_png
    from stages.params import load_params
    from stages.terminal import print_fitted
    from stages.tools.inspect_data import describe, draw_inspection, inspect_image

    found = inspect_image(key, artifacts=_artifacts(), data=load_params(Path("params.yaml")).data)
    print_fitted(describe(found))
    with atomic_path(out) as temporary:
        save_png(draw_inspection(found), temporary)
    print(out)


@data_app.command("check")
def data_check(
    repair: Annotated[bool, typer.Option("--repair", help="Make what is missing or damaged again, no more.")] = False,
) -> None:
    """Read every shard, index and map, and list what is missing, damaged, or does not belong together.

    Reads artifacts/data, tokens, entropies and patch_maps; changes nothing without --repair. Exit 1 when something is
    wrong (with --repair: still wrong). What a repair cannot mend names the stage to run.
    """
    from stages.terminal import print_fitted
    from stages.tools.check_data import check_data, repair_data
    from stages.tracker import PrintTracker

    artifacts = _artifacts()
    mended: list[str] = []
    if repair:
        from pipeline.runner import device_of, set_threads
        from stages.params import load_params

        params = load_params(Path("params.yaml"))
        set_threads(params.compute)
        work, device = artifacts.parent / "work" / "repair", device_of(params.compute)
        mended, report = repair_data(artifacts, params, device=device, work=work, tracker=PrintTracker())
    else:
        report = check_data(artifacts, PrintTracker())
    for name in mended:
        print(f"{name} made again")
    for problem in report.problems:
        print_fitted(problem)
    print_fitted(f"{report.files} files, {report.bytes:,} bytes read, {len(report.problems)} problems")
    if report.problems:
        if not repair and any(problem.repairable for problem in report.problems):
            print_fitted("`dpar-cli data check --repair` makes missing and damaged files again")
        raise SystemExit(1)


def _artifacts() -> Path:
    from stages.artifacts import FOLDER

    return project_folder() / FOLDER
