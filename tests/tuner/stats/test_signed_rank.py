"""The exact test against scipy's and against all signs counted out, and the shift that belongs to it."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, wilcoxon

from pipetune.tuner.stats.signed_rank import above, below, hodges_lehmann, interval, least_p, noise_floor

DISTINCT = st.lists(st.integers(1, 10**6), min_size=1, max_size=20, unique=True)
TIED = st.lists(st.integers(-3, 3), min_size=1, max_size=9)


@given(DISTINCT, st.randoms())
def test_without_ties_it_is_scipys_exact_test(sizes: list[int], rng: random.Random) -> None:
    values = [size * rng.choice((-1, 1)) for size in sizes]
    assert above(values) == pytest.approx(wilcoxon(values, alternative="greater", method="exact").pvalue)


@given(TIED)
def test_with_ties_and_zeros_it_counts_all_signs_of_what_is_not_zero(values: list[int]) -> None:
    ranks = rankdata(np.abs(values))
    moving = [rank for rank, value in zip(ranks, values, strict=True) if value]
    reached = sum(rank for rank, value in zip(ranks, values, strict=True) if value > 0)
    sums = [sum(itertools.compress(moving, signs)) for signs in itertools.product((0, 1), repeat=len(moving))]
    assert above(values) == pytest.approx(sum(one >= reached - 1e-9 for one in sums) / len(sums))


@given(TIED, st.sampled_from((0.0, 1.0, -0.5)))
def test_below_is_above_seen_in_the_mirror(values: list[int], shift: float) -> None:
    assert below(values, shift) == above([-value for value in values], -shift)


def test_the_least_p_is_that_of_differences_all_on_one_side() -> None:
    assert above([0.01] * 8) == least_p(8) == 1 / 256
    assert above([0.0] * 8) == 1.0


def test_memory_that_never_differs_is_surely_below_a_margin() -> None:
    assert below([0.0] * 8, math.log(1.05)) == 1 / 256


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.floats(-1, 1))
def test_the_shift_moves_with_the_values(values: list[float], shift: float) -> None:
    moved = hodges_lehmann([value + shift for value in values])
    assert moved == pytest.approx(hodges_lehmann(values) + shift, abs=1e-9)


@given(st.lists(st.integers(-1000, 1000), min_size=6, max_size=16, unique=True))
def test_the_interval_holds_what_the_tests_do_not_exclude(thousandths: list[int]) -> None:
    values = [one / 1000 for one in thousandths]
    low, high = interval(values, 0.9)
    assert low <= hodges_lehmann(values) <= high
    inside, outside = (low + high) / 2, (low - 1e-6, high + 1e-6)
    assert above(values, inside) > 0.05
    assert below(values, inside) > 0.05
    assert above(values, outside[0]) <= 0.05 + 1e-12
    assert below(values, outside[1]) <= 0.05 + 1e-12


def test_too_few_values_give_the_whole_line() -> None:
    assert interval([0.1, 0.2, 0.3], 0.95) == (-math.inf, math.inf)


def test_the_noise_floor_is_what_the_shift_of_equal_sides_reaches() -> None:
    rng = np.random.default_rng(0)
    shifts = np.sort([abs(hodges_lehmann(rng.normal(0, 0.024, 24).tolist())) for _ in range(2000)])
    floors = [noise_floor(rng.normal(0, 0.024, 24).tolist(), 24) for _ in range(200)]
    # Two sides, each with one chance in a hundred.
    assert float(np.median(floors)) == pytest.approx(shifts[int(0.98 * len(shifts))], rel=0.15)
    assert noise_floor([0.0] * 8, 24) == 0.0
