"""Pictures show exactly the borders and entropies they are given."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpar_core.pictures import (
    INK,
    colour_bar,
    draw_borders,
    entropy_map,
    fit,
    labelled_grid,
    patch_borders,
    patch_overview,
    save_png,
    scale_colours,
)


def segments_walked(lengths, width):
    """Unit border segments between neighbouring tokens of different patches, token by token."""
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    rows = len(ids) // width
    found = set()
    for token, patch in enumerate(ids):
        y, x = divmod(token, width)
        if x + 1 < width and ids[token + 1] != patch:
            found.add((x + 1, y, x + 1, y + 1))
        if y + 1 < rows and ids[token + width] != patch:
            found.add((x, y + 1, x + 1, y + 1))
    return found


def units(lines):
    return {
        (x, y, x + (y0 == y1), y + (x0 == x1))
        for x0, y0, x1, y1 in lines
        for x in range(x0, max(x1, x0 + 1))
        for y in range(y0, max(y1, y0 + 1))
    }


CASES = st.integers(2, 5).flatmap(lambda g: st.tuples(st.just(g), st.sets(st.integers(1, g * g - 1))))


@settings(max_examples=60)
@given(CASES)
def test_borders_run_exactly_between_tokens_of_different_patches(case):
    width, cuts = case
    ends = [0, *sorted(cuts), width * width]
    lengths = np.diff(ends)
    assert units(patch_borders(lengths, width)) == segments_walked(lengths, width)


def test_a_patch_that_goes_on_in_the_next_row_has_a_border_in_both():
    # 3 x 3: patches of 2, 2, 5 tokens; the second covers the end of row 0 and the start of row 1.
    assert set(patch_borders([2, 2, 5], 3)) == {(2, 0, 2, 1), (1, 1, 1, 2), (0, 1, 3, 1), (0, 2, 1, 2)}


def test_one_patch_has_no_border():
    assert patch_borders([9], 3) == []


def test_border_lines_lie_on_token_edges():
    picture = np.asarray(draw_borders(np.full((4, 4, 3), 128, np.uint8), [2, 2, 4, 4, 4], 4, side=80))
    assert (picture[10, 39:41] != 128).any() and (picture[10, 5:35] == 128).all() and (picture[10, 45:75] == 128).all()
    assert (picture[19:21, 10] != 128).any() and (picture[30, 5:75] == 128).all()


def test_low_entropies_are_dark_and_high_ones_light():
    values = np.linspace(0, 5, 16, dtype=np.float32)
    brightness = scale_colours(values, 0, 5).astype(int).sum(axis=1)
    assert (np.diff(brightness) > 0).all()
    assert (scale_colours(np.array([-1.0, 9.0]), 0, 5) == scale_colours(np.array([0.0, 5.0]), 0, 5)).all()


def test_the_entropy_map_has_a_cell_a_token_and_a_grey_first():
    entropies = np.array([np.nan, 1, 2, 3, 0, 1, 2, 3, 0], np.float32)
    picture = np.asarray(entropy_map(entropies, 3, side=30, low=0, high=3))
    assert picture.shape == (30, 30, 3)
    assert (picture[:10, :10] == 150).all()
    cells = picture[5::10, 5::10].reshape(-1, 3)
    assert (cells[1:] == scale_colours(entropies[1:], 0, 3)).all()


def test_small_pictures_keep_their_pixels_and_large_ones_are_resampled():
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    assert (np.asarray(fit(small, 40))[::10, ::10] == small).all()
    assert fit(Image.new("RGB", (200, 200)), 40).size == (40, 40)


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("threshold", [None, 2.0, 99.0])
def test_the_overview_shows_a_panel_for_each_thing_known(decoded, threshold):
    image, entropies = np.full((8, 8, 3), 200, np.uint8), np.arange(16, dtype=np.float32) / 4
    picture = patch_overview(
        image, entropies, [4, 4, 4, 4], 4, threshold=threshold, decoded=image if decoded else None, side=64
    )
    assert picture.width == (4 if decoded else 3) * (64 + 20) + 20
    marks = (np.asarray(picture)[108:120] == INK).all(axis=2).any()
    assert marks == (threshold == 2.0)


def test_the_same_picture_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        grid = labelled_grid([np.zeros((2, 4, 4, 3), np.uint8)], ["row"], columns=["one", "two"], title="title", factor=3)
        save_png(grid, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_labels_grow_with_the_images_but_never_take_more_than_two_of_them():
    rows = [np.zeros((1, 128, 128, 3), np.uint8)]
    widths = {label: labelled_grid(rows, [label]).width - 132 for label in ("retina", "a longer name", 30 * "very ")}
    assert 70 < widths["retina"] < widths["a longer name"] < 268
    assert widths[30 * "very "] == labelled_grid([np.zeros((1, 16, 16, 3), np.uint8)], [30 * "very "]).width - 20


def test_the_colour_bar_runs_from_low_to_high():
    bar = np.asarray(colour_bar(50, 4))
    assert bar.shape == (4, 50, 3)
    assert (bar[0, [0, -1]] == scale_colours(np.array([0.0, 1.0]), 0, 1)).all()
