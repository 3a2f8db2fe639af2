"""`dpar-cli sweep threshold` and `dpar-cli sweep cfg`: which sampling settings give the best images, and at what speed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pipeline.project import project_folder

if TYPE_CHECKING:
    from stages.params import Params
    from stages.tools.sweep import Search, Subject, SweepPlan, TrialResult

sweep_app = typer.Typer(
    no_args_is_help=True,
    help="Try sampling settings of the trained models with Ray Tune, score them, and write the best into params.yaml.",
)

Cfg = Annotated[str, typer.Option(help="Guidance scales: FIRST:LAST:STEP, or numbers with commas.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Longest patch in tokens while sampling; else as in params.yaml.")
]
TrialImages = Annotated[int, typer.Option(min=2, help="Images per trial of the search.")]
FinalImages = Annotated[int | None, typer.Option(min=0, help="Images of a final; else sample.images. 0: no finals.")]
Finalists = Annotated[int, typer.Option(min=1, help="Best trials of the search that are sampled again, with fresh seeds.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Trials at once. They share CPUs evenly; a GPU serves one.")]
SearchName = Annotated[str, typer.Option("--search", help="grid, or within its corners: random | optuna.")]
Trials = Annotated[int, typer.Option(min=1, help="Trials of a random or optuna search.")]
Name = Annotated[str | None, typer.Option(help="Folder under sweeps/. The same name again continues where it stopped.")]
Apply = Annotated[bool, typer.Option("--apply", help="Write the winner into the sample section of params.yaml.")]


@sweep_app.command("threshold")
def sweep_threshold(
    thresholds: Annotated[
        str | None,
        typer.Option(help="Nats: FIRST:LAST:STEP, or numbers with commas; else around the training one, by quantiles."),
    ] = None,
    cfg: Cfg = "1.0:3.0:0.5",
    max_length: MaxLength = None,
    images: TrialImages = 200,
    final_images: FinalImages = None,
    finalists: Finalists = 3,
    concurrency: Concurrency = 1,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Cut patches and train a DPAR at every threshold too (hours at full size).")
    ] = False,
    search: SearchName = "grid",
    trials: Trials = 20,
    name: Name = None,
    apply: Apply = False,
) -> None:
    """Sweep DPAR's sampling threshold and guidance scale, and print the best pair.

    Reads the models under artifacts/ (made by `dpar-cli run`) and params.yaml; without --retrain nothing is trained.
    Writes sweeps/NAME/: index.html, results.parquet, pictures; and an MLflow run with one run per trial (`dpar-cli ui`).
    After an interruption the same command continues. After --apply, `dpar-cli run` makes the final scores.

        dpar-cli sweep threshold --thresholds 7.6:8.2:0.1 --cfg 1.0:3.0:0.25 --apply
    """
    from stages.tools.sweep import Point, SweepPlan

    way = _checked_search(search, retrain=retrain)
    subject, params = subject_of("dpar", max_length)
    chosen = _training_thresholds(subject) if thresholds is None else _range(thresholds, "--thresholds")
    points = tuple(Point(threshold, scale) for threshold in chosen for scale in _range(cfg, "--cfg"))
    full = params.sample.images if final_images is None else final_images
    plan = SweepPlan(points, images, full, finalists, concurrency, way, trials)
    _run(name or "threshold", "dpar", subject, params, plan, retrain=retrain, apply=apply)


@sweep_app.command("cfg")
def sweep_cfg(
    cfg: Cfg = "1.0:3.0:0.25",
    model: Annotated[str, typer.Option(help="dpar or llamagen.")] = "dpar",
    images: TrialImages = 200,
    final_images: FinalImages = None,
    finalists: Finalists = 3,
    concurrency: Concurrency = 1,
    search: SearchName = "grid",
    trials: Trials = 20,
    name: Name = None,
    apply: Apply = False,
) -> None:
    """Sweep the guidance scale alone, of DPAR at its threshold or of its LlamaGen baseline.

    Reads, writes and continues as `dpar-cli sweep threshold` does; the folder is sweeps/cfg-MODEL/ unless named.

        dpar-cli sweep cfg --model llamagen --cfg 1.0:3.0:0.25
    """
    from stages.tools.sweep import Point, SweepPlan

    way = _checked_search(search, retrain=False)
    subject, params = subject_of(model, None)
    points = tuple(Point(None, scale) for scale in _range(cfg, "--cfg"))
    full = params.sample.images if final_images is None else final_images
    plan = SweepPlan(points, images, full, finalists, concurrency, way, trials)
    _run(name or f"cfg-{model}", model, subject, params, plan, retrain=False, apply=apply)


def _range(text: str, option: str) -> list[float]:
    from stages.tools.patch_stats import parse_range

    try:
        return list(dict.fromkeys(parse_range(text)))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _checked_search(search: str, *, retrain: bool) -> Search:
    if search not in ("grid", "random", "optuna"):
        raise ValueError(f"--search is {search!r}, expected grid, random or optuna")
    if retrain and search != "grid":
        raise ValueError(f"--retrain trains a model for each threshold of a grid: it does not go with --search {search}")
    return cast("Search", search)


def subject_of(model: str, max_length: int | None) -> tuple[Subject, Params]:
    """Return what params.yaml and artifacts/ offer to sweep."""
    from pipeline.commands.sample import files_of
    from pipeline.runner import device_of, set_threads
    from stages import artifacts, score
    from stages.params import load_params, select, settled
    from stages.tools.sweep import Subject

    root = project_folder()
    params = load_params(root / "params.yaml")
    device = device_of(params.compute)
    params = settled(params, device)
    set_threads(params.compute)
    files = files_of(model, root)
    manifest, features = (one.require(root / artifacts.FOLDER) for one in (artifacts.MANIFEST, artifacts.CLASSIFIER))
    section = params.sample
    if max_length is not None:
        section = section.model_copy(update={"max_patch_length": max_length})
    return Subject({None: files}, section, select(params, score.Params), manifest, features, device), params


def _training_thresholds(subject: Subject) -> list[float]:
    from dpar_core.data.shards import TokenShards
    from dpar_core.patches.maps import EntropyMaps, read_rule
    from stages.artifacts import ENTROPIES, FOLDER, TOKENS
    from stages.tools.patch_stats import SAMPLED_MAPS, thresholds_around

    file = subject.models[None].rule
    assert file is not None, "DPAR has a rule"
    rule = read_rule(file)
    if not rule.reads_entropies or rule.threshold is None:
        raise ValueError(f"patches of mode {rule.mode} follow no threshold: sweep the guidance with `dpar-cli sweep cfg`")
    tokens, entropies = (one.require(Path(FOLDER).absolute()) for one in (TOKENS, ENTROPIES))
    return thresholds_around(
        EntropyMaps(entropies, TokenShards(tokens, "train")).sample(SAMPLED_MAPS).entropies, rule.threshold
    )


def _run(name: str, model: str, subject: Subject, params: Params, plan: SweepPlan, *, retrain: bool, apply: bool) -> None:
    from dataclasses import replace
    from functools import partial

    from pipeline.sweep import output as sweep_output
    from pipeline.sweep.tracking import open_sweep
    from stages import artifacts
    from stages.params import guidance_fault
    from stages.terminal import print_fitted
    from stages.tools.sweep import check_points, sweep
    from stages.tools.sweep_models import retrain as train_models
    from stages.workers.lock import locked
    from stages.workers.tasks import remove_leftovers

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"--name is {name!r}, expected letters, digits, dots, dashes: it becomes a folder under sweeps/")
    root = Path.cwd()
    folder, work = root / "sweeps" / name, root / "work" / "sweeps" / name
    check_points(plan.points, subject.models[None])
    if fault := guidance_fault(params.model, max(point.cfg_scale for point in plan.points)):
        raise ValueError(fault)
    thresholds = list(dict.fromkeys(point.threshold for point in plan.points))
    count = len(plan.points) if plan.search == "grid" else plan.trials
    finals = f", then the best {min(plan.finalists, count)} again with {plan.final_images}" if plan.final_images else ""
    print_fitted(f"sweep {name}: {count} trials of {plan.images} images{finals}")
    scales = _listed(dict.fromkeys(point.cfg_scale for point in plan.points))
    settings = sweep_output.SweepSettings(
        model, _listed(thresholds), scales, plan.images, plan.final_images, plan.search, retrain
    )
    with (
        locked(work / ".lock", busy=partial(refuse_second, name)),
        open_sweep(name, settings, distance=subject.distance, root=root) as runs,
    ):
        for place in (work, folder):
            remove_leftovers(place)
        if retrain:
            models = train_models(
                params,
                [threshold for threshold in thresholds if threshold is not None],
                subject.models[None],
                tokens=root / artifacts.TOKENS.path,
                entropies=root / artifacts.ENTROPIES.path,
                folder=folder / "models",
                work=work / "models",
                device=subject.device,
                track=runs.stage,
            )
            subject = replace(subject, models=models)
        trials = folder / "trials"
        outcome = sweep(
            subject,
            plan,
            trials,
            work,
            runs.tracker,
            finished=lambda result: runs.log_trial(result, trials / f"{result.key}.png"),
        )
        for failed in outcome.failed:
            runs.log_failure(failed)
        command = reproduce(name, subject, outcome.winner(subject.distance), plan, model=model, retrain=retrain)
        facts = sweep_output.Facts(name, subject.distance, settings, outcome, command, subject.models[None])
        written = sweep_output.write(facts, folder)
        for path in written.tracked:
            runs.tracker.log_artifact(path)
        runs.log_outcome(facts, written.metrics, root)
    print(sweep_output.table(facts))
    winner = outcome.winner(subject.distance)
    if winner is None:
        raise RuntimeError(f"all {len(outcome.failed)} trials failed, the last with: {outcome.failed[-1].error}")
    if apply:
        print_fitted(apply_winner(root / "params.yaml", winner, with_threshold=model == "dpar"))
        if retrain:
            also = f"set patching.threshold to {winner.point.threshold!r} as well"
            print_fitted(f"the winner was trained at its threshold: {also}")
    print_fitted(f"report          {(folder / 'index.html').resolve().as_uri()}\ncompare trials  dpar-cli ui")
    if not apply:
        print_fitted("apply it        the same command with --apply, then `dpar-cli run`")


def refuse_second(name: str, holder: str) -> None:
    """Raise ValueError for a sweep that process `holder` runs already."""
    raise ValueError(f"sweep {name} is running already in process {holder}: wait for it, or give this one another --name")


def _listed(values: Any) -> str:
    return ",".join("training" if value is None else f"{value:.12g}" for value in values)


def reproduce(name: str, subject: Subject, winner: TrialResult | None, plan: SweepPlan, *, model: str, retrain: bool) -> str:
    """Return the command that samples and scores the winner again."""
    if winner is None:
        return ""
    point = winner.point
    kind = f"cfg --model {model}" if point.threshold is None else f"threshold --thresholds {point.threshold!r}"
    words = [f"dpar-cli sweep {kind} --cfg {point.cfg_scale!r}"]
    if subject.sample.max_patch_length is not None and point.threshold is not None:
        words.append(f"--max-length {subject.sample.max_patch_length}")
    words.append(f"--images {plan.images} --final-images {plan.final_images} --name {name}-winner")
    return " ".join([*words, *(["--retrain"] if retrain else [])])


def apply_winner(path: Path, winner: TrialResult, *, with_threshold: bool) -> str:
    """Write a winner's settings into the sample section of a params file, its comments untouched; return a sentence.

    Raises ParamsError when the file would not be valid; then it stays as it is.
    """
    from dpar_core.files import atomic_write
    from pipeline.presets.use import with_values
    from stages.params import parse_params

    values: dict[str, Any] = {"sample.cfg_scale": winner.point.cfg_scale}
    if with_threshold and winner.point.threshold is not None:
        values |= {"sample.threshold": winner.point.threshold, "sample.max_patch_length": winner.max_patch_length}
    text = with_values(path.read_text("utf-8"), values)
    from ruamel.yaml import YAML

    parse_params(YAML(typ="safe").load(text), where=path.name)
    atomic_write(path, text)
    changed = ", ".join(f"{key} {'null' if value is None else value}" for key, value in values.items())
    return f"{path.name} now has {changed}: `dpar-cli run` samples and scores with it"
