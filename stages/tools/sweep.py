"""Sweeps: sampling settings of trained models, sampled and scored as Ray Tune trials.

A trial is a function of its settings, its seeds and the files it reads. Its result is a file named after all of these,
written whole or not at all: whoever runs the sweep again, after a kill or with more settings, finds it there.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dpar_core.choices import LARGEST_CFG_SCALE
from dpar_core.evaluation.features import FeatureNetwork, feature_network
from dpar_core.evaluation.image_sets import ImageSet
from dpar_core.evaluation.protocol import DISTANCE_NAMES, Interval, Scores, scores_in
from dpar_core.evaluation.reference import Reference
from dpar_core.evaluation.scores import check_images, check_rank, compare, protocol_of
from dpar_core.files import Damaged, digest_of, read_record, read_weights_header, write_record
from dpar_core.patches.maps import read_rule
from dpar_core.pictures import save_png
from stages import params as P
from stages import sample, score
from stages.artifacts import artifact_digest
from stages.shared.pace import machine_words
from stages.shared.sampler import Files
from stages.shared.scoring import make_reference, measure_images, settings_of
from stages.sources import SPLIT_NAMES
from stages.terminal import note
from stages.tracker import NullTracker, Progress, Tracker
from stages.workers import cluster
from stages.workers.tasks import KeptLast, finished_unit

# Seeds of trials lie far above those of params.yaml: what `dvc repro` scores at the end was not used to choose.
SEARCH_SEEDS, FINAL_SEEDS = 10_000_000, 20_000_000
RESULT_FORMAT = 4  # of a trial's file; results of another are sampled anew
DIGITS = 4  # decimals of settings that a search makes up
Search = Literal["grid", "random", "optuna"]


@dataclass(frozen=True)
class Point:
    """Settings that a sweep varies. threshold: nats; None: the training rule's (and for the baseline, which has none)."""

    threshold: float | None
    cfg_scale: float


@dataclass(frozen=True)
class Trial:
    """One point sampled and scored. final: on the full number of images, with fresh seeds."""

    point: Point
    images: int
    first_seed: int
    final: bool


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial.

    key: see `Subject.key`.
    scores: with intervals, protocol and how the images were sampled.
    patches: metrics of the sampled patches, as "patch/mean_length".
    images_per_s: sampling alone, without decoding.
    seconds: of the whole trial.
    machine: what it ran on, with its threads, in words; empty where it was not recorded yet.
    """

    key: str
    trial: Trial
    scores: Scores
    patches: dict[str, float]
    max_patch_length: int | None
    tokens: int
    images_per_s: float
    seconds: float
    machine: str = ""

    @property
    def point(self) -> Point:
        return self.trial.point

    @property
    def patches_per_image(self) -> float:
        return self.patches["patch/patches_per_image"]

    def value(self, score: str) -> float:
        """Return a score by its name, as "eval/fid"."""
        return self.scores.values[score]

    def interval(self, score: str) -> Interval | None:
        """Return the 95 % interval of a score, None where it has none."""
        return self.scores.intervals.get(score)

    def row(self) -> dict[str, Any]:
        """Return it as a row of a table."""
        row = {
            "final": self.trial.final,
            "threshold": self.point.threshold,
            "max_patch_length": self.max_patch_length,
            "cfg_scale": self.point.cfg_scale,
            "images": self.trial.images,
            "first_seed": self.trial.first_seed,
            **{name: self.patches[name] for name in ("patch/patches_per_image", "patch/mean_length")},
            "perf/images_per_s": self.images_per_s,
            "seconds": self.seconds,
            "machine": self.machine,
            "protocol_id": self.scores.protocol.id,
            "key": self.key,
            **self.scores.values,
        }
        for name, (low, high) in self.scores.intervals.items():
            row |= {f"{name}_low": low, f"{name}_high": high}
        return row


@dataclass(frozen=True)
class Failure:
    """A point that could not be sampled from or scored, and why, in a sentence."""

    point: Point
    error: str


@dataclass(frozen=True)
class SweepPlan:
    """What to try.

    points: of a grid, or the corners of the box that a search stays inside.
    trials: of a search.
    images, final_images: images per trial, in the search and for the best `finalists`.
    concurrency: trials at once.
    """

    points: tuple[Point, ...]
    images: int
    final_images: int
    finalists: int
    concurrency: int
    search: Search = "grid"
    trials: int = 0

    def box(self) -> tuple[tuple[float, float] | None, tuple[float, float]]:
        """Return the ends of the thresholds (None when there is nothing to choose) and of the cfg scales."""
        thresholds = [point.threshold for point in self.points if point.threshold is not None]
        scales = [point.cfg_scale for point in self.points]
        return (min(thresholds), max(thresholds)) if thresholds else None, (min(scales), max(scales))


@dataclass(frozen=True)
class Subject:
    """What is sampled and scored.

    models: threshold -> files of a model trained at it; None: of all others.
    outside: digest of a reference and of a feature network that are files of the user; `sweep` sets it.
    """

    models: dict[float | None, Files]
    sample: P.Sample
    score: score.Params
    manifest: Path
    features: Path
    device: str
    outside: str = ""

    def files(self, point: Point) -> Files:
        """Return the files a point is sampled from."""
        return self.models.get(point.threshold, self.models[None])

    def section(self, trial: Trial) -> P.Sample:
        """Return the sample section of a trial."""
        changes = {"images": trial.images, "seed": trial.first_seed, "workers": 0, "cfg_scale": trial.point.cfg_scale}
        if trial.point.threshold is not None:
            changes["threshold"] = trial.point.threshold
        return self.sample.model_copy(update=changes)

    def key(self, trial: Trial) -> str:
        """Return the name of a trial: a digest of all that its result follows from."""
        content = [path and artifact_digest(path) for path in vars(self.files(trial.point)).values()]
        reads = [artifact_digest(self.manifest), artifact_digest(self.features)]
        section = self.section(trial).model_dump(exclude={"batch_size", "workers"})
        scored = [self.score.seed, self.score.data.model_dump(), self.score.score.model_dump(exclude={"images", "workers"})]
        outside = [self.outside] if self.outside else []
        return digest_of([RESULT_FORMAT, content, reads, section, scored, trial.final, *outside])[:12]

    def reads_from_outside(self, reference: Reference, network: FeatureNetwork) -> str:
        """Return `outside`: what of reference and network neither manifest nor demo classifier identifies."""
        settings = self.score.score
        files = [] if settings.reference in SPLIT_NAMES else [reference.digest]
        files += [network.digest] if settings.features_file is not None else []
        return digest_of(files) if files else ""

    @property
    def distance(self) -> str:
        """Name of the score that a sweep makes small."""
        return f"eval/{DISTANCE_NAMES[self.score.score.features]}"


@dataclass
class Outcome:
    """What a sweep found."""

    search: list[TrialResult] = field(default_factory=list)
    finals: list[TrialResult] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)

    def ranked(self, distance: str) -> list[TrialResult]:
        """Return the finals, or without them the trials of the search, by their distance; equal ones by their key."""
        return sorted(self.finals or self.search, key=lambda one: (one.value(distance), one.key))

    def winner(self, distance: str) -> TrialResult | None:
        """Return the final with the smallest distance, or without finals the best of the search."""
        return next(iter(self.ranked(distance)), None)


def check_points(points: Sequence[Point], files: Files) -> None:
    """Refuse settings that cannot be sampled with, all in one sentence. Raises ValueError, FileNotFoundError."""
    if not files.tokenizer.exists():
        raise FileNotFoundError(f"no tokenizer at {files.tokenizer}: make the artifacts with `dpar-cli run` first")
    codes = read_weights_header(files.tokenizer)["config"]["codebook_size"]
    largest, asked = math.log(codes), [p.threshold for p in points if p.threshold is not None]
    wrong = sorted({t for t in asked if not 0 <= t <= largest})
    if wrong:
        raise ValueError(
            f"thresholds {', '.join(f'{t:g}' for t in wrong)} make no sense for {codes} codes: expected 0 to ln {codes} = "
            f"{largest:.3f} nats; `dpar-cli patches stats` shows what they would do"
        )
    if asked and (files.rule is None or not read_rule(files.rule).reads_entropies):
        raise ValueError("this model's patches do not follow a threshold: sweep the guidance with `dpar-cli sweep cfg`")
    wrong = sorted({p.cfg_scale for p in points if not 1 <= p.cfg_scale <= LARGEST_CFG_SCALE})
    if wrong:
        shown = ", ".join(f"{c:g}" for c in wrong)
        raise ValueError(f"cfg scales {shown}: expected numbers from 1 (guidance off) to {LARGEST_CFG_SCALE:g}")


def run_trial(subject: Subject, trial: Trial, folder: Path, work: Path) -> TrialResult:
    """Sample and score one trial; its result goes to `folder` as KEY.json and KEY.png, and is returned.

    Batches that an interrupted run sampled are taken from `work`.
    """
    key, started = subject.key(trial), time.perf_counter()
    files, section = subject.files(trial.point), subject.section(trial)
    content = digest_of([path and artifact_digest(path) for path in vars(files).values()])
    batches = work / f"{key}-{section.batch_size}"
    for other in work.glob(f"{key}-*"):  # of an interrupted run that cut the images otherwise
        if other != batches:
            shutil.rmtree(other)
    batches.mkdir(parents=True, exist_ok=True)
    job = sample.SampleJob(files, content, section.model_dump_json(), subject.device, str(batches.resolve()))
    sampler = sample.sampler_of(job)
    sample.check_memory(sampler, section.batch_size)
    for batch in job.batches():
        if finished_unit(batches, job.path(batch).name) is None:
            sample.sample_batch(job, batch)
    images, labels, starts = (
        np.concatenate(list(sample.batch_arrays(job, name))) for name in ("images", "labels", "starts")
    )
    draw_seconds = float(np.sum(list(sample.batch_arrays(job, "seconds")), axis=0)[0])
    starts = np.unpackbits(starts, axis=1, count=sampler.config.tokens).astype(bool)
    network, rule = _network(subject), sampler.settings.rule
    scored, settings = subject.score, settings_of(subject.score.score)
    reference = make_reference(scored.score, scored.data, subject.manifest, network, NullTracker(), cache=work)
    if subject.outside != subject.reads_from_outside(reference, network):
        raise ValueError("score.reference or score.features_file changed while the sweep ran: run the same command again")
    check_images(images, reference, "the trial")
    measured = measure_images(network, images)
    values, intervals = compare(measured, reference, settings, seed=scored.seed)
    protocol = protocol_of(network, reference, settings, ImageSet(images))
    sampled = sample.protocol(sampler, section)
    result = TrialResult(
        key=key,
        trial=trial,
        scores=Scores(values, intervals, protocol, sampled, measured.features.pool.shape[1]),
        patches=sample.patch_metrics(sampler, starts),
        max_patch_length=None if rule is None else rule.max_patch_length,
        tokens=sampler.config.tokens,
        images_per_s=len(images) / draw_seconds,
        seconds=time.perf_counter() - started,
        machine=machine_words(subject.device),
    )
    save_png(sample.grid_picture(job, sampler, labels), folder / f"{key}.png")
    write_record(folder / f"{key}.json", {**asdict(result), "scores": result.scores.to_json()})
    shutil.rmtree(batches)
    return result


def read_result(folder: Path, key: str) -> TrialResult | None:
    """Return the result of a trial, None when there is none yet; one that was damaged since is named on stderr."""
    path = folder / f"{key}.json"
    if not path.exists():
        return None
    try:
        found = read_record(path, way_out="the trial is sampled again")
    except Damaged as error:
        note(error)
        return None
    del found["digest"]
    scores = scores_in(found.pop("scores"), path)
    trial = found.pop("trial")
    return TrialResult(scores=scores, trial=Trial(**{**trial, "point": Point(**trial["point"])}), **found)


_KEPT: KeptLast[FeatureNetwork] = KeptLast()


def _network(subject: Subject) -> FeatureNetwork:
    """Return the feature network, read once per process."""
    settings = subject.score.score
    file = subject.features if settings.features_file is None else Path(settings.features_file)
    key = (settings.features, file, subject.device)
    return _KEPT.get(key, lambda: feature_network(*key))


def sweep(
    subject: Subject,
    plan: SweepPlan,
    folder: Path,
    work: Path,
    tracker: Tracker,
    *,
    finished: Callable[[TrialResult], None],
) -> Outcome:
    """Run a plan: search, then the best few again with more images and fresh seeds.

    folder: where results of trials are and go.
    finished: called in this process with each result, old and new.
    Raises ValueError before the first trial when settings make no sense or the cluster has no room for one.
    """
    check_points(plan.points, subject.models[None])
    folder.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    # The reference's features are found once, here; trials read them from the work folder.
    scored = subject.score
    network = _network(subject)
    reference = make_reference(scored.score, scored.data, subject.manifest, network, tracker, cache=work)
    subject = replace(subject, outside=subject.reads_from_outside(reference, network))
    for images in (plan.images, *([plan.final_images] if plan.final_images else [])):
        check_rank(images, reference, settings_of(scored.score))
    if subject.sample.plan == "balanced":
        classes = read_weights_header(subject.models[None].model)["config"]["num_classes"]
        if few := sample.too_few_for_classes(plan.images, classes):
            note(f"trials: {few}")
    runner = _Runner(subject, plan, folder, work, tracker, finished)
    outcome = Outcome()
    with runner:
        points = None if plan.search == "optuna" else _points(plan)
        outcome.search = runner.run("search", points, images=plan.images, first_seed=SEARCH_SEEDS, final=False)
        best = outcome.ranked(subject.distance)[: plan.finalists]
        if best and plan.final_images:
            chosen = [one.point for one in best]
            outcome.finals = runner.run("finals", chosen, images=plan.final_images, first_seed=FINAL_SEEDS, final=True)
        outcome.failed = runner.failed
    return outcome


def _points(plan: SweepPlan) -> list[Point]:
    """Return the points of a grid, or those of a random search, which follow from the plan alone."""
    if plan.search == "grid":
        return list(plan.points)
    thresholds, scales = plan.box()
    rng = np.random.default_rng(0)
    chosen = rng.random((plan.trials, 2)).tolist()
    return [Point(None if thresholds is None else _at(a, thresholds), _at(b, scales)) for a, b in chosen]


def _at(share: float, ends: tuple[float, float]) -> float:
    """Return the setting at a share of the way between two ends."""
    return _short(ends[0] + share * (ends[1] - ends[0]), *ends)


def _short(value: float, low: float, high: float) -> float:
    """Return a setting that a search made up with DIGITS decimals, or the end beyond which it would lie with them."""
    return min(max(round(value, DIGITS), low), high)


@dataclass(eq=False)
class _Runner:
    """Trials on Ray Tune: the cluster is reached when the first trial asks for it, and left at the end."""

    subject: Subject
    plan: SweepPlan
    folder: Path
    work: Path
    tracker: Tracker
    finished: Callable[[TrialResult], None]
    failed: list[Failure] = field(default_factory=list)
    connection: AbstractContextManager[list[cluster.Node]] | None = None
    nodes: list[cluster.Node] | None = None

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.connection is not None:
            self.connection.__exit__(*error)

    def run(self, name: str, points: list[Point] | None, *, images: int, first_seed: int, final: bool) -> list[TrialResult]:
        """Return the results of these points in their order; points None: those an optimizer chooses."""
        seed = self.subject.sample.seed + first_seed

        def trial(point: Point) -> Trial:
            return Trial(point, images, seed, final)

        if points is None:
            return self._optimize(name, trial)
        keys = {self.subject.key(trial(point)): point for point in points}
        done = {key: found for key in keys if (found := read_result(self.folder, key)) is not None}
        for result in done.values():
            self.finished(result)
        left = [point for key, point in keys.items() if key not in done]
        if left:
            with self.tracker.progress(len(keys), f"sweep {name}", done=len(done), unit="trials") as progress:
                self._tune({"point": [asdict(point) for point in left]}, trial, progress)
        results = [read_result(self.folder, key) for key in keys]
        return [result for result in results if result is not None]

    def _optimize(self, name: str, trial: Callable[[Point], Trial]) -> list[TrialResult]:
        """Let Optuna choose; it starts from what an earlier run has tried."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        thresholds, scales = self.plan.box()
        space = {"cfg_scale": optuna.distributions.FloatDistribution(*scales)}
        if thresholds is not None:
            space["threshold"] = optuna.distributions.FloatDistribution(*thresholds)
        known = self._known(trial)
        for result in known:
            self.finished(result)
        tried = [{name: getattr(result.point, name) for name in space} for result in known]
        searcher = OptunaSearch(
            metric="distance",
            mode="min",
            sampler=_tpe_sampler(),
            space=space,
            points_to_evaluate=tried or None,
            evaluated_rewards=[result.value(self.subject.distance) for result in known] or None,
        )
        missing = self.plan.trials - len(known)
        if missing > 0:
            with self.tracker.progress(self.plan.trials, f"sweep {name}", done=len(known), unit="trials") as progress:
                self._tune({}, trial, progress, searcher=searcher, samples=missing)
        return self._known(trial)

    def _known(self, trial: Callable[[Point], Trial]) -> list[TrialResult]:
        """Return the results in the folder that belong to a search with these settings and inside its box, oldest first."""
        thresholds, scales = self.plan.box()

        def inside(point: Point) -> bool:
            if point.threshold is None or thresholds is None:
                in_range = point.threshold is None and thresholds is None
            else:
                in_range = thresholds[0] <= point.threshold <= thresholds[1]
            return in_range and scales[0] <= point.cfg_scale <= scales[1]

        files = sorted(self.folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        found = [read_result(self.folder, path.stem) for path in files]
        known = [one for one in found if one is not None and inside(one.point)]
        return [one for one in known if one.key == self.subject.key(trial(one.point))]

    def _room(self) -> dict[str, float]:
        """Return what a trial takes, having made sure that as many as asked for fit at once."""
        if self.nodes is None:
            self.connection = cluster.connected()
            self.nodes = self.connection.__enter__()
        gpu, wanted = self.subject.device.startswith("cuda"), self.plan.concurrency
        cpus = max(int(sum(node.cpus for node in self.nodes)) // wanted, 1)
        cluster.require(self.nodes, workers=wanted, cpus=cpus, gpus=1 if gpu else 0, section="sweep", option="--concurrency")
        return {"CPU": cpus, "GPU": 1 if gpu else 0}

    def _tune(
        self,
        space: dict[str, list[Any]],
        trial: Callable[[Point], Trial],
        progress: Progress,
        *,
        searcher: Any = None,
        samples: int = 1,
    ) -> None:
        room = self._room()
        os.environ |= {
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
            "RAY_AIR_NEW_OUTPUT": "0",
        }
        from ray import tune

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are reported by us, in a sentence
        storage = self.work / "tune"
        shutil.rmtree(storage, ignore_errors=True)
        trainable = tune.with_resources(
            tune.with_parameters(
                _trainable(),
                subject=self.subject,
                trial=trial,
                folder=self.folder,
                work=self.work,
                threads=int(room["CPU"]),
            ),
            room,
        )
        tuner = tune.Tuner(
            trainable,
            param_space={name: tune.grid_search(values) for name, values in space.items()},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=self.plan.concurrency,
                reuse_actors=True,
                search_alg=searcher,
                num_samples=samples,
                mode="min",
                metric="distance",
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(storage.resolve()),
                verbose=0,
                callbacks=[_callback(partial(self.settled, progress))],
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        )
        tuner.fit()
        shutil.rmtree(storage, ignore_errors=True)

    def settled(self, progress: Progress, config: dict[str, Any], last: dict[str, Any] | None, error: str | None) -> None:
        """Take a trial's end from Tune."""
        point = point_of(config)
        error = error or (last or {}).get("error")
        result = None if error or last is None else read_result(self.folder, last["key"])
        if result is None:
            self.failed.append(Failure(point, error or "its result cannot be read"))
            progress.advance()
            return
        self.finished(result)
        shown: dict[str, Any] = {self.subject.distance.removeprefix("eval/"): result.value(self.subject.distance)}
        progress.advance(**shown)


def point_of(config: dict[str, Any]) -> Point:
    """Return the point of a Tune config: one that was asked for, or one that Optuna made up."""
    return Point(**config["point"]) if "point" in config else Point(config.get("threshold"), config["cfg_scale"])


def _tpe_sampler() -> Any:
    """Return Optuna's TPE, whose choice follows from the trials before it alone: a resumed search is the same one."""
    import optuna

    class FromTrials(optuna.samplers.BaseSampler):  # type: ignore[misc]  # Optuna's classes are Any here
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> float:
            seed = 2 * trial.number + (param_name == "threshold")
            tpe = optuna.samplers.TPESampler(seed=seed)
            value = tpe.sample_independent(study, trial, param_name, param_distribution)
            return _short(value, param_distribution.low, param_distribution.high)

        def __reduce__(self) -> tuple[type, tuple[()]]:  # Tune stores its searchers, and nobody reads them
            return optuna.samplers.TPESampler, ()

    return FromTrials()


def _callback(settled: Callable[[dict[str, Any], dict[str, Any] | None, str | None], None]) -> Any:
    """Return a Tune callback that hands on (config, last result, error) of every trial that has ended."""
    from ray import tune

    class Settled(tune.Callback):  # type: ignore[misc]  # Ray's classes are Any here
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.settled(trial.config, trial.last_result, None)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            words = str(trial.get_error() or "its process died").strip().splitlines()[-1]
            self.settled(trial.config, None, words)

        def __reduce__(
            self,
        ) -> tuple[type, tuple[()]]:  # Tune stores its callbacks; this one belongs to the process it lives in
            return tune.Callback, ()

    callback = Settled()
    callback.settled = settled
    return callback


def _trainable() -> type:
    from ray import tune

    class SweepTrial(tune.Trainable):  # type: ignore[misc]  # Ray's classes are Any here
        """Runs one trial a config; its process and the networks in it serve the next one too."""

        def setup(
            self,
            config: dict[str, Any],
            *,
            subject: Subject,
            trial: Callable[[Point], Trial],
            folder: Path,
            work: Path,
            threads: int,
        ) -> None:
            torch.set_num_threads(threads)
            self.subject, self.trial, self.folder, self.batches = subject, trial, folder, work

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}  # a trial's result is its file, and its batches are kept where it works

        def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
            pass

        def step(self) -> dict[str, Any]:
            trial = self.trial(point_of(self.config))
            try:
                found = read_result(self.folder, self.subject.key(trial))  # an optimizer may ask for a point again
                result = found or run_trial(self.subject, trial, self.folder, self.batches)
            except Exception as error:  # whatever it is, it is reported and stops no other trial
                words = " ".join(str(error).split()) or type(error).__name__
                return {"done": True, "distance": math.nan, "error": words}
            return {"done": True, "distance": result.value(self.subject.distance), "key": result.key}

    return SweepTrial
