"""The search for the highest rate that a plan sustains, on curves that are known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.load.rates import RateSearch, bracket, estimate, next_rate
from pipetune.bench.spec import Arrivals

WANTED = 0.9


def search(share_of: Callable[[float], float], guess: float, most: int) -> tuple[float | None, int]:
    """The estimate, and how many rates were tried until two within 3 % enclose it."""
    own = RateSearch(wanted=WANTED, guess=guess, most=most)
    own.run(share_of)
    return estimate(own.shares, WANTED), len(own.shares)


def curve(highest: float, steepness: float) -> Callable[[float], float]:
    """A share that falls from 1 to 0 about where it crosses what is wanted at `highest`."""
    shift = math.log(WANTED / (1 - WANTED)) / steepness

    def share(rate: float) -> float:
        return 1 / (1 + math.exp(steepness * (math.log(rate / highest) - shift)))

    return share


@pytest.mark.parametrize("steepness", [8.0, 20.0, 60.0])
@pytest.mark.parametrize("guess", [0.3, 0.9, 1.1, 3.0])
def test_it_is_found_from_far_and_near(guess: float, steepness: float) -> None:
    found, count = search(curve(50.0, steepness), 50.0 * guess, 20)
    assert found == pytest.approx(50.0, rel=0.03)
    assert count <= 12


def test_it_is_given_up_where_a_quarter_of_the_guess_is_not_sustained() -> None:
    own = RateSearch(wanted=WANTED, guess=8.0, most=20)
    own.run(lambda rate: 0.0)
    assert min(own.shares) == pytest.approx(8.0 / 4, rel=0.1)
    assert (len(own.shares), own.highest) == (4, 0.0)


def test_simulated_runs_go_as_far_as_it_takes() -> None:
    def highest(share_at: Callable[[float], float]) -> float:
        return RateSearch(wanted=WANTED, guess=1.0, tolerance=0.01, most=30, lowest=2**12).run(share_at)

    assert highest(lambda rate: float(rate <= 0.01)) == pytest.approx(0.01, rel=0.01)
    assert highest(lambda rate: float(rate <= 730.0)) == pytest.approx(730.0, rel=0.01)
    assert highest(lambda rate: 0.0) == 0.0
    assert 2**12 <= highest(lambda rate: 1.0) < 2**18


def test_noise_of_shares_moves_it_by_little() -> None:
    source, smooth = random.Random(0), curve(50.0, 20.0)
    off = []
    for _ in range(200):

        def noisy(rate: float) -> float:
            return sum(source.random() < smooth(rate) for _ in range(1000)) / 1000

        found, _ = search(noisy, 45.0, 8)
        off.append(abs((found or 0.0) / 50.0 - 1))
    assert sorted(off)[190] < 0.05


def test_what_was_sustained_ends_at_the_first_that_was_not() -> None:
    shares = {1.0: 1.0, 2.0: 0.5, 3.0: 0.95}
    assert bracket(shares, WANTED) == (1.0, 2.0)
    assert bracket({1.0: 1.0}, WANTED) == (1.0, None)
    assert bracket({}, WANTED) == (None, None)
    assert estimate({1.0: 1.0, 2.0: 0.95}, WANTED) is None


def test_nothing_is_asked_for_twice_in_a_row() -> None:
    shares: dict[float, float] = {}
    for share in (1.0, 1.0, 0.0, 1.0, 0.0):
        rate = next_rate(shares, WANTED, guess=7.0)
        assert rate not in shares
        shares[rate] = share


@given(truth=st.floats(0.5, 200.0), off=st.floats(0.5, 2.0), steepness=st.floats(3.0, 40.0))
def test_a_search_encloses_where_shares_fall_below_what_is_wanted(truth: float, off: float, steepness: float) -> None:
    own = RateSearch(wanted=WANTED, guess=truth * off, most=30)
    while (rate := own.next()) is not None:
        own.shares[rate] = min(1.0, max(0.0, 0.9 - steepness * (rate / truth - 1)))
    assert own.is_narrow
    assert own.highest == estimate(own.shares, WANTED) == pytest.approx(truth, rel=0.03)


def test_a_search_begins_at_the_arrivals_rate_or_near_what_a_plan_is_thought_to_sustain() -> None:
    asked = Arrivals(request_rate=60.0, slo_attainment=0.9, most_rates=7)
    for near, first in ((None, 60.0), (131.24, 131.2), (1e9, 960.0), (1.0, 16.0)):
        own = RateSearch.of(asked, near=near)
        assert (own.next(), own.wanted, own.most) == (first, 0.9, 7)
        # Where none is sustained, about a quarter of the arrivals' rate is the last, and none below it is tried.
        assert own.run(lambda _: 0.0) == 0.0
        assert [rate <= 60 / 3.75 for rate in own.shares] == [False] * (len(own.shares) - 1) + [True]
        assert min(own.shares) == 60 / 3.75
    highest = RateSearch.of(Arrivals(request_rate=8e5, slo_attainment=0.9))
    assert highest.run(lambda _: 1.0) == 8.8e5, "no run comes at a rate beyond those that can be asked for"


@given(truth=st.floats(0.05, 2000.0))
def test_a_simulated_search_finds_the_rate_however_far_it_is(truth: float) -> None:
    own = RateSearch.simulated(WANTED, guess=10.0, tolerance=0.03)
    found = own.run(lambda rate: min(1.0, max(0.0, 0.9 - 5 * (rate / truth - 1))))
    assert own.is_narrow
    assert found == pytest.approx(truth, rel=0.03)


def test_a_search_that_was_enclosed_by_nothing_tells_what_was_sustained() -> None:
    own = RateSearch(wanted=0.9, guess=4.0, most=2)
    tried = []
    while (rate := own.next()) is not None:
        tried.append(rate)
        own.shares[rate] = 1.0
    assert (tried, own.highest) == ([4.0, 4.4], 4.4)
    assert RateSearch(wanted=0.9, guess=4.0, most=2, shares={4.0: 0.5}).highest == 0.0
