"""Pictures drawn with Pillow alone: labelled grids of images, and an image's entropy map with its patches.

Shapes: images (n, height, width, 3) uint8; T = G x G tokens of an image in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, FAINT = (32, 36, 44), (255, 255, 255), (120, 126, 138)
# A dark-to-light scale with even steps in lightness: night blue, violet, orange, pale yellow.
SCALE = np.array([(12, 20, 58), (72, 35, 116), (150, 44, 112), (221, 81, 76), (250, 154, 66), (252, 243, 176)], float)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own typeface at a size in pixels."""
    return ImageFont.load_default(size)


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel: (h, w, 3) -> (h * factor, w * factor, 3)."""
    return image.repeat(factor, 0).repeat(factor, 1)


def scale_colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map values (...) linearly from [low, high] onto the colour scale: (..., 3) uint8."""
    place = np.clip((np.asarray(values, float) - low) / max(high - low, 1e-9), 0, 1) * (len(SCALE) - 1)
    index = np.minimum(place.astype(int), len(SCALE) - 2)
    share = (place - index)[..., None]
    return (SCALE[index] * (1 - share) + SCALE[index + 1] * share).round().astype(np.uint8)


def labelled_grid(
    rows: Sequence[np.ndarray], labels: Sequence[str], *, columns: Sequence[str] = (), title: str = "", factor: int = 1
) -> Image.Image:
    """Lay out rows of images with a label before each and names above the columns.

    rows: arrays (n, h, w, 3) uint8, all images of one size. Returns an RGB picture.
    """
    height, width = rows[0].shape[1] * factor, rows[0].shape[2] * factor
    gap, size = 4, 13
    left = gap + max((int(font(size).getlength(label)) for label in labels), default=0) + 2 * gap
    head = (24 if title else 0) + (20 if columns else 0) + gap
    most = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + most * (width + gap), head + len(rows) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, gap), title, INK, font(15))
    for number, name in enumerate(columns):
        draw.text((left + number * (width + gap) + width // 2, head - 14), name, FAINT, font(12), anchor="mm")
    for line, (row, label) in enumerate(zip(rows, labels)):
        top = head + line * (height + gap)
        draw.text((left - 2 * gap, top + height // 2), label, INK, font(size), anchor="rm")
        for column, image in enumerate(row):
            canvas.paste(Image.fromarray(enlarge(image, factor)), (left + column * (width + gap), top))
    return canvas


def patch_borders(lengths: Sequence[int], row_width: int) -> list[tuple[int, int, int, int]]:
    """Return the border segments between tokens of different patches, in token units: (x0, y0, x1, y1) each."""
    ids = np.repeat(np.arange(len(lengths)), lengths).reshape(-1, row_width)
    lines = [(x, y, x, y + 1) for y, x in zip(*np.nonzero(ids[:, 1:] != ids[:, :-1]))]
    vertical = [(int(x0) + 1, int(y0), int(x1) + 1, int(y1)) for x0, y0, x1, y1 in lines]
    rows = [(int(x), int(y) + 1, int(x) + 1, int(y) + 1) for y, x in zip(*np.nonzero(ids[1:] != ids[:-1]))]
    return vertical + rows


def draw_borders(image: np.ndarray, lengths: Sequence[int], row_width: int, *, side: int) -> Image.Image:
    """Enlarge an image (h, w, 3) to `side` pixels and draw the borders of its patches over it."""
    picture = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    cell = side / row_width
    for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        for x0, y0, x1, y1 in patch_borders(lengths, row_width):
            draw.line([(x0 * cell, y0 * cell), (x1 * cell, y1 * cell)], colour, width)
        draw.rectangle([0, 0, side - 1, side - 1], outline=colour, width=width)
    return picture


def entropy_map(entropies: np.ndarray, row_width: int, *, side: int, low: float, high: float) -> Image.Image:
    """Draw entropies (T,) nats as coloured cells; the first token, which nothing predicts, is grey."""
    colours = scale_colours(np.nan_to_num(entropies), low, high).reshape(row_width, row_width, 3)
    colours[0, 0] = (150, 150, 150)
    return Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST)


def patch_overview(
    image: np.ndarray,
    entropies: np.ndarray,
    lengths: Sequence[int],
    row_width: int,
    *,
    threshold: float | None,
    title: str = "",
    side: int = 320,
) -> Image.Image:
    """Show an image, its entropy map, and its patches side by side, with a scale in nats and the counts.

    image: (h, w, 3) uint8; entropies: (T,) float32 nats, entry 0 ignored; lengths: patch lengths that sum to T.
    """
    side = row_width * max(side // row_width, 2)
    known = np.asarray(entropies)[1:]
    low, high = float(known.min()), float(known.max())
    gap, head, foot = 12, 34, 44
    canvas = Image.new("RGB", (3 * side + 4 * gap, head + side + foot), PAPER)
    draw = ImageDraw.Draw(canvas)
    panels = (
        ("image", Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)),
        ("next-token entropy", entropy_map(entropies, row_width, side=side, low=low, high=high)),
        (f"{len(lengths)} patches of {row_width**2} tokens", draw_borders(image, lengths, row_width, side=side)),
    )
    for number, (name, panel) in enumerate(panels):
        left = gap + number * (side + gap)
        caption = f"{title}: {name}" if title and number == 0 else name
        draw.text((left, 10), caption, INK, font(15))
        canvas.paste(panel, (left, head))
    top, left = head + side + 10, 2 * gap + side
    bar = Image.fromarray(np.broadcast_to(scale_colours(np.linspace(low, high, side), low, high), (10, side, 3)).copy())
    canvas.paste(bar, (left, top))
    draw.text((left, top + 14), f"{low:.2f}", FAINT, font(12))
    draw.text((left + side, top + 14), f"{high:.2f} nats", FAINT, font(12), anchor="ra")
    if threshold is not None and low <= threshold <= high:
        x = left + round((threshold - low) / max(high - low, 1e-9) * side)
        draw.line([(x, top - 4), (x, top + 13)], INK, 2)
        draw.text((x, top + 14), f"threshold {threshold:.2f}", INK, font(12), anchor="ma")
    mean = row_width**2 / len(lengths)
    draw.text((3 * gap + 2 * side, top), f"mean length {mean:.2f} tokens a patch", FAINT, font(13))
    return canvas


def save_png(picture: Image.Image, path: Path | str) -> None:
    """Write a PNG without times in it, so that the same picture gives the same bytes."""
    picture.save(path, format="PNG", optimize=False)
