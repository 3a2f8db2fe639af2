"""Stage report: one offline page that compares DPAR with its LlamaGen baseline, with the pictures behind the numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpar_core.data.manifest import Manifest, read_manifest
from dpar_core.data.shards import TokenShards
from dpar_core.evaluation.protocol import DISTANCE_NAMES
from dpar_core.files import atomic_folder, atomic_write, read_weights_header, write_json
from dpar_core.models.configs import GPTConfig
from dpar_core.patches.maps import EntropyMaps, PatchMaps
from dpar_core.patches.rule import PatchRule
from dpar_core.pictures import colour_bar, save_png
from dpar_core.secrets import redacted
from dpar_core.training.order import fixed_subset
from pipeline.headline import Headline, Ratio
from pipeline.presets.published import PUBLISHED
from pipeline.report.charts import (
    Dot,
    Series,
    bar_chart,
    difference_plot,
    dot_chart,
    graph,
    interval_plot,
    line_chart,
    picture_file,
)
from pipeline.report.facts import (
    MODELS,
    Costs,
    EqualTime,
    PatchFacts,
    TrainingFacts,
    contests,
    count_costs,
    count_patches,
    equal_time,
    held_out_losses,
    measured_speeds,
    project_of,
    read_json,
    read_training,
    scores_of,
)
from pipeline.report.pictures import data_uri, examples, real_cells, sample_cells
from pipeline.report.provenance import read_provenance
from pipeline.report.speeds import DRIFT, Speed, Speeds
from pipeline.report.verdicts import FEWEST_STEPS, Contest, Estimate, score_columns, score_name, together
from stages import params as P
from stages.artifacts import (
    HEADLINE,
    LENGTHS_PICTURE,
    LOSSES_PICTURE,
    METRICS,
    REPORT_PAGE,
    SAMPLE_PROTOCOL,
    TOKENIZER,
    artifact_digest,
)
from stages.terminal import duration
from stages.tracker import Tracker

PAGE = Path(REPORT_PAGE.name).name
MOST_CLASSES = 24  # bars of patches by class
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Params:
    """All sections but `compute`: the page shows them."""

    seed: int
    data: P.Data
    tokenizer: P.Tokenizer
    tokenize_images: P.TokenizeImages
    entropy_model: P.EntropyModel
    entropies: P.Entropies
    patching: P.Patching
    model: P.Model
    train: P.Train
    sample: P.Sample
    score: P.Score
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
    speed: Path
    samples: Path
    scores: Path


@dataclass(frozen=True)
class Outputs:
    report: Path
    metrics: Path


def run(params: Params, inputs: Inputs, outputs: Outputs, tracker: Tracker, *, device: str, work: Path) -> None:
    """Write index.html with everything inside it, the patch pictures beside it, and the verdicts as headline.json.

    Raises ValueError or FileNotFoundError in a sentence when artifacts are missing or do not belong together.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    for file in sorted(inputs.scores.glob("*.json")):
        tracker.log_input(f"scores {file.stem}", file, artifact_digest(file))
    manifest = read_manifest(inputs.manifest)
    train, held_out = (TokenShards(inputs.tokens, split) for split in ("train", "validation"))
    maps = PatchMaps(inputs.patch_maps, held_out)
    trainings = {name: read_training(inputs.models / name) for name in ("dpar", "llamagen")}
    gate = read_training(inputs.entropy_model)
    assert isinstance(gate.config, GPTConfig), "the entropy model is a GPT"
    patches = count_patches(inputs.patch_maps, inputs.histogram, train)
    costs = count_costs(trainings, gate.config, patches, inputs.samples)
    speeds = measured_speeds(inputs.speed, costs)
    times = equal_time(trainings, inputs.models, speeds.training)
    labels = model_labels(inputs.models)
    losses = {name: held_out_losses(inputs.models / file, held_out, maps, device=device) for name, file in MODELS.items()}
    seen = trainings["dpar"].steps * params.train.batch_size
    chance = math.log(train.meta.codebook_size)
    rounds = contests(losses, inputs.scores, times, speeds.training, seen=seen, images=len(train), chance=chance)
    entropies = EntropyMaps(inputs.entropies, held_out)
    shown = examples(
        manifest, inputs.tokenizer / Path(TOKENIZER.name).name, held_out, entropies, maps, count=params.report.examples
    )
    low = min(float(one.entropies[1:].min()) for one in shown)
    high = max(float(one.entropies[1:].max()) for one in shown)
    typical = min(shown, key=lambda one: abs(len(one.lengths) - patches.mean))
    facts = {
        "params": params,
        "setting": setting(params, manifest, train),
        "badge": badge(params, manifest, trainings["dpar"].steps),
        "headline": together(*rounds),
        "compared_losses": len(losses["dpar"]),
        "curve_images": len(fixed_subset(len(held_out), params.train.validation_images)),
        "contests": [shown_contest(one) for one in rounds],
        "patches": patches,
        "costs": costs,
        "times": times,
        "trainings": trainings,
        "gate": gate,
        "speeds": speeds,
        "busy": busy_sentences(trainings, speeds),
        "machine": speeds.training.pace.machine,
        "parts": [(words, value / sum(costs.parts.values())) for words, value in costs.parts.items()],
        "times_by_part": times_by_part(speeds.sampling.pace.parts),
        "rule": maps.rule,
        "scale": {"low": low, "high": high, "bar": data_uri(colour_bar(256, 1))},
        "examples": [one.shown(low, high) for one in shown],
        "hero": typical.shown(low, high) | slider(typical.entropies, maps.rule),
        "tokenizer": read_json(inputs.tokenizer / METRICS),
        "charts": draw_charts(trainings, patches, times, speeds, labels)
        | {"differences": draw_differences(rounds), "trade": draw_trade(inputs, costs, speeds, labels)},
        "compared": compared_samples(inputs.samples, manifest, held_out, labels),
        "protocols": [(labels[name], read_json(inputs.samples / name / SAMPLE_PROTOCOL)) for name in labels],
        "published": PUBLISHED,
        "tables": score_tables(inputs.scores, inputs.samples, trainings, labels),
        "digests": digests(inputs, manifest, train, maps, labels),
        "provenance": read_provenance(project_of(inputs.manifest)),
        "sections": flat_params(params),
    }
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "number": number,
        "flop": flop,
        "plain": plain,
        "duration": duration,
        "percent": lambda share: f"{100 * share:.0f}\u00a0%",
        "breakable": lambda name: Markup("_<wbr>").join(name.split("_")),
    }
    page = environment.get_template("report.html.j2").render(**facts)
    with atomic_folder(outputs.report) as folder:
        (folder / PAGE).write_text(redacted(page), "utf-8")  # an address in params may hold a password
        for row, one in enumerate(shown):
            save_png(one.overview(maps.rule.threshold), folder / f"patches-{row:02d}.png")
        charts = facts["charts"]
        names = [(name, labels[name]) for name in trainings]
        losses_picture = picture_file(charts["by_step"], title="validation loss, nats per token", names=names)
        atomic_write(folder / Path(LOSSES_PICTURE.name).name, losses_picture)
        lengths_picture = picture_file(charts["lengths"], title="share of patches by their length")
        atomic_write(folder / Path(LENGTHS_PICTURE.name).name, lengths_picture)
        write_json(folder / Path(HEADLINE.name).name, headline(facts["badge"], rounds, patches, costs, times, speeds))
    write_json(outputs.metrics, summary_metrics(rounds, patches, costs, times, speeds, facts["tokenizer"]))
    for row in range(min(len(shown), 3)):
        tracker.log_picture(outputs.report / f"patches-{row:02d}.png")
    tracker.log_artifact(outputs.report / PAGE)
    tracker.log_metrics({"patch/share_of_tokens": patches.mean / patches.tokens, "cost/flops_saved": costs.saved("forward")})


def times_by_part(parts: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return where the time of a sampled image goes: each model's parts in ms, with their share of the slower model."""
    longest = max((sum(of.values()) for of in parts.values()), default=0.0)
    return [
        {
            "name": name,
            "total": 1000 * sum(of.values()),
            "parts": [(words, 1000 * seconds, seconds / longest) for words, seconds in of.items()],
        }
        for name, of in parts.items()
    ]


def number(value: float) -> str:
    """Write a number with two or three figures that count: 0.00042, 0.640, 4.56, 12.3, 12,345; whole ones as they are."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    decimals = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else max(3, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def flop(value: float) -> str:
    """Write an amount of floating-point operations with its unit."""
    value = float(f"{value:.3g}")  # before its unit is chosen: 999.6 MFLOP are 1 GFLOP
    power, unit = next((p, u) for p, u in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (0.0, "FLOP")) if value >= p)
    return f"{value / (power or 1):.3g} {unit}"


def plain(value: Any) -> str:
    """Write a value of params or of a protocol as JSON does, texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def model_labels(models: Path) -> dict[str, str]:
    """Return what the models are called on the page. The baseline at equal time is one where it is of another step."""
    last, step = (read_weights_header(models / MODELS[name])["meta"]["step"] for name in ("llamagen", "llamagen_equal_time"))
    labels = {"dpar": "DPAR", "llamagen": "LlamaGen baseline"}
    return labels if step == last else labels | {"llamagen_equal_time": f"baseline at step {step}"}


def badge(params: Params, manifest: Manifest, steps: int) -> dict[str, str]:
    """Return what kind of run this is and what it can show, for the line above the headline."""
    if params.data.source == "builtin":
        count = len(manifest.classes)
        kind, what = "demo", f"{WORDS[count] if count < len(WORDS) else count} photographs, one seed."
    elif steps < FEWEST_STEPS:
        kind, what = "trial", f"{steps} steps, one seed."
    else:
        images = len(manifest.split("train"))
        what = f"{images:,} training images of {len(manifest.classes):,} classes, {steps:,} steps, one seed."
        return {"kind": "experiment", "name": "Experiment:", "words": what}
    return {
        "kind": kind,
        "name": f"{kind.capitalize()}:",
        "words": f"{what} It shows the workflow and is not a research result.",
    }


def slider(entropies: np.ndarray, rule: PatchRule) -> dict[str, float | str]:
    """Return what the slider over thresholds cuts by: its ends and the rule's threshold, and the cuts that no entropy moves.

    Nothing when no entropy decides.
    """
    if not rule.reads_entropies or (threshold := rule.threshold) is None:
        return {}
    cuts = ",".join(map(str, np.flatnonzero(rule.fixed_cuts(len(entropies)))))
    known = entropies[1:]
    first, last = min(float(known.min()), threshold), max(float(known.max()), threshold)
    return {"threshold": repr(float(threshold)), "first": max(first - 0.05, 0.0), "last": last + 0.05, "cuts": cuts}


def busy_sentences(trainings: Mapping[str, TrainingFacts], speeds: Speeds) -> list[str]:
    """Return a sentence for each training whose own pace moved too much for its clock to be of use."""
    found = []
    for name, words in (("dpar", "DPAR"), ("llamagen", "the baseline")):
        trained = trainings[name]
        if trained.drift > DRIFT:
            found.append(
                f"While {words} trained, the machine was busy: its pace moved by {100 * trained.drift:.0f} %. The "
                "seconds of that run are not used on this page."
            )
    return found


def setting(params: Params, manifest: Manifest, shards: TokenShards) -> dict[str, Any]:
    """Return what the comparison was made on."""
    return {
        "builtin": params.data.source == "builtin",
        "images": {split: len(manifest.split(split)) for split in ("train", "validation")},
        "classes": len(manifest.classes),
        "size": shards.meta.image_size,
        "grid": shards.meta.row_width,
        "codebook": shards.meta.codebook_size,
        "ln_codebook": math.log(shards.meta.codebook_size),
        "distance": score_name(f"eval/{DISTANCE_NAMES[params.score.features]}"),
    }


def written(*estimates: Estimate) -> list[tuple[str, str]]:
    """Write values and their intervals with as many decimals as all ends need to differ; no interval gives an empty text."""
    widths = [one.interval[1] - one.interval[0] for one in estimates if one.interval]
    if len(widths) < len(estimates):
        return [(number(one.value), "") for one in estimates]
    narrow = min(widths)
    decimals = min(max(1 - math.floor(math.log10(narrow)), 0), 4) if narrow > 0 else 3
    ends = [[f"{value:.{decimals}f}" for value in (one.value, *(one.interval or ()))] for one in estimates]
    return [(value, f"{low} – {high}") for value, low, high in ends]


def shown_contest(contest: Contest) -> dict[str, Any]:
    """Return a contest as the page shows it: each row with a plot of both intervals."""
    rows = []
    for row in contest.rows:
        dots = [Dot("dpar", row.dpar.value, row.dpar.interval), Dot("llamagen", row.baseline.value, row.baseline.interval)]
        scale = (0.0, 1.0) if row.words in ("precision", "recall") else None
        plot = interval_plot(dots, title=f"{row.words}: DPAR above, baseline below", scale=scale)
        dpar, baseline = written(row.dpar, row.baseline)
        rows.append({"row": row, "dpar": dpar, "baseline": baseline, "plot": plot})
    return {"contest": contest, "rows": rows}


def draw_charts(
    trainings: Mapping[str, TrainingFacts], patches: PatchFacts, times: EqualTime, speeds: Speeds, labels: Mapping[str, str]
) -> dict[str, Any]:
    """Draw the curves, the histogram and the DAG as SVG. by_time is None when the speed of training is not known."""
    by_step = [Series(labels[n], n, [(row[0], row[3]) for row in t.curve]) for n, t in trainings.items()]
    shared, by_time = 0.0, None
    seconds = speeds.training.pace.seconds["dpar"]
    # per step; the baseline's by the ratio, from which equal time follows too
    pace = {"dpar": seconds, "llamagen": seconds * speeds.training.ratio}
    if not speeds.training.doubt:
        curves = [Series(labels[n], n, [(row[0] * pace[n], row[3]) for row in t.curve]) for n, t in trainings.items()]
        shared = times.at["dpar"] * pace["dpar"]
        by_time = line_chart(curves, x="seconds of training", y="validation loss", marks={"equal time": shared})
    lengths = [(str(length), share) for length, share in patches.shares[:16]]
    if len(patches.shares) > 16:
        lengths.append(("more", sum(share for _, share in patches.shares[16:])))
    return {
        "by_step": line_chart(by_step, x="optimizer steps", y="validation loss"),
        "by_time": by_time,
        "shared": shared,
        "lengths": bar_chart(lengths, x="tokens per patch", y="share of patches"),
        "dag": dag(),
        "by_class": _ranked(patches.by_class),
    }


def draw_differences(rounds: tuple[Contest, Contest]) -> str:
    """Draw the paired differences of the losses with their intervals."""
    rows = []
    for contest in rounds:
        difference = contest.rows[0].difference
        assert difference is not None, "losses are compared pair by pair"
        winner = contest.rows[0].winner if contest.judged else None
        style = {"dpar": "dpar", "baseline": "llamagen", None: "other"}[winner]
        rows.append((contest.when, Dot(style, difference.value, difference.interval)))
    return difference_plot(rows, title="validation loss, DPAR minus baseline, nats per token")


def draw_trade(inputs: Inputs, costs: Costs, speeds: Speeds, labels: Mapping[str, str]) -> list[str]:
    """Draw the distance of each model, with its interval, over FLOPs, runs of the large transformer and images/s.

    The last one is left out where the speed is in doubt.
    """
    dots, name = {}, ""
    for model in labels:
        found = scores_of(inputs.scores, model)
        name = score_columns(found)[0]
        dots[model] = Dot(model, found.values[name], found.intervals.get(name))

    def chart(x: str, dpar: float, baseline: float) -> str:
        rows = [(labels[model], dpar if model == "dpar" else baseline, dot) for model, dot in dots.items()]
        return dot_chart(rows, x=x, y=score_name(name))

    runs = read_json(inputs.samples / "dpar" / METRICS)["patch/patches_per_image"]
    tokens = read_training(inputs.models / "llamagen").config.tokens
    charts = [
        chart("GFLOPs per sampled image", costs.sampling["dpar"] / 1e9, costs.sampling["llamagen"] / 1e9),
        chart("runs of the large transformer per sampled image", runs, tokens),
    ]
    if not speeds.sampling.doubt:
        rates = speeds.sampling.pace.images_per_s
        charts.append(chart("images/s, measured in turns", rates["dpar"], rates["llamagen"]))
    return charts


def _ranked(by_class: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return classes by their patches per image; of many, the ends of the list."""
    ranked = sorted(by_class.items(), key=lambda item: (-item[1], item[0]))
    half = MOST_CLASSES // 2
    return ranked if len(ranked) <= MOST_CLASSES else ranked[:half] + ranked[-half:]


def dag() -> str:
    """Draw the stages with what each needs, from the table that runs them."""
    from pipeline.runner import STAGES
    from pipeline.state import needs_of

    makers = {path: name for name, stage in STAGES.items() for path in stage.outputs.values()}
    needs = {name: sorted(needs_of({"deps": list(stage.inputs.values())}, makers, name)) for name, stage in STAGES.items()}
    beside = ("features", "sources", "time_sampling")
    lanes = {name: 2.0 if name.endswith("llamagen") else 0.0 if name in beside else 1.0 for name in STAGES}
    return graph(needs, lanes)


def compared_samples(samples: Path, manifest: Manifest, held_out: TokenShards, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the first samples of each class of all models side by side, beside real crops of that class."""
    meta = held_out.meta
    names = list(meta.classes)
    sampled = {
        name: sample_cells(samples / name, names, row_width=meta.row_width, borders=name == "dpar") for name in labels
    }
    classes = sorted(sampled["dpar"])
    real = real_cells(manifest, held_out, classes)
    rows = []
    for label in classes:
        groups = [{"name": "real", "label": "real crops", "cells": real[label]}] if real.get(label) else []
        groups += [{"name": n, "label": labels[n], "cells": cells.get(label, [])} for n, cells in sampled.items()]
        rows.append({"words": names[label], "groups": groups})
    return {"rows": rows, "real": any(real.values())}


def score_tables(
    scores: Path, samples: Path, trainings: Mapping[str, TrainingFacts], labels: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return our rows for the table of the paper: a table of its own for every protocol."""
    tables: dict[str, dict[str, Any]] = {}
    for name in labels:
        found = scores_of(scores, name)
        config = trainings["dpar" if name == "dpar" else "llamagen"].config
        table = tables.setdefault(
            found.protocol.id,
            {
                "id": found.protocol.id,
                "protocol": found.protocol.to_json(),
                "rows": [],
                "columns": [(key, score_name(key)) for key in score_columns(found)],
                "others": [],
            },
        )
        compared = [key for key, _ in table["columns"]]
        rest = [key for key in found.values if key not in compared]
        table["others"] += [(f"{score_name(key)}, {labels[name]}", number(found.values[key])) for key in rest]
        sampled = read_json(samples / name / METRICS)
        table["rows"].append(
            {
                "label": labels[name],
                "parameters": config.num_parameters,
                "scores": found.values,
                "steps": sampled["patch/patches_per_image"] if name == "dpar" else config.tokens,
            }
        )
    return list(tables.values())


def digests(
    inputs: Inputs, manifest: Manifest, shards: TokenShards, maps: PatchMaps, labels: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Return (name, digest, stage) of everything that the page rests on."""
    makers = {"dpar": "train_dpar", "llamagen": "train_llamagen", "llamagen_equal_time": "time_training"}
    return [
        ("manifest", manifest.digest, "data"),
        ("tokenizer", shards.meta.tokenizer, "tokenizer"),
        ("token shards", shards.digest, "tokenize_images"),
        ("entropy model", maps.made_by.entropy_model, "entropy_model"),
        ("patch maps", maps.digest, "patch_maps"),
        *((words, artifact_digest(inputs.models / MODELS[name]), makers[name]) for name, words in labels.items()),
        *(
            (
                f"samples, {words}",
                read_json(inputs.samples / name / SAMPLE_PROTOCOL)["digest"],
                "sample_dpar" if name == "dpar" else "sample_llamagen",
            )
            for name, words in labels.items()
        ),
    ]


def flat_params(params: Params) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return every value of the params, section by section."""
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return [
        (name, list(P.dotted(one.model_dump(mode="json") if isinstance(one, P.Section) else {name: one}).items()))
        for name, one in values.items()
    ]


def summary_metrics(
    rounds: tuple[Contest, Contest],
    patches: PatchFacts,
    costs: Costs,
    times: EqualTime,
    speeds: Speeds,
    tokenizer: Mapping[str, float],
) -> dict[str, float]:
    """Return the dozen numbers of a run under plain names, for `dvc metrics` and `dvc exp`. A speed in doubt is left out."""
    by_steps, by_time = rounds
    loss, distance = by_steps.rows[0], by_steps.rows[1]
    found = {
        "psnr_db": tokenizer["tokenizer/psnr_db"],
        "patches_per_image": patches.mean,
        "flops_saved": costs.saved("forward"),
        "dpar_loss": loss.dpar.value,
        "baseline_loss": loss.baseline.value,
        "baseline_loss_equal_time": by_time.rows[0].baseline.value,
        "dpar_distance": distance.dpar.value,
        "baseline_distance": distance.baseline.value,
        "equal_time_step": times.step,
    }
    for speed in (speeds.training, speeds.sampling):
        if not speed.doubt:
            found[f"{speed.what}_speed"] = speed.ratio
    return {name: value if isinstance(value, int) else float(f"{value:.4g}") for name, value in found.items()}


def headline(
    badge: Mapping[str, str],
    rounds: tuple[Contest, Contest],
    patches: PatchFacts,
    costs: Costs,
    times: EqualTime,
    speeds: Speeds,
) -> Headline:
    """Return the verdicts and the figures at the top of the page, for machines. A speed that is not shown is null."""

    def ratio(speed: Speed) -> Ratio:
        shown = not speed.doubt
        return {
            "ratio": speed.ratio if shown else None,
            "interval": list(speed.interval) if shown else None,
            "doubt": speed.doubt,
            "flops_allow": speed.promised,
        }

    def rows(one: Contest) -> list[Any]:
        return [dataclasses.asdict(row) for row in one.rows]

    return {
        "badge": f"{badge['name']} {badge['words']}",
        "headline": together(*rounds),
        "seeds": 1,
        "verdicts": [
            {
                "when": one.when,
                "winner": one.winner,
                "title": one.title,
                "sentence": one.sentence,
                "judged": one.judged,
                "rows": rows(one),
            }
            for one in rounds
        ],
        "tokens": patches.tokens,
        "patches_per_image": patches.mean,
        "flops_saved": costs.saved("forward"),
        "flop_ratio": costs.promised("forward"),
        "training_speed": ratio(speeds.training),
        "sampling_speed": ratio(speeds.sampling),
        "equal_time": dataclasses.asdict(times),
    }
