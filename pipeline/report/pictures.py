"""The pictures of the report as data that a page can hold: thumbnails, heat maps, patch borders as paths.

Shapes: T = G x G tokens of an image, S its side in pixels.
"""

from __future__ import annotations

import base64
import io
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpar_core.data.images import CENTER_VIEWS, BadImage
from dpar_core.data.manifest import Manifest, Row
from dpar_core.data.shards import TokenShards
from dpar_core.data.sources import ImageOpener
from dpar_core.models.load import read_trained
from dpar_core.models.vq import to_uint8
from dpar_core.patches.maps import EntropyMaps, PatchMaps
from dpar_core.patches.rule import lengths_from_starts
from dpar_core.pictures import fit, patch_borders, patch_overview, scale_colours
from pipeline.report.overlay import middle_square
from stages.artifacts import SAMPLE_IMAGES, SAMPLE_TOKENS
from stages.data import ManifestOpener

LARGEST_PNG, LARGEST = 96, 320  # pixels of a side: larger pictures travel as JPEG, the largest are reduced
CLASS_ROWS, COLUMNS = 12, 4  # samples side by side: a row per class, unless there are more classes than that


def data_uri(picture: Image.Image) -> str:
    """Put a picture into the page: PNG where its pixels are to be seen, JPEG where it is large."""
    if max(picture.size) > LARGEST:
        picture = picture.resize((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    kind = "png" if max(picture.size) <= LARGEST_PNG else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **({"quality": 90} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def file_uri(path: Path) -> str:
    """Put a PNG file into the page as it is."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def border_path(lengths: np.ndarray, row_width: int) -> str:
    """Return the borders of patches as an SVG path in token units."""
    lines = patch_borders(lengths, row_width)
    return "".join(f"M{x0} {y0}{f'H{x1}' if y0 == y1 else f'V{y1}'}" for x0, y0, x1, y1 in lines)


@dataclass(frozen=True)
class Example:
    """A validation image.

    photo: at its own resolution.
    decoded: (S, S, 3) uint8, what its tokens show.
    entropies: (T,) float32 nats.
    lengths: patch lengths.
    """

    class_name: str
    photo: Image.Image
    decoded: np.ndarray
    entropies: np.ndarray
    lengths: np.ndarray
    row_width: int

    def shown(self, low: float, high: float) -> dict[str, Any]:
        """Return what the page shows; entropies are coloured from low to high nats."""
        colours = scale_colours(np.nan_to_num(self.entropies), low, high).reshape(-1, self.row_width, 3)
        colours[0, 0] = 150
        return {
            "name": self.class_name,
            "photo": data_uri(self.photo),
            "decoded": data_uri(Image.fromarray(self.decoded)),
            "heat": data_uri(Image.fromarray(colours)),
            "borders": border_path(self.lengths, self.row_width),
            "width": self.row_width,
            "tokens": len(self.entropies),
            "patches": len(self.lengths),
            "nats": ",".join("" if np.isnan(e) else f"{e:.2f}" for e in self.entropies),
            "exact": ",".join("" if np.isnan(e) else f"{e:.9g}" for e in self.entropies),
            "lengths": ",".join(str(n) for n in self.lengths),
        }

    def overview(self, threshold: float | None) -> Image.Image:
        """Draw the example as a picture of its own."""
        return patch_overview(
            self.photo,
            self.entropies,
            self.lengths,
            self.row_width,
            threshold=threshold,
            decoded=self.decoded,
            title=self.class_name,
        )


def examples(
    manifest: Manifest, tokenizer: Path, shards: TokenShards, entropies: EntropyMaps, maps: PatchMaps, *, count: int
) -> list[Example]:
    """Return `count` validation images, of as many classes as there are, centre crops. Raises ValueError.

    For every class the image whose number of patches is the middle one of (up to 64 of) its images is taken, so that
    examples are neither the best nor the worst.
    """
    opener, meta = ManifestOpener(manifest), shards.meta
    trained = read_trained(tokenizer, "tokenizer")
    if trained.digest != meta.tokenizer:
        raise ValueError(
            f"{shards.folder} was made with tokenizer {meta.tokenizer}, but {tokenizer} is {trained.digest}: run "
            "`dpar-cli run tokenize_images`"
        )
    vq = trained.build()
    found = []
    for index in _typical(shards, maps, count):
        at = (np.array([index]), np.array([CENTER_VIEWS[meta.views]]))
        tokens = torch.from_numpy(shards.tokens(*at).astype(np.int64)).view(1, meta.row_width, -1)
        with torch.inference_mode():
            decoded = to_uint8(vq.decode(tokens))[0].numpy()
        row = manifest.find(shards.key(index))
        if row is None:
            raise ValueError(f"{shards.folder} holds {shards.key(index)}, the manifest does not: run `dpar-cli run`")
        photo = middle_square(_opened(opener, row))
        photo = fit(photo, LARGEST) if photo.width > LARGEST else photo
        found.append(
            Example(
                meta.classes[shards.labels[index]],
                photo,
                decoded,
                entropies.views_of(index)[CENTER_VIEWS[meta.views]],
                maps.lengths(*at)[0],
                meta.row_width,
            )
        )
    return found


def _typical(shards: TokenShards, maps: PatchMaps, count: int) -> list[int]:
    of_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(shards.labels[: 64 * 1000]):
        if len(of_class[int(label)]) < 64:
            of_class[int(label)].append(index)
    ranked = []
    for _, indices in sorted(of_class.items()):
        lengths = maps.lengths(np.array(indices), np.full(len(indices), CENTER_VIEWS[shards.meta.views]))
        order = sorted(range(len(indices)), key=lambda i: (len(lengths[i]), i))
        middle = len(order) // 2
        ranked.append([indices[order[i]] for i in sorted(range(len(order)), key=lambda i: abs(i - middle))])
    rounds = max(map(len, ranked))
    return [of[turn] for turn in range(rounds) for of in ranked if turn < len(of)][:count]


Cell = dict[str, str]  # what a tile of the page shows: `image`, `name` and, for DPAR, `borders`


def sample_cells(folder: Path, class_names: list[str], *, row_width: int, borders: bool) -> dict[int, list[Cell]]:
    """Return the first samples of each class of a sample folder, by label: up to COLUMNS of up to CLASS_ROWS classes."""
    images, labels = leading_samples(folder / SAMPLE_IMAGES, 8 * COLUMNS * CLASS_ROWS)
    plans: list[np.ndarray] = []
    if borders:
        with np.load(folder / SAMPLE_TOKENS, allow_pickle=False) as archive:
            starts = np.unpackbits(archive["starts"][: len(images)], axis=1, count=row_width**2)
        plans = lengths_from_starts(starts.astype(bool))

    def cell(index: int) -> Cell:
        shown = {"image": data_uri(Image.fromarray(images[index])), "name": class_names[labels[index]]}
        return shown | ({"borders": border_path(plans[index], row_width)} if borders else {})

    found = sorted({int(label) for label in labels})[:CLASS_ROWS]
    return {label: [cell(int(i)) for i in np.flatnonzero(labels == label)[:COLUMNS]] for label in found}


def _opened(opener: ImageOpener, row: Row) -> np.ndarray:
    """Return an image that the page shows, (height, width, 3) uint8. Raises ValueError with its name and the way out."""
    try:
        return opener(row)
    except BadImage as error:
        raise ValueError(
            f"image {row.source}, which the report shows, {error}: put the {row.split} images back where data.{row.split} "
            "says, then `dpar-cli run report`"
        ) from None


def real_cells(manifest: Manifest, shards: TokenShards, labels: list[int]) -> dict[int, list[Cell]]:
    """Return the first validation images of some classes, cropped and scaled to the size that the models see."""
    opener, meta, found = ManifestOpener(manifest), shards.meta, {}
    for label in labels:
        rows = [manifest.find(shards.key(int(i))) for i in np.flatnonzero(shards.labels == label)[:COLUMNS]]
        crops = [middle_square(_opened(opener, row)) for row in rows if row is not None]
        side = (meta.image_size, meta.image_size)
        small = [crop.resize(side, Image.Resampling.LANCZOS) for crop in crops]
        found[label] = [{"image": data_uri(one), "name": meta.classes[label]} for one in small]
    return found


def leading_samples(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the first images and labels of samples.npz without reading the rest (50,000 of 256 pixels are 10 GB)."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for name in ("arr_0.npy", "arr_1.npy"):
            with archive.open(name) as stream:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                shape = (min(count, shape[0]), *shape[1:])
                content = stream.read(int(np.prod(shape)) * dtype.itemsize)
                found.append(np.frombuffer(content, dtype).reshape(shape))
    return found[0], found[1]
