"""Which image a step sees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpar_core.training.order import DataOrder, fixed_subset, random_subset


def order(images=23, views=4, batch_size=6, seed=0) -> DataOrder:
    return DataOrder(images=images, views=views, batch_size=batch_size, seed=seed)


def test_every_epoch_shows_every_image_once():
    line = order().positions(0, 3 * 23)
    for epoch in range(3):
        assert sorted(line.indices[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


def test_epochs_and_seeds_differ_in_order_and_views():
    line = order(images=200).positions(0, 400)
    other = order(images=200, seed=1).positions(0, 400)
    assert (line.indices[:200] != line.indices[200:]).any()
    assert (line.indices != other.indices).any()
    assert (line.views[:200] != line.views[200:]).any()


def test_views_of_an_image_are_drawn_evenly_over_epochs():
    draws = order(images=50, views=4).positions(0, 50 * 400)
    counts = np.bincount(draws.views, minlength=4)
    expected = 50 * 400 / 4
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    first_image = draws.views[draws.indices == 0]
    assert np.abs(np.bincount(first_image, minlength=4) - 100).max() < 50


def test_neighbours_in_the_order_are_independent_of_neighbours_on_disk():
    indices = order(images=5000, batch_size=5000).batch(0).indices
    assert abs(np.corrcoef(np.arange(5000), indices)[0, 1]) < 0.06


@settings(max_examples=40)
@given(
    images=st.integers(1, 40),
    views=st.integers(1, 5),
    size=st.integers(1, 4),
    ranks=st.integers(1, 4),
    micros=st.integers(1, 3),
    step=st.integers(0, 30),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_parts_of_all_ranks_make_the_batch_for_any_number_of_ranks(images, views, size, ranks, micros, step, seed):
    data = DataOrder(images=images, views=views, batch_size=size * ranks * micros, seed=seed)
    parts = [
        data.part(step, rank=rank, ranks=ranks, micro=micro, micros=micros)
        for micro in range(micros)
        for rank in range(ranks)
    ]
    whole = data.batch(step)
    assert {len(part.indices) for part in parts} == {size}
    np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
    np.testing.assert_array_equal(np.concatenate([part.views for part in parts]), whole.views)
    assert whole.views.min() >= 0 and whole.views.max() < views


def test_the_order_never_changes_between_versions():
    """Frozen: a continued run must see the images that the broken one would have seen."""
    picks = order().batch(3)
    assert picks.indices.tolist() == FROZEN[0]
    assert picks.views.tolist() == FROZEN[1]


FROZEN = ([15, 14, 6, 18, 7, 6], [1, 3, 3, 1, 1, 3])


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="6 images does not divide into 4 workers x 1 micro-batches"):
        order().part(0, rank=0, ranks=4)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        order(images=0)


def test_the_validation_subset_is_fixed_and_spread():
    assert fixed_subset(10, 0).tolist() == list(range(10))
    assert fixed_subset(10, 99).tolist() == list(range(10))
    assert fixed_subset(10, 4).tolist() == [0, 2, 5, 7]
    assert random_subset(10, 99).tolist() == list(range(10)) and len(set(random_subset(100, 20))) == 20
    assert (random_subset(100, 20) == random_subset(100, 20)).all() and len(set(random_subset(2250, 1000) % 9)) == 9
