"""Ratios with intervals: scipy's Welch, coverage, and single runs that have none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import gmean, ttest_ind

from pipetune.tuner.stats.ratios import Ratio, ratio_of, welch


def compared(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    return ratio_of(math.log(gmean(ours) / gmean(theirs)), *welch(ours, theirs))


RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def the_same_draws() -> None:
    """Of every test, whichever ran before."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def test_the_interval_is_welchs() -> None:
    ours, theirs = np.exp(RNG.normal(0.1, 0.02, 7)), np.exp(RNG.normal(0.0, 0.05, 5))
    found = compared(ours.tolist(), theirs.tolist())
    interval = ttest_ind(np.log(ours), np.log(theirs), equal_var=False).confidence_interval(0.95)
    assert found.low == pytest.approx(math.exp(interval.low))
    assert found.high == pytest.approx(math.exp(interval.high))


def test_it_covers_the_true_ratio_as_often_as_it_says() -> None:
    covered = 0
    for _ in range(1000):
        found = compared(np.exp(RNG.normal(0.3, 0.02, 4)).tolist(), np.exp(RNG.normal(0.0, 0.04, 6)).tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= math.exp(0.3) <= found.high
    assert covered == pytest.approx(950, abs=25)


def test_a_single_run_has_no_interval_and_tells_nothing() -> None:
    found = compared([110.0], [100.0, 101.0])
    assert found.value == pytest.approx(110 / math.sqrt(100 * 101))
    assert (found.low, found.high) == (None, None)


def test_what_repeats_exactly_differs_exactly() -> None:
    equal, unlike = compared([5.0, 5.0], [5.0, 5.0]), compared([6.0, 6.0], [5.0, 5.0])
    assert (equal.low, equal.value, equal.high) == (1.0, 1.0, 1.0)
    assert unlike.low == unlike.high == pytest.approx(1.2)
