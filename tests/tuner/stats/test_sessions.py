"""A new session beside stored ones: error rates by simulation, and nothing known of one session alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipetune.tuner.stats.sessions import NewLevel

REPETITIONS = 800


def simulated(
    count: int, old_runs: int, new_runs: int, *, nights_sd: float, runs_sd: float, told: float | None = None
) -> list[NewLevel]:
    """Predictions of a session that differs from the stored ones by its night alone."""
    rng = np.random.default_rng(count * 100 + old_runs)
    found = []
    for _ in range(REPETITIONS):
        levels = rng.normal(0.0, nights_sd, count + 1)
        stored = [rng.normal(level, runs_sd, old_runs).tolist() for level in levels[:-1]]
        found.append(NewLevel(stored, rng.normal(levels[-1], runs_sd, new_runs).tolist(), told_spread=told))
    return found


@pytest.mark.parametrize(("nights_sd", "runs_sd"), [(0.01, 0.015), (0.0, 0.015)])
@pytest.mark.parametrize(("old_runs", "new_runs"), [(6, 5), (30, 5), (8, 1)])
@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_error_rates_hold_for_any_number_of_sessions_and_runs(
    count: int, old_runs: int, new_runs: int, nights_sd: float, runs_sd: float
) -> None:
    found = simulated(count, old_runs, new_runs, nights_sd=nights_sd, runs_sd=runs_sd)
    # Three standard errors of the simulation above what is promised.
    assert np.mean([one.above() <= 0.01 for one in found]) <= 0.021
    assert np.mean([one.above() >= 0.95 for one in found]) <= 0.073, "OK at a true shift of the margin"


def test_equal_numbers_of_runs_give_the_textbook_interval() -> None:
    found = simulated(5, 6, 6, nights_sd=0.03, runs_sd=1e-4)
    assert np.mean([one.above() <= 0.05 for one in found]) == pytest.approx(0.05, abs=0.023)


def test_of_one_session_a_spread_that_is_told_rightly_gives_the_rates_promised() -> None:
    told = simulated(1, 6, 5, nights_sd=0.03, runs_sd=0.002, told=0.03)
    assert np.mean([one.above() <= 0.01 for one in told]) <= 0.021
    assert np.mean([one.above() >= 0.95 for one in told]) <= 0.073
    assert all(one.spread == 0.03 and math.isinf(one.freedom) for one in told)


@given(st.floats(-3, 3), st.integers(1, 8))
def test_one_session_tells_nothing_by_itself(shift: float, runs: int) -> None:
    found = NewLevel([[0.0, 0.001, 0.003]], [shift] * runs, told_spread=None)
    assert found.spread is None
    assert found.interval(0.95) is None
    assert (found.above(), found.below(1e9)) == (1.0, 1.0)


def test_what_is_told_is_no_less_than_what_the_runs_show() -> None:
    told = NewLevel([[-0.1, 0.0, 0.1]], [-0.1, 0.0, 0.1], told_spread=0.001)
    alone = NewLevel([[-0.1, 0.0, 0.1]], [-0.1, 0.0, 0.1], told_spread=None)
    assert told.error == alone.error > 0.05


def test_a_candidate_that_scatters_is_not_told_apart_as_if_it_did_not() -> None:
    quiet = [[0.0, 0.001, 0.002], [0.004, 0.005, 0.006], [0.001, 0.002, 0.003]]
    steady = NewLevel(quiet, [0.03, 0.031, 0.032, 0.033, 0.034], told_spread=None)
    astray = NewLevel(quiet, [-0.3, -0.1, 0.032, 0.2, 0.4], told_spread=None)
    assert steady.difference == pytest.approx(astray.difference)
    assert steady.above() < 0.01 < astray.above()


@pytest.mark.parametrize("shift", [0.03, 0.08])
def test_power_is_what_a_simulation_finds(shift: float) -> None:
    rng = np.random.default_rng(3)
    found = [
        NewLevel(rng.normal(0, 0.03, (8, 1)).tolist(), [rng.normal(shift, 0.03)], told_spread=None) for _ in range(4000)
    ]
    share = np.mean([one.above() <= 0.05 for one in found])
    right = NewLevel([[x] for x in _with_sd(8, 0.03)], [0.0], told_spread=None)
    assert share == pytest.approx(right.power(shift, 0.05), abs=0.025)


def _with_sd(count: int, sd: float) -> list[float]:
    raw = np.linspace(-1, 1, count)
    return [float(one) for one in raw / raw.std(ddof=1) * sd]


def test_sessions_that_repeat_to_the_byte_are_told_apart_exactly() -> None:
    same = NewLevel([[1.0, 1.0]] * 3, [1.0] * 3, told_spread=None)
    assert same.above() == 1.0
    assert same.below(0.01) == 0.0
    assert NewLevel([[1.0, 1.0]] * 3, [1.001] * 3, told_spread=None).above() == 0.0


@given(st.lists(st.integers(-100, 100), min_size=2, max_size=8, unique=True), st.integers(-100, 100))
def test_the_interval_holds_what_the_tests_do_not_exclude(levels: list[int], new: int) -> None:
    found = NewLevel([[level / 100] for level in levels], [new / 100], told_spread=None)
    interval = found.interval(0.9)
    assert interval is not None
    assert found.above(interval[0]) == pytest.approx(0.05)
    assert found.below(interval[1]) == pytest.approx(0.05)


@given(
    st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=6), min_size=1, max_size=5),
    st.lists(st.floats(-1, 1), min_size=1, max_size=6),
    st.sampled_from([None, 0.02]),
)
@example([[0.0], [1.42e-160]], [0.0], None)
def test_any_runs_give_probabilities_and_moving_all_changes_nothing(
    stored: list[list[float]], new: list[float], told: float | None
) -> None:
    found = NewLevel(stored, new, told_spread=told)
    moved = NewLevel([[one + 1 for one in runs] for runs in stored], [one + 1 for one in new], told_spread=told)
    assert found.error >= 0
    assert found.error == pytest.approx(moved.error, abs=1e-6)
    assert found.difference == pytest.approx(moved.difference, abs=1e-9)
    assert all(0 <= p <= 1 for p in (found.above(), found.below(0.05), found.power(0.05, 0.01)))
