"""Shares, limits, searches and intervals."""

from __future__ import annotations

import pytest

from tests.evaluation.load.estimates import Limits, Served, interval, limits_of, round_up


def served(at_s: float, ttft_s: float, tpot_s: float, tokens: int = 3) -> Served:
    """A request whose tokens come at an even pace."""
    return Served(at_s=at_s, times_s=tuple(at_s + ttft_s + tpot_s * index for index in range(tokens)))


def test_latencies_count_from_the_scheduled_arrival() -> None:
    one = served(2.0, 0.5, 0.25)
    assert (one.ttft_s, one.tpot_s) == (0.5, 0.25)
    assert served(2.0, 0.5, 0.25, tokens=1).tpot_s == 0.0


def test_a_good_request_keeps_both_limits() -> None:
    requests = [served(0.0, 0.1, 0.01), served(0.0, 0.2, 0.01), served(0.0, 0.1, 0.02), served(0.0, 0.2, 0.02)]
    assert Limits(ttft=150.0, tpot=15.0).share(requests) == 0.25
    assert Limits(ttft=150.0, tpot=25.0).share(requests) == 0.5
    assert Limits(ttft=250.0, tpot=25.0).share(requests) == 1.0


def test_limits_come_from_the_slowest_side() -> None:
    quick, slow = [served(0.0, 0.010, 0.004)] * 3, [served(0.0, 0.020, 0.003)] * 3
    assert limits_of([quick, slow], ttft_factor=5.0, tpot_factor=3.0) == Limits(ttft=100.0, tpot=12.0)


@pytest.mark.parametrize(("value", "rounded"), [(101.0, 110.0), (100.0, 100.0), (0.0342, 0.035), (7.31, 7.4)])
def test_limits_are_rounded_up_to_two_digits(value: float, rounded: float) -> None:
    assert round_up(value) == pytest.approx(rounded)


def test_an_interval_holds_the_statistic_and_needs_three_values() -> None:
    low, high = interval([1.0, 1.1, 1.2, 1.3, 1.4])
    assert low is not None
    assert high is not None
    assert 1.0 <= low <= 1.2 <= high <= 1.4
    assert interval([1.0, 2.0]) == (None, None)
