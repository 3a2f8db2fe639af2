"""One image of a data set through every step: the file, its views, tokens, entropies and patches.

Shapes: S pixels of a view's side, T = G x G tokens of a view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image, ImageDraw

from dpar_core.data.images import views
from dpar_core.data.manifest import Manifest, Row, read_manifest
from dpar_core.data.shards import TokenShards
from dpar_core.models.vq import to_uint8
from dpar_core.patches.maps import EntropyMaps, PatchMaps
from dpar_core.pictures import FAINT, INK, PAPER, draw_borders, entropy_map, font
from stages import params as P
from stages.artifacts import ENTROPIES, MANIFEST, PATCH_MAPS, TOKENIZER, TOKENS
from stages.data import ManifestOpener
from stages.tokenize_images import load_tokenizer

_SIDE = 208  # pixels of a panel


@dataclass
class Inspection:
    """What is known of an image; what later stages have not made is None.

    image: (h, w, 3) uint8.
    views: (n, S, S, 3) uint8.
    shard: where its tokens are.
    tokens: (n, T) uint16.
    decoded: (n, S, S, 3) uint8.
    entropies: (n, T) float32 nats.
    lengths: patch lengths of each view.
    missing: sentences.
    """

    row: Row
    row_width: int | None = None
    image: np.ndarray | None = None
    views: np.ndarray | None = None
    shard: str | None = None
    tokens: np.ndarray | None = None
    decoded: np.ndarray | None = None
    entropies: np.ndarray | None = None
    lengths: list[np.ndarray] | None = None
    threshold: float | None = None
    missing: list[str] = field(default_factory=list)


def inspect_image(key: str, *, artifacts: Path, data: P.Data) -> Inspection:
    """Collect everything that the artifacts hold of one image.

    key: a key of the manifest, or the end of an image's path. Raises ValueError when it is none or stands for several,
    FileNotFoundError when the manifest is missing.
    """
    manifest = read_manifest(MANIFEST.below(artifacts))
    found = Inspection(find_row(manifest, key))
    row = found.row
    try:
        shards: TokenShards | str = TokenShards(TOKENS.below(artifacts), row.split)
    except (ValueError, OSError) as error:
        shards = str(error)
    made = data if isinstance(shards, str) else shards.meta  # the views that there are tokens of, whatever params say now
    try:
        found.image = ManifestOpener(manifest)(row)
        found.views = views(found.image, made.image_size, made.views)
    except ValueError as error:
        found.missing.append(f"the image cannot be used: {error}")
    if isinstance(shards, str):
        found.missing.append(shards)
        return found
    try:
        index = shards.find(row.key)
        if index is None:
            raise ValueError("no tokens: the image was bad when tokens were made, or is new since")
        found.row_width = shards.meta.row_width
        found.shard, _ = shards.shard_of(index)
        found.tokens = shards.all_views(index)
        model, _ = load_tokenizer(TOKENIZER.below(artifacts), "cpu")
        codes = torch.from_numpy(found.tokens.astype(np.int64)).reshape(-1, found.row_width, found.row_width)
        with torch.inference_mode():
            found.decoded = torch.cat([to_uint8(model.decode(one[None])) for one in codes]).numpy()
        _add_patches(found, shards, index, artifacts)
    except (ValueError, OSError) as error:
        found.missing.append(str(error))
    return found


def find_row(manifest: Manifest, key: str) -> Row:
    """Return the row of a key, or of the only image whose source ends with it, name by name. Raises ValueError."""
    row = manifest.find(key)
    if row is not None:
        return row
    sources = manifest.rows.table["source"]
    whole = [pc.ends_with(sources, f"{before}{key}") for before in ("/", ":")] + [pc.equal(sources, key)]
    matches: list[int] = pc.indices_nonzero(pc.or_(pc.or_(whole[0], whole[1]), whole[2])).to_pylist() if key else []
    if len(matches) == 1:
        return manifest.rows[matches[0]]
    if not matches:
        first = manifest.rows[0].key
        raise ValueError(f"no image {key!r} in the manifest: expected a key, as {first}, or the end of a path")
    shown = ", ".join(manifest.rows[match].key for match in matches[:5])
    raise ValueError(f"{len(matches)} images end with {key!r}: give a key, as one of {shown}")


def _add_patches(found: Inspection, shards: TokenShards, index: int, artifacts: Path) -> None:
    entropies = EntropyMaps(ENTROPIES.below(artifacts), shards)
    count, found.entropies = shards.meta.num_views, entropies.views_of(index)
    maps = PatchMaps(PATCH_MAPS.below(artifacts), shards, entropy_model=entropies.made_by.entropy_model)
    found.lengths = maps.lengths(np.full(count, index), np.arange(count))
    found.threshold = maps.rule.threshold if maps.rule.reads_entropies else None


def describe(found: Inspection) -> str:
    """Return what is known in words and numbers."""
    row = found.row
    lines = [f"key       {row.key}", f"split     {row.split}", f"class     {row.label} {row.class_name}"]
    lines.append(f"source    {row.source}")
    if row.box:
        lines.append(f"box       {row.box[0]}, {row.box[1]} to {row.box[2]}, {row.box[3]}")
    if found.image is not None:
        count = "no views" if found.views is None else f"{len(found.views)} views"
        lines.append(f"pixels    {found.image.shape[1]} x {found.image.shape[0]}, {count}")
    if found.tokens is not None:
        lines.append(f"shard     {found.shard}")
        lines.append(f"tokens    {found.tokens.shape[1]} per view, {len(np.unique(found.tokens))} different codes")
    if found.entropies is not None:
        known = found.entropies[:, 1:]
        lines.append(f"entropies {known.mean():.3f} nats on average, {known.min():.3f} to {known.max():.3f}")
    if found.lengths is not None:
        counts = ", ".join(str(len(one)) for one in found.lengths)
        threshold = "" if found.threshold is None else f" (threshold {found.threshold:.3f} nats)"
        lines.append(f"patches   {counts}{threshold}")
    return "\n".join([*lines, *found.missing])


def draw_inspection(found: Inspection) -> Image.Image:
    """Draw the image beside what is known of it, and a row for each view.

    A row shows pixels, decoded tokens, tokens, entropies and patches, as far as they are there. Raises
    ValueError when nothing of the image can be shown.
    """
    shown = next((pixels for pixels in (found.views, found.decoded) if pixels is not None), ())
    if found.image is None and not len(shown):
        raise ValueError(f"nothing to show of {found.row.key}: {'; '.join(found.missing)}")
    side = _SIDE if found.row_width is None else found.row_width * max(_SIDE // found.row_width, 1)
    panels = _panels(found, side)
    gap, lines = 10, [line for line in describe(found).split("\n") if line]
    height = 0 if found.image is None else max(round(_SIDE * min(found.image.shape[0] / found.image.shape[1], 2)), 1)
    head = max(height, 20 * len(lines)) + gap
    width = max(len(panels), 4) * (side + gap) + gap
    canvas = Image.new("RGB", (width, 60 + head + len(shown) * (side + gap)), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, gap), f"{found.row.key}: {found.row.class_name}, {found.row.source}", INK, font(14))
    if found.image is not None:
        canvas.paste(Image.fromarray(found.image).resize((_SIDE, height), Image.Resampling.BICUBIC), (gap, 36))
    for number, line in enumerate(lines):
        word, _, rest = line.partition(" ") if line not in found.missing else ("", "", line)
        pen.text((_SIDE + 3 * gap, 36 + 20 * number), word, FAINT, font(13))
        pen.text((_SIDE + 3 * gap + (80 if word else 0), 36 + 20 * number), rest.strip(), INK, font(13))
    for column, (words, panel) in enumerate(panels.items()):
        pen.text((gap + column * (side + gap), 40 + head), words, FAINT, font(13))
        for number in range(len(shown)):
            canvas.paste(panel(number), (gap + column * (side + gap), 60 + head + number * (side + gap)))
    return canvas


def _panels(found: Inspection, side: int) -> dict[str, Callable[[int], Image.Image]]:
    """Return what draws the tile of a view, by its caption, for what there is."""
    panels: dict[str, Callable[[int], Image.Image]] = {}
    pixels, tokens, entropies, lengths = found.views, found.tokens, found.entropies, found.lengths

    def enlarged(picture: np.ndarray) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(picture)).resize((side, side), Image.Resampling.NEAREST)

    if found.views is not None:
        panels["view"] = partial(lambda images, view: enlarged(images[view]), found.views)
    if found.decoded is not None:
        panels["decoded tokens"] = partial(lambda images, view: enlarged(images[view]), found.decoded)
        pixels = found.decoded if pixels is None else pixels
    if found.row_width is None:
        return panels
    width = found.row_width
    if tokens is not None:
        # One colour per code: equal codes stand out, order means nothing.
        colours = np.random.default_rng(0).integers(40, 230, (65536, 3), dtype=np.uint8)
        panels["tokens"] = lambda view: enlarged(colours[tokens[view]].reshape(width, width, 3))
    if entropies is not None:
        low, high = float(np.nanmin(entropies[:, 1:])), float(np.nanmax(entropies[:, 1:]))
        panels[f"entropies, {low:.2f} (dark) to {high:.2f} nats"] = lambda view: entropy_map(
            entropies[view], width, side=side, low=low, high=high
        )
    if lengths is not None and pixels is not None:
        panels["patches"] = lambda view: draw_borders(
            np.ascontiguousarray(pixels[view]), lengths[view].tolist(), width, side=side
        )
    return panels
