"""Rates of sides that are measured in turns, and the setting that a side takes."""

from __future__ import annotations

import random

import pytest

from pipetune.bench.load.rates import STEP
from tests.evaluation.load.rates_of import best_setting, find_together


def falls(rate: float, truth: float) -> float:
    """A share that is 0.9 at the true rate."""
    return min(1.0, max(0.0, 0.9 - 5 * (rate / truth - 1)))


def test_sides_run_in_turns_until_each_has_its_rate() -> None:
    seen: list[str] = []
    truths = {"ours": 13.0, "theirs": 10.0}

    def share_at(name: str, rate: float) -> float:
        seen.append(name)
        return falls(rate, truths[name])

    found = find_together(
        {name: (lambda rate, name=name: share_at(name, rate)) for name in truths},  # type: ignore[misc]
        dict.fromkeys(truths, 11.0),
        order=random.Random(0),
        tolerance=0.03,
        most=10,
    )
    assert {name: search.highest for name, search in found.items()} == pytest.approx(truths, rel=0.03)
    least = 2 * min(len(search.shares) for search in found.values())
    assert all(set(seen[place : place + 2]) == set(truths) for place in range(0, least, 2))


def test_a_setting_that_loses_at_the_best_rate_costs_one_run() -> None:
    truths = {"a": 8.0, "b": 4.0, "c": 12.0}
    runs: list[str] = []

    def share(setting: str, rate: float) -> float:
        runs.append(setting)
        return falls(rate, truths[setting])

    best, rate, seen = best_setting(list(truths), share, guess=6.0, tolerance=0.05, most=10)
    assert best == "c"
    assert rate == pytest.approx(12.0, rel=0.05)
    assert runs.count("b") == 1
    assert dict(seen)["b"] is None


def test_without_a_rate_that_was_sustained_the_search_goes_on_from_the_lowest() -> None:
    best, rate, seen = best_setting(["a", "b"], lambda _setting, _rate: 0.0, guess=8.0, tolerance=0.05, most=2)
    assert best == "a"
    assert rate == pytest.approx(8.0 / STEP, rel=1e-3)
    assert dict(seen) == {"a": 0.0, "b": 0.0}
