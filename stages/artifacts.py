"""The catalog of artifacts: every path below artifacts/, the stage that makes it, and the digest of its content.

No other module spells these paths. dvc.yaml and the runner's table are tested against this catalog.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dpar_core.files import RUN_FILES, RUN_FOLDER, digest_of, sha256_file

FOLDER = RUN_FOLDER
SUMMARY = "summary.json"

# Files inside a folder of samples: what the ADM evaluator reads, how they were made, tokens with patch boundaries.
SAMPLE_IMAGES, SAMPLE_PROTOCOL, SAMPLE_TOKENS, SAMPLE_GRID = "samples.npz", "samples.json", "tokens.npz", "grid.png"
# Files that more than one stage writes, each into a folder of its own.
METRICS, TIMINGS, CURVE, WEIGHTS = "metrics.json", "timings.json", "curve.csv", "model.safetensors"


@dataclass(frozen=True)
class Artifact:
    """One file or folder.

    name: its path below artifacts/, in POSIX form.
    stage: the stage of dvc.yaml that makes it.
    """

    name: str
    stage: str

    @property
    def path(self) -> str:
        """The path below the project's folder, as dvc.yaml spells it."""
        return f"{FOLDER}/{self.name}"

    def below(self, artifacts: Path) -> Path:
        """Return the path in a folder of artifacts."""
        return artifacts / self.name

    def require(self, artifacts: Path) -> Path:
        """Return the path in a folder of artifacts. Raises FileNotFoundError, with the stage to run, when it is missing."""
        path = self.below(artifacts)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run `dpar-cli run {self.stage}`")
        return path


def _trained(model: str, stage: str) -> dict[str, Artifact]:
    """Return what a training stage makes, by the fields of its Outputs."""
    folder = RUN_FILES[model].removesuffix(f"/{WEIGHTS}")
    names = {"model": WEIGHTS, "metrics": METRICS, "curve": CURVE, "timings": TIMINGS}
    return {field: Artifact(f"{folder}/{name}", stage) for field, name in names.items()}


def _scores(name: str, stage: str) -> dict[str, Artifact]:
    return {"scores": Artifact(f"scores/{name}.json", stage), "metrics": Artifact(f"scores/{name}_metrics.json", stage)}


# What stage sources saw of what a run reads from outside. Of user data it holds times, which differ between machines.
IMAGES_SEEN, WEIGHTS_SEEN, SCORING_SEEN = (
    Artifact(f"sources/{name}.json", "sources") for name in ("images", "weights", "scoring")
)
MANIFEST, DATA_METRICS = Artifact("data/manifest.parquet", "data"), Artifact("data/metrics.json", "data")
TOKENIZER = Artifact(RUN_FILES["tokenizer"], "tokenizer")
TOKENIZER_METRICS = Artifact("tokenizer/metrics.json", "tokenizer")
RECONSTRUCTIONS = Artifact("tokenizer/reconstructions.png", "tokenizer")
CLASSIFIER = Artifact("features/demo_classifier.safetensors", "features")
CLASSIFIER_METRICS = Artifact("features/metrics.json", "features")
TOKENS, TOKENS_METRICS = Artifact("tokens", "tokenize_images"), Artifact("tokens_metrics.json", "tokenize_images")
TRAINED_ENTROPY_MODEL = _trained("entropy_model", "entropy_model")
ENTROPY_MODEL = TRAINED_ENTROPY_MODEL["model"]
ENTROPIES = Artifact("entropies", "entropies")
PATCH_MAPS, PATCH_RULE = Artifact("patch_maps", "patch_maps"), Artifact(RUN_FILES["rule"], "patch_maps")
PATCH_METRICS = Artifact("patch_maps_metrics.json", "patch_maps")
PATCH_LENGTHS = Artifact("patch_lengths.csv", "patch_maps")
TRAINED_DPAR = _trained("dpar", "train_dpar")
TRAINED_LLAMAGEN = _trained("llamagen", "train_llamagen")
SNAPSHOTS = Artifact("models/llamagen/snapshots", "train_llamagen")
EQUAL_TIME = Artifact("models/llamagen/equal_time.safetensors", "time_training")
TRAINING_SPEED = Artifact("speed/training.json", "time_training")
SAMPLING_SPEED = Artifact("speed/sampling.json", "time_sampling")
# What is compared, by the name of its samples and scores: DPAR, the baseline, and the baseline at DPAR's training time.
MODELS = {"dpar": TRAINED_DPAR["model"], "llamagen": TRAINED_LLAMAGEN["model"], "llamagen_equal_time": EQUAL_TIME}
SAMPLES = {name: Artifact(f"samples/{name}", "sample_dpar" if name == "dpar" else "sample_llamagen") for name in MODELS}
SCORES = {name: _scores(name, "score_dpar" if name == "dpar" else "score_llamagen") for name in MODELS}
REPORT = Artifact("report", "report")
SUMMARY_METRICS = Artifact("metrics.json", "report")
REPORT_PAGE, HEADLINE = Artifact("report/index.html", "report"), Artifact("report/headline.json", "report")
# What `dvc plots show` and `dvc plots diff` show: pictures, as a page of DVC's own charts needs the internet.
LOSSES_PICTURE, LENGTHS_PICTURE = Artifact("report/losses.svg", "report"), Artifact("report/patch_lengths.svg", "report")
PROBE = Artifact("probe", "probe")  # of `dpar-cli probe`, which is not a stage
# Folders that hold artifacts of several stages, or all of one: what the report reads.
TOKENIZER_FOLDER, ENTROPY_MODEL_FOLDER = Artifact("tokenizer", "tokenizer"), Artifact("entropy_model", "entropy_model")
MODELS_FOLDER, SPEED_FOLDER, SAMPLES_FOLDER, SCORES_FOLDER = (
    Artifact(name, "report") for name in ("models", "speed", "samples", "scores")
)

OUTPUTS: dict[str, dict[str, Artifact]] = {
    "sources": {"images": IMAGES_SEEN, "weights": WEIGHTS_SEEN, "scoring": SCORING_SEEN},
    "data": {"manifest": MANIFEST, "metrics": DATA_METRICS},
    "tokenizer": {"weights": TOKENIZER, "metrics": TOKENIZER_METRICS, "picture": RECONSTRUCTIONS},
    "features": {"weights": CLASSIFIER, "metrics": CLASSIFIER_METRICS},
    "tokenize_images": {"tokens": TOKENS, "metrics": TOKENS_METRICS},
    "entropy_model": TRAINED_ENTROPY_MODEL,
    "entropies": {"entropies": ENTROPIES},
    "patch_maps": {"patch_maps": PATCH_MAPS, "metrics": PATCH_METRICS, "histogram": PATCH_LENGTHS},
    "train_dpar": TRAINED_DPAR,
    "train_llamagen": {**TRAINED_LLAMAGEN, "snapshots": SNAPSHOTS},
    "time_training": {"speed": TRAINING_SPEED, "equal_time": EQUAL_TIME},
    "time_sampling": {"speed": SAMPLING_SPEED},
    "sample_dpar": {"samples": SAMPLES["dpar"]},
    "sample_llamagen": {"samples": SAMPLES["llamagen"], "equal_time": SAMPLES["llamagen_equal_time"]},
    "score_dpar": SCORES["dpar"],
    "score_llamagen": {
        **SCORES["llamagen"],
        "equal_time": SCORES["llamagen_equal_time"]["scores"],
        "equal_time_metrics": SCORES["llamagen_equal_time"]["metrics"],
    },
    "report": {"report": REPORT, "metrics": SUMMARY_METRICS},
}

INPUTS: dict[str, dict[str, Artifact]] = {
    "sources": {},
    "data": {"images": IMAGES_SEEN},
    "tokenizer": {"manifest": MANIFEST, "weights_seen": WEIGHTS_SEEN},
    "features": {"manifest": MANIFEST},
    "tokenize_images": {"manifest": MANIFEST, "tokenizer": TOKENIZER},
    "entropy_model": {"tokens": TOKENS},
    "entropies": {"tokens": TOKENS, "entropy_model": ENTROPY_MODEL},
    "patch_maps": {"tokens": TOKENS, "entropies": ENTROPIES},
    "train_dpar": {"tokens": TOKENS, "patch_maps": PATCH_MAPS},
    "train_llamagen": {"tokens": TOKENS},
    "time_training": {
        "tokens": TOKENS,
        "patch_maps": PATCH_MAPS,
        "dpar": MODELS["dpar"],
        "llamagen": MODELS["llamagen"],
        "snapshots": SNAPSHOTS,
    },
    "time_sampling": {
        "dpar": MODELS["dpar"],
        "llamagen": MODELS["llamagen"],
        "entropy_model": ENTROPY_MODEL,
        "tokenizer": TOKENIZER,
        "patch_rule": PATCH_RULE,
    },
    "sample_dpar": {
        "model": MODELS["dpar"],
        "entropy_model": ENTROPY_MODEL,
        "tokenizer": TOKENIZER,
        "patch_rule": PATCH_RULE,
    },
    "sample_llamagen": {"model": MODELS["llamagen"], "equal_time": EQUAL_TIME, "tokenizer": TOKENIZER},
    "score_dpar": {"manifest": MANIFEST, "features": CLASSIFIER, "samples": SAMPLES["dpar"], "seen": SCORING_SEEN},
    "score_llamagen": {
        "manifest": MANIFEST,
        "features": CLASSIFIER,
        "samples": SAMPLES["llamagen"],
        "equal_time": SAMPLES["llamagen_equal_time"],
        "seen": SCORING_SEEN,
    },
    "report": {
        "manifest": MANIFEST,
        "tokenizer": TOKENIZER_FOLDER,
        "tokens": TOKENS,
        "entropy_model": ENTROPY_MODEL_FOLDER,
        "entropies": ENTROPIES,
        "patch_maps": PATCH_MAPS,
        "histogram": PATCH_LENGTHS,
        "models": MODELS_FOLDER,
        "speed": SPEED_FOLDER,
        "samples": SAMPLES_FOLDER,
        "scores": SCORES_FOLDER,
    },
}


def maker_of(path: Path, root: Path) -> str | None:
    """Return the stage that makes a path of the project at `root`, None for any other path."""
    try:
        name = path.absolute().relative_to(root.absolute()).as_posix()
    except ValueError:
        return None
    made = [one for outputs in OUTPUTS.values() for one in outputs.values()]
    return next((one.stage for one in made if f"{name}/".startswith(f"{one.path}/")), None)


def artifact_digest(path: Path) -> str:
    """Return 16 hex digits that name the content of an artifact.

    A file is named by its bytes; a folder by the `digest` that its maker stored in summary.json (so that hundreds of
    gigabytes of shards are not read again), or by the digests of all its files where it has none.
    Raises FileNotFoundError with the way out.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `dpar-cli run`, or the stage that makes it")
    if path.is_file():
        return sha256_file(path)[:16]
    summary = path / SUMMARY
    if summary.exists():
        stored = json.loads(summary.read_text("utf-8")).get("digest")
        if isinstance(stored, str):
            return stored
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest_of([[file.relative_to(path).as_posix(), sha256_file(file)] for file in files])
