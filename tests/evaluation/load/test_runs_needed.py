"""Simulated searches for the highest rate."""

from __future__ import annotations

import random

import pytest

from tests.evaluation.load.runs_needed import MOST, Curve, repeat, rows_of

RATES = tuple(10.0 * 1.05**index for index in range(-15, 16))
CURVE = Curve(rates=RATES, shares=tuple(min(1.0, max(0.0, 0.9 - 4 * (rate / 10.0 - 1))) for rate in RATES))


def test_a_curve_is_a_straight_line_between_its_points_and_level_beyond() -> None:
    curve = Curve(rates=(1.0, 4.0), shares=(1.0, 0.5))
    assert curve.at(2.0) == pytest.approx(0.75)
    assert (curve.at(0.1), curve.at(9.0)) == (1.0, 0.5)
    assert curve.crossing(0.75) == pytest.approx(2.0)
    assert curve.crossing(0.4) == 4.0


def test_on_a_machine_that_stands_still_a_search_ends_at_the_crossing() -> None:
    done = [
        repeat(CURVE, 10.0 * source.lognormvariate(0, 0.05), source, speed_sd=0.0)
        for source in map(random.Random, range(50))
    ]
    assert all(one.is_narrow and one.runs < MOST for one in done)
    assert all(one.error is not None and one.error <= 0.03 for one in done)


def test_rows_tell_how_many_runs_and_how_far_off() -> None:
    done = [repeat(CURVE, 11.0, random.Random(seed), speed_sd=0.02) for seed in range(20)]
    rows = rows_of(done, "somewhere")
    assert {row.n for row in rows} == {20}
    assert rows[0].value == pytest.approx(sum(one.runs for one in done) / 20)
    assert all(row.aim is not None and not row.at_least for row in rows)
