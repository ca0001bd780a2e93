"""The finals' statistics: levels as published, verdicts, leavers, and what luck may do."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from pipetune.tuner.ranking.elimination import Cells, Fit, decide, nominal_level
from pipetune.tuner.stats.signed_rank import hodges_lehmann
from tests.evaluation.search.finals_power import power

NOISE = (
    (0.004, -0.009, 0.006, 0.001, -0.004, 0.008, -0.002, 0.005),
    (-0.007, 0.003, 0.0, -0.005, 0.009, 0.002, 0.004, -0.006),
)


def cells(*gaps: float, rounds: int = 8, noise: float = 1.0) -> dict[str, dict[int, float | None]]:
    """Plans a, b, c … with those log costs, in rounds of changing drift."""
    return {
        "abcdef"[plan]: {
            at: gap + 0.1 * math.sin(at) + noise * NOISE[plan % 2][(at + 3 * (plan // 2)) % 8] for at in range(rounds)
        }
        for plan, gap in enumerate(gaps)
    }


def settle(table: Cells, *, min_rounds: int = 3, max_rounds: int = 8) -> tuple[str, list[str], dict[str, int]]:
    """Gives an elimination its figures as it asks for them: the verdict, those left, and how often each ran."""
    given: dict[str, dict[int, float | None]] = {name: {} for name in table}
    while (state := decide(given, min_rounds=min_rounds, max_rounds=max_rounds)).kind == "open":
        given[state.due[0]][state.rounds] = table[state.due[0]][state.rounds]
    return state.kind, list(state.active), {name: len(row) for name, row in given.items()}


@pytest.mark.parametrize(("looks", "bound"), [(1, 1.960), (2, 2.178), (5, 2.413), (10, 2.555)])
def test_the_boundary_is_pocock_s(looks: int, bound: float) -> None:
    assert -ndtri(nominal_level(1, looks, 0.05)) == pytest.approx(bound, abs=2e-3)


def test_a_clear_difference_ends_at_once_and_a_small_one_is_a_tie() -> None:
    assert settle(cells(0.0, 0.08)) == ("separated", ["a"], {"a": 3, "b": 3})
    kind, active, runs = settle(cells(0.0, 0.004, noise=3.0))
    assert (kind, set(active), runs) == ("tie", {"a", "b"}, {"a": 8, "b": 8})


def test_a_difference_surely_below_the_margin_needs_no_further_rounds() -> None:
    kind, active, runs = settle(cells(0.0, 0.002, noise=0.3))
    assert (kind, set(active)) == ("tie", {"a", "b"})
    assert runs["a"] < 8


def test_who_falls_behind_leaves_and_the_others_go_on() -> None:
    kind, active, runs = settle(cells(0.0, 0.012, 0.2))
    assert active[0] == "a"
    assert runs["c"] == 3 < runs["b"]
    assert kind in ("separated", "tie")


def test_equal_figures_are_a_tie_and_exact_differences_are_told_apart() -> None:
    same: Cells = {"a": dict.fromkeys(range(8), 1.0), "b": dict.fromkeys(range(8), 1.0)}
    assert settle(same)[0] == "tie"
    other: Cells = {"a": dict.fromkeys(range(8), 1.0), "b": dict.fromkeys(range(8), 1.05)}
    assert settle(other) == ("separated", ["a"], {"a": 3, "b": 3})


def test_a_plan_that_failed_twice_leaves_and_once_is_forgiven() -> None:
    table = cells(0.0, 0.08)
    table["b"][1] = None
    assert settle(table)[0] == "separated"
    table["b"][0] = None
    kind, active, runs = settle(table)
    assert (kind, active, runs["b"]) == ("alone", ["a"], 2)
    assert settle({"a": dict.fromkeys(range(8))})[0] == "none"


def test_a_control_runs_in_every_round_and_competes_with_nobody() -> None:
    table = cells(0.0, 0.08)
    state = decide({**table, "base": {0: -9.0, 1: -9.0}}, min_rounds=3, max_rounds=8, controls=("base",))
    assert (state.kind, state.rounds, state.due) == ("open", 2, ("base",))
    done = decide({**table, "base": dict.fromkeys(range(3), -9.0)}, min_rounds=3, max_rounds=8, controls=("base",))
    assert (done.kind, done.active) == ("separated", ("a",))


def test_fewer_than_three_rounds_tell_nothing_apart() -> None:
    assert settle(cells(0.0, 0.5), min_rounds=1, max_rounds=2)[0] == "tie"
    assert settle(cells(0.0), min_rounds=2)[0] == "alone"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 0.1), min_size=1, max_size=5), st.permutations(range(5)), st.integers(1, 5))
def test_names_and_their_order_decide_nothing(gaps: list[float], shuffle: list[int], min_rounds: int) -> None:
    table = cells(*gaps)
    order = (
        [name for at in shuffle for name in [list(table)[at]] if at < len(table)]
        if len(table) == 5
        else list(table)[::-1]
    )
    one = settle(table, min_rounds=min_rounds)
    other = settle({name: table[name] for name in order}, min_rounds=min_rounds)
    assert (one[0], set(one[1]), one[2]) == (other[0], set(other[1]), other[2])


def test_one_astray_round_of_many_does_not_turn_the_order() -> None:
    table = cells(0.0, 0.03)
    table["a"][2] = 0.7
    assert Fit(table).ordered(["b", "a"]) == ["a", "b"]
    assert hodges_lehmann([1.0, 2.0, 3.0, 100.0]) < 4


def test_differences_are_those_of_the_levels_and_told_apart_where_the_interval_leaves_one_out() -> None:
    table = cells(0.0, 0.02, 0.2)
    table["c"] = {at: table["c"][at] for at in range(3)}
    state = decide(table, min_rounds=3, max_rounds=8)
    for one, other in itertools.permutations(table, 2):
        ratio, gap = state.ratio(one, other), state.fit.gap(other, one, state.pool)
        assert ratio is not None
        assert gap is not None
        assert ratio.value == pytest.approx(math.exp(state.fit.levels[other] - state.fit.levels[one]))
        assert gap.is_behind(state.level) == (ratio.is_told and ratio.value > 1)
    few = decide(cells(0.0, 0.5, rounds=2), min_rounds=1, max_rounds=2).ratio("a", "b")
    assert few is not None
    assert (few.low, few.rounds) == (None, 2)


def test_the_error_of_a_difference_is_that_of_least_squares() -> None:
    """Of two plans alone, rounds that one of them missed say nothing of their difference."""
    table = cells(0.0, 0.02)
    table["b"] = {at: table["b"][at] for at in range(3)}
    fit = Fit(table)
    gap = fit.gap("b", "a")
    assert gap is not None
    assert gap.error == pytest.approx(fit.sd * math.sqrt(2 / 3))
    assert (gap.rounds, gap.freedom) == (3, 2)


def test_a_control_moves_levels_and_lends_no_noise() -> None:
    table = cells(0.0, 0.02)
    alone = decide(table, min_rounds=3, max_rounds=8)
    table["base"] = {at: 9.0 + at % 2 for at in range(8)}
    beside = decide(table, min_rounds=3, max_rounds=8, controls=["base"])
    assert alone.pool.sd == beside.pool.sd < beside.fit.sd
    assert "base" in beside.fit.levels


@pytest.mark.slow
def test_equal_plans_are_seldom_told_apart_and_different_ones_mostly() -> None:
    equal, apart = power(0.0, 0.02, finals=120), power(0.05, 0.02, finals=120)
    assert equal.wrong <= 0.10
    assert (apart.wrong, apart.wrong_leader) == (0.0, 0.0)
    assert apart.tie <= 0.15
    assert apart.runs < equal.runs
