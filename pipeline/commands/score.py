"""`dpar-cli score`, `compare`, `fetch` and `calibrate`: scores outside the workflow, and trust in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dpar_core.evaluation.features import FeatureNetwork
    from dpar_core.evaluation.protocol import Scores
    from dpar_core.evaluation.reference import Reference
    from stages.params import Params
    from stages.tools.calibrate import ScoreCheck
    from stages.tracker import Tracker

FeaturesName = Annotated[
    str, typer.Option("--features", help="demo | inception | dinov2: the network images are compared by.")
]
FeaturesFile = Annotated[Path | None, typer.Option(help="Its file; for demo the classifier under artifacts/.")]
Sha256 = Annotated[str | None, typer.Option(help="SHA-256 the features' file must have; else inception's published one.")]
Neighbours = Annotated[int, typer.Option(min=1, help="k of precision and recall.")]
Bootstrap = Annotated[int, typer.Option(min=0, help="Resamples for 95 % intervals; 0: none.")]
Seed = Annotated[int, typer.Option(min=0, help="Of bootstrap and KID subsets.")]
AllowSingular = Annotated[
    bool, typer.Option("--allow-singular", help="Give a distance even where fewer images than features make it too large.")
]
WORK = Path("work", "references")


def score(
    samples: Annotated[
        list[Path], typer.Argument(help="An npz with arr_0, or a folder of pictures; several: seeds of one model.")
    ],
    reference: Annotated[
        str, typer.Option(help="npz of images or ADM statistics, folder of pictures, manifest.parquet, train or validation.")
    ],
    features: FeaturesName = "demo",
    features_file: FeaturesFile = None,
    sha256: Sha256 = None,
    images: Annotated[
        int | None, typer.Option(min=2, help="Images of each set, all when left out; fewer are an error.")
    ] = None,
    neighbours: Neighbours = 3,
    bootstrap: Bootstrap = 200,
    seed: Seed = 0,
    allow_singular: AllowSingular = False,
    workers: Annotated[int, typer.Option(min=0, help="Ray workers that compute features; 0: this process.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the scores to (one set of samples).")] = None,
) -> None:
    """Score anyone's images: Frechet distance, sFID, IS, KID, precision and recall, with intervals and a protocol.

    Reads images and reference; writes nothing but --out and the reference's features, kept in work/references. With
    `--features inception` the distance is FID; names of other networks say which. Next: `dpar-cli compare`.

        dpar-cli score samples.npz --reference VIRTUAL_imagenet256_labeled.npz \\
            --features inception --features-file inception-2015-12-05.pt \\
            --images 50000 --out mine.json
    """
    from dpar_core.data.splits import counted
    from dpar_core.files import write_record
    from stages.params import load_params
    from stages.shared.scoring import score_images
    from stages.terminal import note, print_fitted
    from stages.tools.score_files import refuse_twice, settings_for, shape_in, spread
    from stages.tracker import PrintTracker

    if out is not None and len(samples) > 1:
        raise ValueError(
            f"--out takes the scores of one set, and {len(samples)} are given: score them one by one, or leave it out"
        )
    params = load_params(Path("params.yaml")) if Path("params.yaml").exists() else None  # anywhere outside a project
    network = _network(features, features_file, sha256, params)
    tracker = PrintTracker()
    refuse_twice(samples)
    shapes = [shape_in(path) for path in samples]
    for path, shape in zip(samples, shapes):
        if shape.images < 2:
            raise ValueError(f"{path} holds {counted(shape.images, 'image')}: a distance needs at least two")
    settings = settings_for(
        features,
        images=images or min(shape.images for shape in shapes),
        neighbours=neighbours,
        bootstrap=bootstrap,
        allow_singular=allow_singular,
    )
    against = _reference(reference, params, network, tracker, image_size=shapes[0].height, workers=workers)
    found = [
        score_images(path, against, network, settings, tracker, seed=seed, workers=workers, say=note) for path in samples
    ]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_record(out, found[0].to_json())
    if len(found) == 1:
        print(_table([samples[0].name], found))
    else:
        print(_table(_distinct([path.name for path in samples], samples), found, spreads=spread(found)))
    print(_protocol_lines(found[0]))
    if out is not None:
        print_fitted(out)


def compare(
    scores: Annotated[list[Path], typer.Argument(help="Score files, of `dpar-cli score --out` or artifacts/scores/.")],
    force: Annotated[
        bool, typer.Option("--force", help="Print scores of different protocols side by side all the same.")
    ] = False,
) -> None:
    """Compare score files; those of different protocols are refused, as their numbers are not comparable.

    Reads score files, writes nothing.

        dpar-cli compare artifacts/scores/dpar.json artifacts/scores/llamagen.json
    """
    from dpar_core.evaluation.protocol import differences, read_scores, refuse_mixed
    from stages.terminal import note

    found = [read_scores(path) for path in scores]
    names = _distinct([path.stem for path in scores], scores)
    if not force:
        refuse_mixed(found, names)
    elif mixed := differences([one.protocol.to_json() for one in found]):
        note(f"NOT COMPARABLE, shown because of --force: {'; '.join(mixed)}")
    print(_table(names, found))
    for name, one in zip(names, found):
        print(f"{name}: protocol {one.protocol.id}")


def fetch(
    what: Annotated[str, typer.Argument(help="inception: the network that FID is defined on.")] = "inception",
    to: Annotated[Path, typer.Option(help="File to write.")] = Path("weights/inception-2015-12-05.pt"),
    url: Annotated[str | None, typer.Option(help="Address to read; else the publisher's.")] = None,
    sha256: Sha256 = None,
) -> None:
    """Download a feature network; prints source and target, and checks the SHA-256.

    The file appears when it is whole. Next: set score.features and score.features_file in params.yaml, or give them
    to `dpar-cli score`.
    """
    from dpar_core.evaluation.features import INCEPTION_SHA256, INCEPTION_URL
    from dpar_core.secrets import redacted
    from pipeline.download import download
    from stages.terminal import print_fitted

    if what != "inception":
        raise ValueError(f"no address known for {what!r}: expected inception (DINOv2: export it to TorchScript yourself)")
    address = url or INCEPTION_URL
    print_fitted(redacted(f"from {address}\nto   {to.resolve()}"))
    if to.is_file():
        print_fitted(f"it is there already: reading its {to.stat().st_size / 2**20:,.0f} MiB for their SHA-256")
    digest = download(address, to, sha256=sha256 or INCEPTION_SHA256)
    print_fitted(f"SHA-256 {digest}")


def calibrate(
    gpt: Annotated[Path, typer.Option(help="Published class-conditional LlamaGen weights (.pt or .safetensors).")],
    vq: Annotated[Path, typer.Option(help="Published VQ weights of its tokenizer.")],
    size: Annotated[str, typer.Option(help="B | L | XL | XXL: which published row to expect, and the heads.")],
    cfg: Annotated[float, typer.Option(min=1, help="Guidance scale of the published figures.")],
    reference: Annotated[
        str, typer.Option(help="As for `dpar-cli score`; published figures: VIRTUAL_imagenet256_labeled.npz.")
    ],
    features: FeaturesName = "inception",
    features_file: FeaturesFile = None,
    sha256: Sha256 = None,
    grid: Annotated[int, typer.Option(min=1, help="Tokens of a side: 16 (256 pixels) or 24 (384).")] = 16,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads, where the size does not say.")] = None,
    images: Annotated[int, typer.Option(min=2, help="Images to sample; published figures are of 50,000.")] = 50_000,
    expect: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE to expect instead, as fid=5.46; may be repeated.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Share of the published value that the score may be off.")] = 0.05,
    allow_singular: AllowSingular = False,
    out: Annotated[Path, typer.Option(help="Folder for samples and scores.")] = Path("calibration"),
) -> None:
    """Sample from a published LlamaGen checkpoint, score the images, and compare with the published figures.

    Do this before any number of your own is trusted: it tests tokens to pixels, sampling, features and reference at once.
    Reads the weights you have and the sample section of params.yaml (batch size, precision, workers); writes samples and
    scores under --out. An interrupted one continues. Exit 1 when a score is outside its tolerance.

        dpar-cli calibrate --gpt c2i_B_256.pt --vq vq_ds16_c2i.pt --size B --cfg 2 \\
            --reference VIRTUAL_imagenet256_labeled.npz \\
            --features-file weights/inception-2015-12-05.pt
    """
    from dpar_core.files import digest_of, write_record
    from dpar_core.models.sizes import MODEL_SIZES
    from pipeline.runner import device_of
    from stages.params import load_params, settled
    from stages.sample import sample_images
    from stages.shared.scoring import images_in, score_images
    from stages.tools import calibrate as calibration
    from stages.tools.score_files import settings_for, shape_in
    from stages.tracker import PrintTracker

    if size not in MODEL_SIZES and heads is None:
        raise ValueError(f"--size is {size!r}, expected one of {', '.join(MODEL_SIZES)}, or give --heads and --expect")
    heads = heads or MODEL_SIZES[size].heads  # which do not follow from weights
    expected = _expected(size, grid, expect)
    params = load_params(Path("params.yaml"))
    network = _network(features, features_file, sha256, params)
    tracker, work = PrintTracker(), Path("work", "calibrate")
    files = calibration.import_checkpoint(gpt, vq, size=size, heads=heads, grid=grid, folder=work)
    section = settled(params.sample, device_of(params.compute)).model_copy(
        update={
            "images": images,
            "plan": "balanced",
            "seed": 0,
            "cfg_scale": cfg,
            "cfg_schedule": "constant",
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "resize": 256 if grid == 24 else None,
        }
    )
    made_by = [files.model.parent.name, heads, grid, section.model_dump(exclude={"workers"})]
    samples = out / f"samples-{digest_of(made_by)[:8]}"  # another checkpoint or scale never meets these pictures
    if images_in(samples) == samples:
        sample_images(
            section, files, samples, tracker, device=device_of(params.compute), work=work / samples.name, prefix=""
        )
    settings = settings_for(features, images=images, neighbours=3, bootstrap=0, allow_singular=allow_singular)
    against = _reference(reference, params, network, tracker, image_size=shape_in(samples).height)
    found = score_images(samples, against, network, settings, tracker, seed=params.seed)
    scores = out / f"{samples.name.replace('samples', 'scores')}.json"
    write_record(scores, found.to_json())
    checks = calibration.checks(found.values, expected, tolerance=tolerance)
    print(_verdicts(checks))
    print(_protocol_lines(found))
    print(scores)
    if not all(check.holds for check in checks):
        raise SystemExit(1)


def _expected(size: str, grid: int, given: list[str] | None) -> dict[str, float]:
    from pipeline.presets.published import PUBLISHED

    if given:
        pairs = [word.partition("=") for word in given]
        try:
            expected = {f"eval/{name.strip()}": float(value) for name, _, value in pairs}
        except ValueError:
            expected = {}
        if len(expected) < len(pairs) or not all(0 < value < math.inf for value in expected.values()):
            raise ValueError(f"--expect {' '.join(given)}: expected NAME=VALUE for different names, as fid=5.46")
        return expected
    pixels = {16: 256, 24: 384}.get(grid)
    rows = [row for row in PUBLISHED if row.model == f"LlamaGen-{size}" and row.size == pixels]
    if not rows:
        raise ValueError(
            f"no published figures of LlamaGen-{size} on a grid of {grid} are known here: give them with --expect"
        )
    row = rows[0]
    return {"eval/fid": row.fid, "eval/is": row.inception_score, "eval/precision": row.precision, "eval/recall": row.recall}


def _network(features: str, file: Path | None, sha256: str | None, params: Params | None) -> FeatureNetwork:
    from dpar_core.evaluation.features import feature_network
    from pipeline.runner import device_of, set_threads
    from stages.artifacts import CLASSIFIER, FOLDER
    from stages.params import Compute

    compute = params.compute if params else Compute(device="auto", threads=0)
    set_threads(compute)
    if file is None:
        if features == "demo" and params is None:
            raise FileNotFoundError(
                f"features demo are a project's own classifier, and there is no project in {Path.cwd()}: go to one, or give "
                "--features inception with --features-file (`dpar-cli fetch inception` downloads it)"
            )
        if features == "demo":
            file = CLASSIFIER.require(Path(FOLDER))
        elif params and params.score.features == features and params.score.features_file is not None:
            file = Path(params.score.features_file)
        else:
            raise ValueError(
                f"--features {features} needs --features-file (`dpar-cli fetch inception` downloads Inception's)"
            )
    return feature_network(features, file, device_of(compute), sha256=sha256)


def _reference(
    name: str, params: Params | None, network: FeatureNetwork, tracker: Tracker, *, image_size: int, workers: int = 0
) -> Reference:
    from stages.artifacts import MANIFEST
    from stages.shared.scoring import make_reference, reference_of

    if name in ("train", "validation"):
        if params is None:
            raise FileNotFoundError(
                f"reference {name} is a split of a project's images, and there is no project in {Path.cwd()}: go to one, or "
                "name an npz or a folder of pictures"
            )
        if not Path(MANIFEST.path).exists():
            raise FileNotFoundError(
                f"reference {name} is a split of {MANIFEST.path}, which is missing: run `dpar-cli run data` first"
            )
        section = params.score.model_copy(update={"reference": name, "workers": workers})
        return make_reference(section, params.data, Path(MANIFEST.path), network, tracker, cache=WORK)
    return reference_of(Path(name), network, tracker, cache=WORK, image_size=image_size, workers=workers)


def _table(names: Sequence[str], found: Sequence[Scores], *, spreads: Mapping[str, Any] | None = None) -> str:
    from pipeline.report.verdicts import score_name
    from stages.terminal import figures, table

    rows = []
    for key in dict.fromkeys(key for one in found for key in one.values):
        cells = []
        for one in found:
            ends = one.intervals.get(key)
            cell = "" if key not in one.values else figures(one.values[key], 4)
            cells.append(cell if ends is None else f"{cell} ({figures(ends.low, 3)} to {figures(ends.high, 3)})")
        if spreads:
            cells += [figures(spreads[key].mean, 4), figures(spreads[key].deviation, 2)] if key in spreads else ["", ""]
        rows.append((score_name(key), *cells))
    return table(("score", *names, *(["mean", "sd over sets"] if spreads else [])), rows)


def _distinct(names: list[str], paths: Sequence[Path]) -> list[str]:
    """Return names of columns: whole paths where two would have one name, as dpar.json of two runs."""
    return names if len(set(names)) == len(names) else [path.as_posix() for path in paths]


def _protocol_lines(found: Scores) -> str:
    one = found.protocol
    from stages.terminal import wrapped

    return wrapped(
        f"protocol {one.id}: {one.images} images of {one.image_width} x {one.image_height} pixels "
        f"({' and '.join(one.formats)}), features {one.features} {one.features_digest}, reference {one.reference} "
        f"{one.reference_digest}{'; in brackets 95 % intervals' if found.intervals else ''}"
    )


def _verdicts(checks: Sequence[ScoreCheck]) -> str:
    from pipeline.report.verdicts import score_name
    from stages.terminal import figures, table

    rows = [
        (
            score_name(one.name),
            f"{one.expected:g}",
            figures(one.got, 4),
            figures(one.tolerance, 3),
            "agrees" if one.holds else "DIFFERS",
        )
        for one in checks
    ]
    return table(("score", "expected", "got", "tolerance", "verdict"), rows)
