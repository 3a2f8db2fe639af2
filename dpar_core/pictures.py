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
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own typeface at a size in pixels."""
    return ImageFont.load_default(size)


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel: (h, w, 3) -> (h * factor, w * factor, 3)."""
    return image.repeat(factor, 0).repeat(factor, 1)


def scale_colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map values (...) linearly from [low, high] onto the colour scale: (..., 3) uint8."""
    position = np.clip((np.asarray(values, float) - low) / max(high - low, 1e-9), 0, 1) * (len(SCALE) - 1)
    index = np.minimum(position.astype(int), len(SCALE) - 2)
    share = (position - index)[..., None]
    colours: np.ndarray = (SCALE[index] * (1 - share) + SCALE[index + 1] * share).round().astype(np.uint8)
    return colours


def labelled_grid(
    rows: Sequence[np.ndarray], labels: Sequence[str], *, columns: Sequence[str] = (), title: str = "", factor: int = 1
) -> Image.Image:
    """Lay out rows of images with a label before each and names above the columns.

    rows: arrays (n, h, w, 3) uint8, all images of one size. Returns an RGB picture.
    """
    height, width = rows[0].shape[1] * factor, rows[0].shape[2] * factor

    def longest(size: int) -> int:
        return max((int(font(size).getlength(label)) for label in labels), default=0)

    gap, size = 4, max(13, height // 5)  # labels that are still read where the picture is shown at a third of its size
    size = size if longest(size) <= 2 * width else 13
    left = gap + longest(size) + 2 * gap
    head = (size + 11 if title else 0) + (20 if columns else 0) + gap
    most = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + most * (width + gap), head + len(rows) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, gap), title, INK, font(size + 2))
    for number, name in enumerate(columns):
        draw.text((left + number * (width + gap) + width // 2, head - 14), name, FAINT, font(12), anchor="mm")
    for line, (row, label) in enumerate(zip(rows, labels)):
        top = head + line * (height + gap)
        draw.text((left - 2 * gap, top + height // 2), label, INK, font(size), anchor="rm")
        for column, image in enumerate(row):
            canvas.paste(Image.fromarray(enlarge(image, factor)), (left + column * (width + gap), top))
    return canvas


def patch_borders(lengths: Sequence[int] | np.ndarray, row_width: int) -> list[tuple[int, int, int, int]]:
    """Return the border segments between tokens of different patches, in token units: (x0, y0, x1, y1) each.

    Segments of one line that touch are joined, so a border is drawn in one stroke. A patch that goes on in the next row
    has its border in both rows.
    """
    ids = np.repeat(np.arange(len(lengths)), lengths).reshape(-1, row_width)
    upright = [(x + 1, top, x + 1, end) for x in range(row_width - 1) for top, end in _runs(ids[:, x] != ids[:, x + 1])]
    level = [(left, y + 1, end, y + 1) for y in range(len(ids) - 1) for left, end in _runs(ids[y] != ids[y + 1])]
    return upright + level


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, end) of every run of True in (n,) bool."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def draw_borders(
    image: np.ndarray | Image.Image, lengths: Sequence[int] | np.ndarray, row_width: int, *, side: int
) -> Image.Image:
    """Fit a square image (h, w, 3) into `side` pixels and draw the borders of its patches over it: white on a dark edge."""
    picture = fit(image, side)
    draw = ImageDraw.Draw(picture)
    cell = side / row_width
    core = max(round(cell / 24), 1)
    lines = [tuple(round(position * cell) for position in line) for line in patch_borders(lengths, row_width)]
    for colour, width in (((16, 18, 24), core + 2), ((255, 255, 255), core)):
        grow = width // 2
        for x0, y0, x1, y1 in lines:
            box = (x0 - grow, y0 - grow, x1 - grow + width - 1, y1 - grow + width - 1)
            draw.rectangle(box, fill=colour)
    return picture


def fit(image: np.ndarray | Image.Image, side: int) -> Image.Image:
    """Return a square image with `side` pixels: small ones keep their pixels visible, larger ones are resampled."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    grows = picture.width <= side
    return picture.resize((side, side), Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def entropy_map(entropies: np.ndarray, row_width: int, *, side: int, low: float, high: float) -> Image.Image:
    """Draw entropies (T,) nats as coloured cells; the first token, which nothing predicts, is grey."""
    colours = scale_colours(np.nan_to_num(entropies), low, high).reshape(-1, row_width, 3)
    colours[0, 0] = (150, 150, 150)
    return Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST)


def colour_bar(width: int, height: int) -> Image.Image:
    """Draw the colour scale from low (left) to high."""
    return Image.fromarray(np.broadcast_to(scale_colours(np.linspace(0, 1, width), 0, 1), (height, width, 3)).copy())


def patch_overview(
    image: np.ndarray | Image.Image,
    entropies: np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    row_width: int,
    *,
    threshold: float | None,
    decoded: np.ndarray | None = None,
    title: str = "",
    side: int = 320,
) -> Image.Image:
    """Show an image, its entropy map, and its patches side by side, with a scale in nats and the counts.

    image: (h, w, 3) uint8, square.
    entropies: (T,) float32 nats, entry 0 ignored.
    lengths: patch lengths that sum to T.
    threshold: nats, marked on the scale.
    decoded: (S, S, 3) uint8, what the tokens alone show; a panel of its own.
    Returns an RGB picture, with `side` rounded to whole tokens.
    """
    side = row_width * max(side // row_width, 2)
    tokens = len(entropies)
    known = np.asarray(entropies)[1:]
    low, high = float(known.min()), float(known.max())
    panels = [(title or "image", fit(image, side), "")]
    if decoded is not None:
        panels.append((f"{tokens} tokens", fit(decoded, side), "decoded by the tokenizer"))
    panels.append(("next-token entropy", entropy_map(entropies, row_width, side=side, low=low, high=high), ""))
    count = f"{len(lengths)} patches"
    mean = f"{tokens / len(lengths):.2f} tokens per patch"
    panels.append((count, draw_borders(image, lengths, row_width, side=side), mean))
    gap, head, foot = 20, 40, 56
    canvas = Image.new("RGB", (len(panels) * (side + gap) + gap, head + side + foot), PAPER)
    draw = ImageDraw.Draw(canvas)
    top = head + side + 12
    for number, (name, panel, note) in enumerate(panels):
        left = gap + number * (side + gap)
        draw.text((left, head - 10), name, INK, font(16), anchor="ls")
        canvas.paste(panel, (left, head))
        draw.text((left, top), note, FAINT, font(13))
    left = gap + (len(panels) - 2) * (side + gap)
    canvas.paste(colour_bar(side, 10), (left, top))
    if threshold is not None and low < threshold < high:
        position = (threshold - low) / (high - low)
        x = left + round(position * side)
        draw.rectangle((x - 2, top - 4, x + 1, top + 13), fill=PAPER)
        draw.rectangle((x - 1, top - 4, x, top + 13), fill=INK)
        words = f"threshold {threshold:.2f}"
        # Above the scale's own ends, which keep their places, when there is room for it.
        middle = min(max(x, left + 90), left + side - 118)
        draw.text((middle, top + 18), words, INK, font(13), anchor="ma")
    draw.text((left, top + 18), f"{low:.2f}", FAINT, font(13))
    draw.text((left + side, top + 18), f"{high:.2f} nats", FAINT, font(13), anchor="ra")
    return canvas


def save_png(picture: Image.Image, path: Path | str) -> None:
    """Write a PNG without times in it, so that the same picture gives the same bytes."""
    picture.save(path, format="PNG", optimize=False)
