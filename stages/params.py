"""params.yaml as frozen, typed sections. All faults are reported at once, a sentence each, before anything runs."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dpar_core.choices import (
    LARGEST_CFG_SCALE,
    LEAST_TEMPERATURE,
    READ_ENTROPIES,
    EncodePrecisionChoice,
    FeatureName,
    Gate,
    GatePrecision,
    GuidanceSchedule,
    LearningRateSchedule,
    PatchMode,
    PositionEncoding,
    Strategy,
    ViewSet,
    head_multiple,
)
from dpar_core.models.sizes import FFN_MULTIPLE, GATE_SIZES
from dpar_core.precision import PrecisionChoice, multiplies_bf16, settle, slowdown


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
OrZero = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**62)]  # image i is sampled with seed + i
Positive = Annotated[Finite, Field(gt=0)]
NotNegative = Annotated[Finite, Field(ge=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
PathName = Annotated[str, Field(min_length=1)]  # an empty one would be the current folder
KeyName = Annotated[str, Field(min_length=1)]


class ParamsError(ValueError):
    """Everything that is wrong with a params file, one sentence each."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = sentences


class Section(BaseModel):
    """Frozen; unknown keys, missing keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Compute(Section):
    device: Literal["auto", "cpu", "cuda"]
    threads: OrZero


class BuiltinData(Section):
    train_crops: Count
    validation_crops: Count
    crop_min: Count
    crop_max: Count
    validation_share: Annotated[float, Field(gt=0, le=0.5)]


class Data(Section):
    source: Literal["builtin", "imagefolder", "ilsvrc", "webdataset", "parquet"]
    train: PathName | None
    validation: PathName | None
    classes: Literal["any", "imagenet"]
    empty_classes: Literal["refuse", "keep"]
    image_key: KeyName | None
    label_key: KeyName | None
    image_size: Annotated[int, Field(ge=8)]
    views: ViewSet
    max_bad_share: Share
    builtin: BuiltinData


class Tokenizer(Section):
    weights: PathName | None
    weights_key: KeyName | None
    codebook_size: Annotated[int, Field(ge=2, le=65536)]
    codebook_dim: Count
    base_width: Count
    channel_multipliers: Annotated[list[Count], Field(min_length=1)]
    z_channels: Count
    residual_blocks: Count
    norm_groups: Count
    commitment: NotNegative
    steps: Count
    batch_size: Count
    lr: Positive
    warmup_steps: OrZero
    precision: PrecisionChoice

    @property
    def downsample(self) -> int:
        """Pixels of a side that one token stands for."""
        return 1 << (len(self.channel_multipliers) - 1)


class TokenizeImages(Section):
    shard_images: Count
    batch_size: Count
    precision: EncodePrecisionChoice
    workers: OrZero


class Training(Section):
    """How one model is trained (entropy model, DPAR, baseline)."""

    steps: Count
    batch_size: Count
    accumulate: Count
    lr: Positive
    lr_schedule: LearningRateSchedule
    warmup_steps: OrZero
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    weight_decay: NotNegative
    clip_norm: NotNegative
    precision: PrecisionChoice
    compile: bool
    activation_checkpointing: bool
    strategy: Strategy
    workers: Count
    cpus_per_worker: Count
    gpus_per_worker: OrZero
    validate_every: Count
    validation_images: OrZero
    checkpoint_every: Count
    keep_last: Count
    keep_best: OrZero
    log_every: Count
    storage: PathName | None


class Train(Training):
    equal_time_step: Literal["auto"] | Count | None

    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps at which the baseline is kept, so that one of them can stand for "as long as DPAR trained".

        With auto they are 8 % apart, from 54 % to 93 % of `steps`; the final model is kept in any case.
        """
        if self.equal_time_step == "auto":
            shares = (1.08**-power for power in range(1, 9))
            return tuple(sorted({max(round(self.steps * share), 1) for share in shares} - {self.steps}))
        return () if self.equal_time_step is None else (self.equal_time_step,)


FEATURE_COUNTS = {"demo": 64, "inception": 2048}  # pooled features per image, where every network of the name has as many
ENTROPY_MODEL_SIZES: dict[str, dict[str, int]] = {
    name: {**size._asdict(), "ffn_multiple": FFN_MULTIPLE} for name, size in GATE_SIZES.items()
}


class EntropyModel(Section):
    size: Literal["B", "S", "XS", "custom"]
    width: Count
    heads: Count
    layers: Count
    ffn_multiple: Count
    dropout: Dropout
    train: Training


class Entropies(Section):
    batch_size: Count
    precision: GatePrecision
    workers: OrZero


class Patching(Section):
    mode: PatchMode
    threshold: NotNegative | None
    target_mean_length: Annotated[Finite, Field(ge=1)] | None
    max_patch_length: Count | None
    static_length: Count


class Model(Section):
    width: Count
    heads: Count
    encoder_layers: Count
    patch_layers: Count
    decoder_layers: Count
    ffn_multiple: Count
    position_encoding: PositionEncoding
    dropout: Dropout
    class_dropout: Dropout

    @property
    def layers(self) -> int:
        """Layers of the LlamaGen baseline."""
        return self.encoder_layers + self.patch_layers + self.decoder_layers


class Sample(Section):
    images: Count
    plan: Literal["balanced", "random"]
    batch_size: Count
    precision: PrecisionChoice
    seed: Seed
    cfg_scale: Annotated[float, Field(ge=1, le=LARGEST_CFG_SCALE)]
    cfg_schedule: GuidanceSchedule
    cfg_interval: Annotated[list[Share], Field(min_length=2, max_length=2)]
    temperature: Annotated[Finite, Field(ge=LEAST_TEMPERATURE)]
    top_k: OrZero
    top_p: Annotated[float, Field(gt=0, le=1)]
    gate: Gate
    threshold: NotNegative | None
    max_patch_length: Count | None
    resize: Count | None
    workers: OrZero


class DemoClassifier(Section):
    steps: Count
    batch_size: Count
    lr: Positive


class Score(Section):
    features: FeatureName
    features_file: PathName | None
    reference: PathName
    images: Annotated[int, Field(ge=2)]
    neighbours: Count
    splits: Count
    bootstrap: OrZero
    allow_singular: bool
    workers: OrZero
    demo_classifier: DemoClassifier


class Report(Section):
    examples: Count


class Params(Section):
    """The whole of params.yaml."""

    seed: Seed
    compute: Compute
    data: Data
    tokenizer: Tokenizer
    tokenize_images: TokenizeImages
    entropy_model: EntropyModel
    entropies: Entropies
    patching: Patching
    model: Model
    train: Train
    sample: Sample
    score: Score
    report: Report


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

StageParams = TypeVar("StageParams", bound="DataclassInstance")


def select(params: Params, stage_params: type[StageParams]) -> StageParams:
    """Hand a stage the sections it declares: `stage_params` is a dataclass whose fields are named after them.

    A field with metadata {"section": "score.demo_classifier"} is a part of a section, so that the rest of it does not make
    the stage run again.
    """
    chosen = {field.name: operator.attrgetter(section_of(field))(params) for field in dataclasses.fields(stage_params)}
    return stage_params(**chosen)


def section_of(field: dataclasses.Field[Any]) -> str:
    """Return the dotted name, in params.yaml, of what a field of a stage's Params holds."""
    return str(field.metadata.get("section", field.name))


def plain(stage_params: Any) -> dict[str, Any]:
    """Return what `select` gave a stage as plain data, by the dotted names of params.yaml."""
    values = {section_of(field): getattr(stage_params, field.name) for field in dataclasses.fields(stage_params)}
    return {name: v.model_dump(mode="json") if isinstance(v, Section) else v for name, v in values.items()}


def flattened(params: Params) -> dict[str, Any]:
    """Return all params by dotted names, for tracking."""
    return dotted(params.model_dump(mode="json"))


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values of nested mappings by dotted names: {"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


SectionT = TypeVar("SectionT", bound=Section)


def settled(section: SectionT, device: str) -> SectionT:
    """Return params in which no precision is `auto` any more: what it means on this device (dpar_core/precision.py)."""
    updates: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            updates[name] = settled(value, device)
        elif name == "precision":
            updates[name] = settle(value, device)
    return section.model_copy(update=updates)


def precision_lines(name: str, section: Section, device: str) -> list[str]:
    """Return a line for each precision in a section that a person should know of.

    That is what `auto` means here, and by which factor an explicit bf16 is slower on a CPU that emulates it. Sampling is
    not named then: on a CPU it rounds values to bfloat16 and multiplies in float32 (dpar_core/generation/stepping.py). Nor
    is a tokenizer whose weights are read from a file: nothing is trained.
    """
    if isinstance(section, Tokenizer) and section.weights is not None:
        return []
    known = "fp32" if isinstance(section, Entropies) else "auto or fp32"
    lines = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            lines += precision_lines(f"{name}.{key}", value, device)
        elif key == "precision" and value == "auto":
            does = "multiplies" if multiplies_bf16(device) else "emulates"
            lines.append(f"{name}.precision: auto is {settle(value, device)} here (this {device} {does} bfloat16)")
        elif key == "precision" and value == "bf16" and not isinstance(section, Sample) and not multiplies_bf16(device):
            lines.append(
                f"{name}.precision is bf16, which this machine emulates: a matrix product takes {slowdown(device):.0f} "
                f"times as long as in fp32; set it to {known}"
            )
    return lines


_NESTED = 50  # brackets within brackets


def params_text(path: Path) -> str:
    """Return what a params file holds. Raises FileNotFoundError with the way out."""
    if not path.exists():
        own = path.name == "params.yaml"
        way_out = "`dpar-cli params use demo` in the project's folder writes one" if own else "name one that is there"
        raise FileNotFoundError(f"no params file at {path}: {way_out}")
    return path.read_text("utf-8")


def load_params(path: Path) -> Params:
    """Read a params file. Raises ParamsError with every fault in it, FileNotFoundError with the way out."""
    try:
        text = params_text(path)
        if max(accumulate((one in "[{") - (one in "]}") for one in text), default=0) > _NESTED:
            raise ParamsError(
                [f"{path.name} is nested more than {_NESTED} brackets deep, as no params are"]
            )  # would take minutes
        raw = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ParamsError([f"{path.name} is not YAML: {yaml_fault(error)}"]) from None
    return parse_params(raw, where=path.name)


def yaml_fault(error: YAMLError) -> str:
    """Return what is wrong with a YAML file, with its line where that is known."""
    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())


def parse_params(raw: object, *, where: str = "params.yaml") -> Params:
    """Check plain data against the sections and against each other. Raises ParamsError."""
    if not isinstance(raw, Mapping):
        raise ParamsError([f"{where} must be a mapping of sections, found {type(raw).__name__}"])
    faults: list[str] = []
    try:
        Params.model_validate(raw)
    except ValidationError as error:
        faults += _sentences(error.errors(), where)
    whole: dict[str, Any] = {}
    for name, field in Params.model_fields.items():
        try:
            if isinstance(kind := field.annotation, type) and issubclass(kind, Section):
                whole[name] = kind.model_validate(raw[name])
            else:
                whole[name] = raw[name]
        except (ValidationError, KeyError):
            continue
    faults += [f"{where}: {fault}" for fault in _contradictions(whole)]
    if faults:
        raise ParamsError(faults)
    return Params.model_validate(raw)


def _sentences(faults: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """Return a sentence for each fault; a key that is misspelt, and so missing as well, gets one."""
    missing = {fault["loc"] for fault in faults if fault["type"] == "missing"}
    sentences: list[tuple[tuple[Any, ...], str]] = []
    misspelt: set[tuple[Any, ...]] = set()
    for fault in faults:
        *section, key = fault["loc"]
        absent = [other[-1] for other in missing - misspelt if list(other[:-1]) == section]
        if fault["type"] == "extra_forbidden" and (near := get_close_matches(str(key), absent, n=1)):
            misspelt.add((*section, *near))
            sentences.append((fault["loc"], f"{where}: unknown key `{_dotted(fault)}`: write `{near[0]}`, which is missing"))
        else:
            sentences.append((fault["loc"], _sentence(fault, where)))
    return [sentence for place, sentence in sentences if place not in misspelt]


def _dotted(fault: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in fault["loc"])


def _sentence(fault: Mapping[str, Any], where: str) -> str:
    name = _dotted(fault)
    found = fault.get("input")
    context = fault.get("ctx", {})
    kind = fault["type"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key `{name}`: remove it, or check its spelling against `dpar-cli params show demo`"
    if kind == "missing":
        return f"{where}: `{name}` is missing: every value is written out, see `dpar-cli params show demo`"
    if kind == "literal_error":
        return f"{where}: `{name}` is {found!r}, expected one of {context['expected']}"
    if kind == "string_too_short":
        return f"{where}: `{name}` is empty, expected {'a name, or null' if name.endswith('_key') else 'a path'}"
    bounds = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
    if kind in bounds:
        words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}[bounds[kind]]
        return f"{where}: `{name}` is {found!r}, expected {words} {context[bounds[kind]]}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.removeprefix("should be ").removeprefix("must be ")
    return f"{where}: `{name}` is {found!r}, expected {message}"


def _contradictions(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each pair of values that cannot both hold. Sections with faults of their own are absent."""
    data, tokenizer = sections.get("data"), sections.get("tokenizer")
    entropy_model, patching = sections.get("entropy_model"), sections.get("patching")
    model, train = sections.get("model"), sections.get("train")
    sample, score = sections.get("sample"), sections.get("score")
    if data:
        yield from _data_contradictions(data)
    if model and sample and (fault := guidance_fault(model, sample.cfg_scale)):
        yield fault
    if data and tokenizer and data.image_size % tokenizer.downsample:
        yield (
            f"`data.image_size` {data.image_size} is not a multiple of the tokenizer's downsampling "
            f"{tokenizer.downsample} (2^(levels - 1) of `tokenizer.channel_multipliers`)"
        )
    if tokenizer:
        yield from _tokenizer_contradictions(tokenizer)
    if entropy_model:
        yield from _heads("entropy_model", entropy_model.width, entropy_model.heads, multiple=4, why="2D rotary pairs")
        expected = ENTROPY_MODEL_SIZES.get(entropy_model.size, {})
        for name, value in expected.items():
            if getattr(entropy_model, name) != value:
                yield (
                    f"`entropy_model.{name}` is {getattr(entropy_model, name)}, but size {entropy_model.size} has "
                    f"{value}: use that, or size: custom"
                )
        yield from _training_contradictions("entropy_model.train", entropy_model.train)
    if model:
        multiple = head_multiple(model.position_encoding)
        yield from _heads(
            "model", model.width, model.heads, multiple=multiple, why=f"position_encoding {model.position_encoding}"
        )
    if train:
        yield from _training_contradictions("train", train)
        if isinstance(train.equal_time_step, int) and train.equal_time_step > train.steps:
            yield (
                f"`train.equal_time_step` {train.equal_time_step} lies beyond `train.steps` {train.steps}: lower it, or set "
                "it to auto, which takes the step from the measured speeds"
            )
    if patching:
        row = data.image_size // tokenizer.downsample if data and tokenizer else None
        yield from _patching_contradictions(patching, row_width=row)
    if patching and sample and patching.mode not in READ_ENTROPIES:
        for name in ("threshold", "max_patch_length"):
            if getattr(sample, name) is not None:
                yield f"`sample.{name}` is set, but patching.mode {patching.mode} reads no entropies: set it to null"
    if tokenizer:
        largest = math.log(tokenizer.codebook_size)
        for name, section in (("patching", patching), ("sample", sample)):
            if section and section.threshold is not None and section.threshold > largest:
                yield (
                    f"`{name}.threshold` {section.threshold} nats is above ln V = {largest:.3f}, the largest entropy "
                    f"of {tokenizer.codebook_size} codes: no token could start a patch by it"
                )
        if sample and sample.top_k > tokenizer.codebook_size:
            yield f"`sample.top_k` {sample.top_k} is above the codebook size {tokenizer.codebook_size}"
    if sample and sample.cfg_interval[0] > sample.cfg_interval[1]:
        yield f"`sample.cfg_interval` {sample.cfg_interval} ends before it begins"
    if sample and sample.cfg_schedule == "interval" and sample.cfg_interval[0] == sample.cfg_interval[1]:
        yield f"`sample.cfg_interval` {sample.cfg_interval} is empty, so nothing is guided: set cfg_scale to 1 for that"
    elif sample and sample.cfg_schedule == "interval" and data and tokenizer:
        tokens, (low, high) = (data.image_size // tokenizer.downsample) ** 2, sample.cfg_interval
        if low < high and not any(low <= token / tokens < high for token in range(tokens)):
            yield (
                f"`sample.cfg_interval` {sample.cfg_interval} holds none of the {tokens} tokens of an image, so nothing is "
                "guided: widen it, or set cfg_scale to 1 for that"
            )
    own = bool(score and score.reference in ("train", "validation"))
    if data and sample and score and own and sample.resize not in (None, data.image_size):
        yield (
            f"`sample.resize` {sample.resize} gives images of another size than the {score.reference} images, of "
            f"`data.image_size` {data.image_size}, that they are scored against: set it to null, or name another reference"
        )
    if sample and score and score.images > sample.images:
        yield f"`score.images` {score.images} asks for more images than `sample.images` {sample.images} provides"
    if score:
        if score.features != "demo" and score.features_file is None:
            yield f"`score.features` {score.features} needs `score.features_file`, the TorchScript file of the network"
        if score.features == "demo" and score.features_file is not None:
            yield "`score.features_file` is set, but features `demo` trains its own classifier: set it to null"
        for name in ("splits", "neighbours"):
            if getattr(score, name) >= score.images:
                yield f"`score.{name}` {getattr(score, name)} needs more images than `score.images` {score.images}"
        features = FEATURE_COUNTS.get(score.features, 0)
        if score.images <= features and not score.allow_singular:
            yield (
                f"`score.images` {score.images} are too few for a covariance of {features} features: ask for more, "
                "or set `score.allow_singular` for a number to be compared with others of as few images only"
            )


def guidance_fault(model: Model, cfg_scale: float) -> str:
    """Return why a model cannot be guided by a scale, in a sentence; an empty text where it can be."""
    if cfg_scale <= 1 or model.class_dropout:
        return ""
    return (
        f"`sample.cfg_scale` {cfg_scale} guides by the null class, which `model.class_dropout` 0 never trains: "
        "set cfg_scale to 1, or train with class_dropout above 0"
    )


def _data_contradictions(data: Data) -> Iterator[str]:
    if data.source == "builtin":
        for name in ("train", "validation"):
            if getattr(data, name) is not None:
                yield f"`data.{name}` is set, but source builtin reads no path: set it to null, or name another source"
    else:
        for name in ("train", "validation"):
            if getattr(data, name) is None:
                yield f"`data.{name}` is null, but source {data.source} needs the path of its {name} images"
    if data.source not in ("webdataset", "parquet"):
        for name in ("image_key", "label_key"):
            if getattr(data, name) is not None:
                yield f"`data.{name}` is set, but source {data.source} reads no such key: set it to null"
    if data.builtin.crop_min > data.builtin.crop_max:
        yield f"`data.builtin.crop_min` {data.builtin.crop_min} is above crop_max {data.builtin.crop_max}"


def _tokenizer_contradictions(tokenizer: Tokenizer) -> Iterator[str]:
    if tokenizer.weights_key is not None and tokenizer.weights is None:
        yield "`tokenizer.weights_key` is set, but `tokenizer.weights` names no file: set it to null"
    for multiplier in tokenizer.channel_multipliers:
        if tokenizer.base_width * multiplier % tokenizer.norm_groups:
            yield (
                f"`tokenizer.base_width` {tokenizer.base_width} times multiplier {multiplier} is not a multiple of "
                f"`tokenizer.norm_groups` {tokenizer.norm_groups}, the groups of GroupNorm"
            )
            break
    if tokenizer.warmup_steps >= tokenizer.steps:
        yield f"`tokenizer.warmup_steps` {tokenizer.warmup_steps} leaves no step of `tokenizer.steps` {tokenizer.steps}"


def _heads(name: str, width: int, heads: int, *, multiple: int, why: str) -> Iterator[str]:
    if width % heads:
        yield f"`{name}.heads` {heads} does not divide `{name}.width` {width}"
    elif width // heads % multiple:
        yield f"`{name}`: head dimension {width // heads} must be a multiple of {multiple} ({why})"


def _training_contradictions(name: str, training: Training) -> Iterator[str]:
    pieces = training.workers * training.accumulate
    if training.batch_size % pieces:
        yield (
            f"`{name}.batch_size` {training.batch_size} does not divide into {training.workers} workers x "
            f"{training.accumulate} micro-batches: make it a multiple of {pieces}"
        )
    every, validated = training.checkpoint_every, training.validate_every
    if training.keep_best and every < training.steps and every % validated:
        yield (
            f"`{name}.keep_best` {training.keep_best} keeps checkpoints by their validation loss, but `checkpoint_every` "
            f"{every} is not a multiple of `validate_every` {validated}, so some have none: make it one, or set keep_best: 0"
        )


def _patching_contradictions(patching: Patching, *, row_width: int | None) -> Iterator[str]:
    """row_width: tokens of a row, where it is known."""
    target = patching.target_mean_length
    measured = target is not None
    if patching.mode in READ_ENTROPIES:
        if measured == (patching.threshold is not None):
            found = "both are set" if measured else "both are null"
            yield f"`patching.threshold` and `patching.target_mean_length`: {found}, expected exactly one of them"
        limits = {"max_patch_length": patching.max_patch_length}
        if patching.mode == "entropy_rows":
            limits["the tokens of a row,"] = row_width
        for what, limit in limits.items():
            if target is not None and limit is not None and target > limit:
                yield f"`patching.target_mean_length` {target} is above {what} {limit}: no threshold can reach it"
