"""A new session beside stored ones: error rates by simulation, and nothing known of one session alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.stats.sessions import predict

LOTS = np.random.default_rng(0)


def nights(count: int, *, sd: float = 0.03, shift: float = 0.0, runs: int = 6) -> list[list[float]]:
    levels = LOTS.normal(shift, sd, count)
    return [LOTS.normal(level, 0.01, runs).tolist() for level in levels]


def test_equal_nights_are_told_apart_no_more_often_than_promised() -> None:
    alarms = [predict(nights(5), nights(1)[0], assumed_sd=0.05).above() <= 0.01 for _ in range(4000)]
    assert np.mean(alarms) == pytest.approx(0.01, abs=0.006)


def test_power_is_what_a_simulation_finds() -> None:
    found = [predict(nights(8), nights(1, shift=0.12)[0], assumed_sd=0.05) for _ in range(3000)]
    share = np.mean([one.above() <= 0.05 for one in found])
    level_sd = math.sqrt(0.03**2 + (math.pi / 2) * 0.01**2 / 6)
    scaled = predict([[x] for x in _with_sd(8, level_sd)], [0.0], assumed_sd=0.05)
    assert share == pytest.approx(scaled.power(0.12, 0.05), abs=0.04)


def _with_sd(count: int, sd: float) -> list[float]:
    raw = np.linspace(-1, 1, count)
    return (raw / raw.std(ddof=1) * sd).tolist()


@given(st.floats(-1, 1), st.integers(1, 2))
def test_of_too_few_sessions_the_spread_is_assumed(shift: float, count: int) -> None:
    found = predict([[0.0, 0.001]] * count, [shift], assumed_sd=0.05)
    assert found.is_assumed
    assert found.error == pytest.approx(0.05 * math.sqrt(1 + 1 / count))


def test_sessions_that_repeat_to_the_byte_are_told_apart_exactly() -> None:
    same = predict([[1.0]] * 3, [1.0], assumed_sd=0.05)
    assert same.above() == 1.0
    assert same.below(0.01) == 0.0
    assert predict([[1.0]] * 3, [1.001], assumed_sd=0.05).above() == 0.0


@given(st.lists(st.integers(-100, 100), min_size=3, max_size=8, unique=True), st.integers(-100, 100))
def test_the_interval_holds_what_the_tests_do_not_exclude(levels: list[int], new: int) -> None:
    found = predict([[level / 100] for level in levels], [new / 100], assumed_sd=0.05)
    low, high = found.interval(0.9)
    assert found.above(low) == pytest.approx(0.05)
    assert found.below(high) == pytest.approx(0.05)
