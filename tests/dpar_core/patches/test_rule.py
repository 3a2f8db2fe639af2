"""The patch rule: batched, fast, incremental, and walked in plain Python."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpar_core.choices import PatchMode
from dpar_core.patches.rule import (
    BoundaryState,
    PatchRule,
    flat_lengths,
    lengths_from_starts,
    mean_patch_length,
    patch_starts,
    patch_starts_numpy,
    starts_by_entropy,
    starts_from_lengths,
    threshold_for_mean_length,
)


def walked(entropies, rule):
    """The rule as a person would say it, token by token."""
    starts, last_cut = [], 0
    for t, e in enumerate(entropies):
        if rule.mode == "token":
            cut = True
        elif rule.mode == "static":
            cut = t % rule.static_length == 0
        elif rule.mode in ("entropy_rows", "entropy"):
            row = rule.mode == "entropy_rows" and t % rule.row_width == 0
            cut = t in (0, 1) or row or bool(e > np.float32(rule.threshold))
        else:
            raise NotImplementedError(f"walk mode {rule.mode} here, as a person would say it")
        if cut:
            last_cut = t
        full = rule.max_patch_length is not None and (t - last_cut) % rule.max_patch_length == 0
        starts.append(cut or full)
    return np.array(starts)


def plan(values, rule):
    entropies = np.array([[0.0, *values]], np.float32)
    return lengths_from_starts(patch_starts_numpy(entropies, rule))[0].tolist()


RULES = st.builds(
    PatchRule,
    mode=st.sampled_from(get_args(PatchMode)),
    row_width=st.integers(1, 6),
    threshold=st.sampled_from([0.0, 0.5, 7.8]),
    max_patch_length=st.one_of(st.none(), st.integers(1, 6)),
    static_length=st.integers(1, 5),
)
VALUES = st.lists(st.sampled_from([0.0, 0.5, 0.50001, 1.0, 7.8, 7.81, 9.0]), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("values", "row_width", "mode", "longest", "expected"),
    [
        ([9, 1, 8, 1, 1, 8.5, 1, 1, 1, 1, 1, 1, 7.8, 7.81, 1], 4, "entropy_rows", 4, [1, 2, 1, 2, 2, 4, 2, 2]),
        ([9, 1, 8, 1, 1, 8.5, 1, 1, 1, 1, 1, 1, 7.8, 7.81, 1], 4, "entropy", 4, [1, 2, 3, 4, 4, 2]),
        ([9, 1, 8, 1, 1, 8.5, 1, 1, 1, 1, 1, 1, 7.8, 7.81, 1], 4, "entropy", None, [1, 2, 3, 8, 2]),
        ([0] * 15, 4, "entropy_rows", 4, [1, 3, 4, 4, 4]),
        ([0] * 15, 4, "entropy", 4, [1, 4, 4, 4, 3]),
        ([0] * 15, 4, "entropy_rows", 3, [1, 3, 3, 1, 3, 1, 3, 1]),
        ([0, 9, 0, 0, 0, 0, 9, 0], 3, "entropy_rows", 4, [1, 1, 1, 3, 1, 2]),
        ([0, 9, 0, 0, 0, 0, 9, 0], 3, "entropy", 4, [1, 1, 4, 1, 2]),
    ],
)
def test_worked_examples_come_out(values, row_width, mode, longest, expected):
    threshold = 5.0 if row_width == 3 else 7.8
    assert plan(values, PatchRule(mode, row_width, threshold, longest)) == expected


@given(VALUES, RULES)
def test_all_forms_of_the_rule_agree(values, rule):
    entropies = np.array([values, values[::-1]], np.float32)
    expected = np.stack([walked(row, rule) for row in entropies])
    assert np.array_equal(patch_starts(torch.from_numpy(entropies), rule).numpy(), expected)
    assert np.array_equal(patch_starts_numpy(entropies, rule, chunk=1), expected)
    state = BoundaryState(rule, 2)
    steps = [state.step(t, torch.from_numpy(entropies[:, t])).numpy() for t in range(entropies.shape[1])]
    assert np.array_equal(np.stack(steps, axis=1), expected)


@given(VALUES, RULES, st.integers(1, 40))
def test_future_entropies_never_move_a_boundary(values, rule, cut):
    entropies = np.array([values], np.float32)
    whole, prefix = patch_starts_numpy(entropies, rule), patch_starts_numpy(entropies[:, :cut], rule)
    assert np.array_equal(whole[:, :cut], prefix)


@given(RULES, st.integers(1, 40))
def test_the_longest_patch_is_that_of_an_image_without_entropies_above_the_threshold(rule, tokens):
    lengths = lengths_from_starts(patch_starts_numpy(np.zeros((1, tokens), np.float32), rule))[0]
    assert rule.longest(tokens) == lengths.max()


@given(VALUES, RULES)
def test_lengths_sum_to_the_tokens_and_come_back_as_starts(values, rule):
    starts = patch_starts_numpy(np.array([values] * 3, np.float32), rule)
    lengths = lengths_from_starts(starts)
    assert [int(one.sum()) for one in lengths] == [len(values)] * 3
    assert np.array_equal(starts_from_lengths(lengths, len(values)), starts)
    if rule.max_patch_length is not None:
        assert max(int(one.max()) for one in lengths) <= rule.max_patch_length


@given(VALUES, RULES)
def test_flat_lengths_are_those_counted_token_by_token(values, rule):
    starts = patch_starts_numpy(np.array([values, values[::-1], [0.0] * len(values)], np.float32), rule)
    expected = []
    for row in starts:
        lengths = []
        for begins in row:
            if begins:
                lengths.append(0)
            lengths[-1] += 1
        expected.append(lengths)
    flat, counts = flat_lengths(starts)
    assert flat.tolist() == [length for lengths in expected for length in lengths] and flat.dtype == np.uint16
    assert counts.tolist() == [len(lengths) for lengths in expected]
    assert [one.tolist() for one in lengths_from_starts(starts)] == expected


def test_starts_without_token_0_are_refused():
    with pytest.raises(ValueError, match="token 0 must begin a patch; in image 1 of 2"):
        flat_lengths(np.array([[True, False], [False, True]]))


def test_equality_with_the_threshold_begins_no_patch_in_float32():
    rule = PatchRule("entropy", 8, 7.8, None)
    at, above = np.float32(7.8), np.nextafter(np.float32(7.8), np.float32(9))
    assert patch_starts_numpy(np.array([[0, 0, at, above]], np.float32), rule)[0].tolist() == [True, True, False, True]


def test_the_measured_threshold_is_the_best_of_all_that_occur():
    entropies = np.random.default_rng(0).gamma(3.0, 1.0, (40, 16)).astype(np.float32)
    rule = PatchRule("entropy_rows", 4, 0.0, 4)
    for target in (1.3, 1.81, 2.2):
        found = threshold_for_mean_length(entropies, rule, target)
        gap = abs(mean_patch_length(entropies, PatchRule("entropy_rows", 4, found, 4)) - target)
        rules = [PatchRule("entropy_rows", 4, float(value), 4) for value in np.unique(entropies)]
        assert gap == min(abs(mean_patch_length(entropies, one) - target) for one in rules)
        assert np.float32(found) == found


def test_a_mean_that_no_threshold_reaches_is_refused():
    with pytest.raises(ValueError, match=r"no threshold gives 3\.9"):
        threshold_for_mean_length(np.ones((4, 16), np.float32), PatchRule("entropy_rows", 4, 0.0, 4), 3.9)


def test_entropies_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="must be float32"):
        patch_starts_numpy(np.zeros((1, 4), np.float16), PatchRule("token", 2))


@given(rule=RULES, values=VALUES)
def test_a_patch_began_by_its_entropy_where_without_it_there_is_none(rule, values):
    entropies = np.array([[0.0, *values]], np.float32)
    starts = patch_starts_numpy(entropies, rule)
    begun = []
    for t in range(len(entropies[0])):
        without = entropies[:, : t + 1].copy()
        without[0, t] = 0.0
        begun.append(starts[0, t] and not patch_starts_numpy(without, rule)[0, t])
    assert starts_by_entropy(starts, rule)[0].tolist() == begun
