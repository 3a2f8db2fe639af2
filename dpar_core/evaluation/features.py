"""Networks whose features images are compared by: Inception or DINOv2 from a TorchScript file, and the demo classifier.

Shapes: n images (n, height, width, 3) uint8; d pooled features, c classes, s flattened spatial features.
"""

from __future__ import annotations

import os
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar_core.files import load_weights, sha256_file
from dpar_core.float32 import whole_float32
from dpar_core.models.weights import check_finite, check_zip
from dpar_core.signatures import described, kind_of

# The StyleGAN team's TorchScript export of the Inception network that FID is defined on, and the SHA-256 that k-diffusion's
# evaluation code pins for this address. The file is not part of this project, so neither could be tried here.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SFID_CHANNELS = 7


class Features(NamedTuple):
    """pool: (n, d) float32.
    probabilities: (n, c) float32, or None.
    spatial: (n, s) float32, or None, in the order row, column, channel (see `flatten_spatial`).
    """

    pool: np.ndarray
    probabilities: np.ndarray | None
    spatial: np.ndarray | None


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network and what its scores carry.

    name: "demo", "inception", "dinov2".
    digest: of the weights in file.
    """

    name: str
    digest: str
    file: Path
    compute: Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor | None]]
    device: str

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, *, batch_size: int = 64, done: Callable[[int], None] | None = None) -> Features:
        """Return the features of images (n, h, w, 3) uint8, computed in whole float32 (no TF32).

        Raises ValueError for another dtype or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be (n, height, width, 3) uint8; got {images.dtype} {images.shape}")
        columns: list[list[np.ndarray]] = [[], [], []]
        for first in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(images[first : first + batch_size])).to(self.device)
            parts = self._parts(batch.permute(0, 3, 1, 2).float())
            for column, part in zip(columns, parts):
                if part is not None:
                    column.append(part.float().cpu().numpy())
            if done is not None:
                done(len(batch))
        pool, probabilities, spatial = (np.concatenate(column) if column else None for column in columns)
        if pool is None:
            raise ValueError("expected at least one image; got none")
        return Features(pool, probabilities, spatial)

    def _parts(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute the features of one batch and check their form. Raises ValueError where a file has another interface."""
        way_out = f"{self.file} is not a {self.name} network as expected here"
        try:
            with whole_float32:
                parts = self.compute(images)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError) as error:  # a script of another interface, or of another input size
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ValueError(
                f"{way_out}: it fails on {tuple(images.shape)} images ({lines[-1][:200] if lines else error})"
            ) from None
        for part in parts:
            if part is not None and (not isinstance(part, Tensor) or part.ndim != 2 or len(part) != len(images)):
                what = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"{way_out}: it gives {what} for {len(images)} images, expected (n, features)")
        return parts


def flatten_spatial(maps: Tensor) -> Tensor:
    """Flatten feature maps in the order of ADM's stored statistics `mu_s, sigma_s`: row, column, channel.

    maps: (n, c, h, w), as torch's convolutions give them. Returns (n, h * w * c). The ADM evaluator reshapes maps of
    TensorFlow, whose channels come last; statistics of another order compare other things without any error.
    """
    return maps.permute(0, 2, 3, 1).flatten(1)


class DemoClassifier(nn.Module):
    """A small residual-free CNN that classifies the demo's photographs; its pooled features are what fd_demo compares.

    Input (n, 3, S, S) float 0..255. `features` returns (n, 64) pooled and (n, 8 * 8 * 7) spatial features.
    """

    WIDTHS = (16, 32, 64, 64)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (3, *self.WIDTHS)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in self.WIDTHS)
        self.output = nn.Linear(self.WIDTHS[-1], num_classes)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images / 127.5 - 1
        spatial = x
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(norm(conv(x)))
            if conv is self.convs[2]:
                spatial = flatten_spatial(F.adaptive_avg_pool2d(x[:, :SFID_CHANNELS], 8))
        return x.mean(dim=(2, 3)), spatial

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits (n, classes)."""
        logits: Tensor = self.output(self.features(images)[0])
        return logits


def demo_network(path: Path, device: str) -> FeatureNetwork:
    """Return the demo classifier as a feature network. Raises ValueError or FileNotFoundError."""
    weights = load_weights(path, kind="demo_classifier")
    check_finite(weights.state, path)
    model = DemoClassifier(weights.config["num_classes"]).to(device).eval()
    model.load_state_dict(weights.state)

    def compute(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pool, spatial = model.features(images)
        return pool, model.output(pool).softmax(dim=1), spatial

    return FeatureNetwork("demo", weights.digest, path, compute, device)


# What meets a program from outside first: a process that may die of it, with the memory a sound one needs.
_REHEARSAL = """
import sys
import torch
torch.set_num_threads(1)
try:
    import resource
    with open("/proc/self/statm") as stream:
        held = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[2]),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, OSError, ValueError):
    pass  # no such limit on this system; the time limit holds
try:
    torch.jit.load(sys.argv[1], map_location="cpu")
except BaseException as error:
    sys.exit(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
"""
_REHEARSAL_SECONDS = 120


def _rehearse(path: Path) -> None:
    """Load a TorchScript file in a process of its own. Raises ValueError where it cannot, or dies of it."""
    more = (1 << 30) + 4 * path.stat().st_size
    # -P: a module in the folder where we run is none of ours. No GPU: it would only cost time.
    words = [sys.executable, "-P", "-c", _REHEARSAL, str(path), str(more)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    way_out = f"{path} is not a TorchScript file that can be read ({{}}): fetch it again"
    try:
        done = subprocess.run(
            words, capture_output=True, timeout=_REHEARSAL_SECONDS, env=environment, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ValueError(way_out.format(f"it took over {_REHEARSAL_SECONDS} s")) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        died = f"its reader died of signal {-done.returncode}" if done.returncode < 0 else "its reader said nothing"
        raise ValueError(way_out.format(said[-1][:200] if said and done.returncode > 0 else died))


def load_script(path: Path, device: str) -> torch.jit.ScriptModule:
    """Load a TorchScript file, first in a process of its own. Raises FileNotFoundError or ValueError with the way out."""
    if not path.exists():
        raise FileNotFoundError(f"no feature network at {path}: put the file there, for inception by `dpar-cli fetch`")
    if (kind := kind_of(path)) != "zip":
        problem = described(path, kind) or f"{path} is not a TorchScript file"
        raise ValueError(f"{problem}; expected a TorchScript file, as torch.jit.save writes it")
    names = check_zip(path)
    if not any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{path} is a zip archive without a TorchScript program: export the network with torch.jit.save")
    try:
        _check_records(path)
    except _UnknownType as error:
        raise ValueError(
            f"{path} holds a tensor of the type {error}, which cannot be read here: export it with tensors of another type, "
            "such as float32"
        ) from None
    except Exception as error:  # of as many kinds as there are ways to damage a pickle
        raise ValueError(f"{path} is damaged ({str(error) or type(error).__name__}): fetch it again") from None
    _rehearse(path)
    try:
        model: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # libtorch raises many kinds on files that are whole but not of its making
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{path} is not a TorchScript file that can be read ({reason[:200]}): fetch it again") from None
    check_finite(dict([*model.named_parameters(), *model.named_buffers()]), path)
    return model


_WIDTHS = {  # bytes of a value, by the name of the storage
    **{"Bool": 1, "Byte": 1, "Char": 1, "QInt8": 1, "QUInt8": 1, "Half": 2, "BFloat16": 2, "Short": 2, "Float": 4, "Int": 4},
    **{"QInt32": 4, "Double": 8, "Long": 8, "ComplexHalf": 4, "ComplexFloat": 8, "ComplexDouble": 16},
    **{"UInt16": 2, "UInt32": 4, "UInt64": 8, "Float8_e8m0fnu": 1},
    **{f"Float8_{name}": 1 for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")},
}


class _UnknownType(ValueError):
    """A tensor whose length in bytes is not known here."""


_PUSHED = {"BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "GLOBAL", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"}


def _check_records(path: Path) -> None:
    """Raise ValueError where a tensor's record in a TorchScript file is shorter than the tensor, or its type is unknown.

    libtorch takes the length that the pickle names and reads on behind a shorter record. The pickle's operations are looked
    at one by one and never run.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            folder, _, file = member.rpartition("/")
            if file not in ("data.pkl", "constants.pkl"):
                continue
            for kind, record, count in _storages(archive.read(member)):
                held = archive.getinfo(f"{folder}/{file.removesuffix('.pkl')}/{record}").file_size
                name = kind.removeprefix("torch ").removesuffix("Storage")
                if name not in _WIDTHS and kind.isprintable() and kind == f"torch {name}Storage":
                    raise _UnknownType(name[:60])
                if count * _WIDTHS[name] > held:
                    raise ValueError(f"its tensor {record} has {count} values, and {held} bytes are stored for them")


def _storages(content: bytes) -> Iterator[tuple[str, str, int]]:
    """Yield (class, record, values) of every tensor's storage that a pickle of libtorch names."""
    values: list[Any] = []
    memo: dict[Any, Any] = {}
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in _PUSHED:
            values.append(argument)
        elif operation.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = values[-1] if values else None
        elif operation.name in ("BINGET", "LONG_BINGET"):
            values.append(memo.get(argument))
        elif operation.name == "BINPERSID":  # of ("storage", class, record, device, values)
            yield values[-4], values[-3], values[-1]


# How the network's input follows from images of 0..255: the TensorFlow graph has the first, some exports the second.
NORMALISATIONS = ((128.0, 128.0), (127.5, 127.5))


def inception_network(path: Path, device: str) -> FeatureNetwork:
    """Return the Inception TorchScript as a feature network.

    Interface: called with (n, 3, h, w) float 0..255 and return_features=True it gives (n, 2048) pooled features; its
    member `output` maps those to class scores without bias, as IS is defined. The spatial features of sFID are the first
    seven channels of the branch `conv` of its block layers.mixed_6 (17 x 17), which the script does not hand out: its
    layers are walked one by one, and the walk is used only if it ends in the pooled features that the script itself
    gives; else there is no sFID.
    What could not be checked without the real file: that these names hold.
    """
    model = load_script(path, device)
    weight = dict(model.named_parameters()).get("output.weight", dict(model.named_buffers()).get("output.weight"))
    if weight is None:
        raise ValueError(f"{path} has no output.weight: it is not the StyleGAN export of Inception")
    walks: list[_InceptionWalk | None] = []

    def compute(images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if not walks:
            walks.append(_InceptionWalk.agreeing(model, images[:2]))
        if walks[0] is None:
            pool, spatial = model(images, return_features=True), None
        else:
            pool, spatial = walks[0](images)
        return pool, (pool @ weight.T).softmax(dim=1), spatial

    return FeatureNetwork("inception", sha256_file(path)[:16], path, compute, device)


@dataclass(frozen=True)
class _InceptionWalk:
    """The script's own layers called one after the other, to see what comes out half way."""

    model: torch.jit.ScriptModule
    shift: float
    scale: float

    @staticmethod
    def agreeing(model: torch.jit.ScriptModule, images: Tensor) -> _InceptionWalk | None:
        """Return the walk that ends where the script does, None when none does."""
        names = {name for name, _ in model.layers.named_children()} if hasattr(model, "layers") else set()
        if "mixed_6" not in names or not hasattr(model.layers.mixed_6, "conv"):
            return None
        expected = model(images, return_features=True)
        for shift, scale in NORMALISATIONS:
            walk = _InceptionWalk(model, shift, scale)
            if torch.allclose(walk(images)[0], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
                return walk
        return None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = (resize_as_tensorflow(images, 299) - self.shift) / self.scale
        spatial: Tensor | None = None
        for name, layer in self.model.layers.named_children():
            if name == "mixed_6":
                spatial = flatten_spatial(layer.conv(x)[:, :SFID_CHANNELS])
            x = layer(x)
        return x.flatten(1), spatial


def resize_as_tensorflow(images: Tensor, size: int) -> Tensor:
    """Resize (n, c, h, w) bilinearly as TensorFlow 1 did: pixel i is read at i * h / size, no half-pixel shift, no blur."""
    height, width = images.shape[-2:]
    theta = torch.eye(2, 3, device=images.device)
    theta[0, 2] += 1 / width - 1 / size
    theta[1, 2] += 1 / height - 1 / size
    grid = F.affine_grid(theta.expand(len(images), 2, 3), [*images.shape[:2], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def dinov2_network(path: Path, device: str) -> FeatureNetwork:
    """Return a DINOv2 TorchScript as a feature network: input normalised and resized to 224, output (n, d) features."""
    model = load_script(path, device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def compute(images: Tensor) -> tuple[Tensor, None, None]:
        resized = F.interpolate(images, size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
        return model((resized.clamp(0, 255) / 255 - mean) / deviation), None, None

    return FeatureNetwork("dinov2", sha256_file(path)[:16], path, compute, device)


def feature_network(name: str, path: Path | str, device: str, *, sha256: str | None = None) -> FeatureNetwork:
    """Return the network of a name. Raises ValueError for another name or file.

    name: "inception" (the StyleGAN team's TorchScript), "dinov2" (a TorchScript of yours), or "demo" (the classifier that
        stage features trains, artifacts/features/demo_classifier.safetensors).
    path: its file.
    device: "cpu", "cuda".
    sha256: digest that its file must have; None: that of the published file for inception, any for the others.
    """
    expected = sha256 or (INCEPTION_SHA256 if name == "inception" else None)
    if expected is not None and Path(path).exists() and (found := sha256_file(path)) != expected.lower():
        raise ValueError(f"{path} has SHA-256 {found}, expected {expected.lower()}: fetch it again")
    return open_network(name, Path(path), device)


def open_network(name: str, path: Path, device: str) -> FeatureNetwork:
    """Return the network of a name from its file, whatever the file's digest. Raises ValueError for another name or file."""
    makers = {"demo": demo_network, "inception": inception_network, "dinov2": dinov2_network}
    if name not in makers:
        raise ValueError(f"features must be one of {', '.join(makers)}; got {name!r}")
    return makers[name](path, device)
