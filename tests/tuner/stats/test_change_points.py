"""Changes of level are found where they are, and none where there is none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipetune.tuner.stats.change_points import LEAST_NIGHTS, change_points, dependence


def nights(*levels: float, each: int = 12, sd: float = 0.02, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return [float(level * np.exp(rng.normal(0, sd))) for level in levels for _ in range(each)]


def test_a_level_that_falls_and_comes_back_gives_two_changes() -> None:
    found = change_points(nights(100.0, 90.0, 100.0))
    assert [abs(point.index - place) <= 1 for point, place in zip(found, (12, 24), strict=True)] == [True, True]
    assert found[0].before == pytest.approx(100, rel=0.03)
    assert found[0].after == pytest.approx(90, rel=0.03)
    assert found[1].after == pytest.approx(100, rel=0.03)


def test_quiet_series_rarely_show_a_change() -> None:
    alarms = sum(bool(change_points(nights(100.0, each=30, seed=seed))) for seed in range(200))
    assert alarms <= 5


def test_one_stray_night_is_no_change() -> None:
    values = nights(100.0, each=20)
    values[10] = 30.0
    assert change_points(values) == ()


def test_series_that_are_too_short_say_nothing() -> None:
    assert change_points([1.0, 2.0, 3.0, 4.0, 5.0]) == ()
    assert change_points([]) == ()
    assert change_points([7.0] * 30) == ()


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=40))
def test_levels_last_for_some_nights_and_come_in_order(values: list[int]) -> None:
    places = [0, *(point.index for point in change_points(values)), len(values)]
    assert all(end - first >= LEAST_NIGHTS for first, end in itertools.pairwise(places) if len(places) > 2)


def test_a_new_level_is_seen_within_five_nights() -> None:
    values = [*nights(100.0, each=30), *nights(90.0, each=5, seed=1)]
    (found,) = change_points(values, alpha=0.002)
    assert found.index == 30


def test_counts_and_bytes_that_jump_are_found_and_strays_are_not() -> None:
    (found,) = change_points([1000.0] * 20 + [1010.0] * 8)
    assert (found.index, found.before, found.after) == (20, 1000.0, 1010.0)
    assert change_points([1000.0, 1000.0, 1000.0, 1010.0] * 6) == ()


def test_levels_of_zero_and_below_are_levels() -> None:
    (found,) = change_points([0.0, 0.001, -0.001] * 8 + [-0.2, -0.21, -0.19] * 4)
    assert found.index == 24


def test_nights_that_hang_together_are_told_of() -> None:
    rng = np.random.default_rng(0)
    value, values = 0.0, []
    for _ in range(120):
        value = 0.7 * value + rng.normal()
        values.append(value)
    assert dependence(values, ()) == pytest.approx(0.7, abs=0.15)
    assert dependence(rng.normal(size=120).tolist(), ()) is None
    assert dependence(values[:9], ()) is None
