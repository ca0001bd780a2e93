"""The formulas of promise: by their definitions, and at their edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.search.policy.acquisition import (
    chance_kept,
    chance_of_gain,
    draw_weights,
    expected_improvement,
    log_cost,
    ranges,
    tchebycheff,
)

costs = st.floats(-5, 5)
deviations = st.floats(0.01, 2)


@given(mean=costs, sd=deviations, best=costs)
def test_expected_improvement_is_the_mean_of_what_is_gained(mean: float, sd: float, best: float) -> None:
    quantiles = np.random.default_rng(0).standard_normal(40_000)
    gained = np.maximum(best - (mean + sd * quantiles), 0).mean()
    found = expected_improvement(np.array([mean]), np.array([sd]), best)[0]
    assert found == pytest.approx(gained, abs=0.03 * sd)


@given(mean=costs, best=costs, gain=st.floats(0.001, 1))
def test_what_is_sure_gains_what_it_gains(mean: float, best: float, gain: float) -> None:
    sure = np.array([0.0])
    assert expected_improvement(np.array([best - gain]), sure, best)[0] == pytest.approx(gain)
    assert expected_improvement(np.array([best + gain]), sure, best)[0] == pytest.approx(0)
    assert chance_of_gain(np.array([best - gain]), sure, best, gain / 2)[0] == pytest.approx(1)
    assert chance_of_gain(np.array([best - gain]), sure, best, gain * 2)[0] == pytest.approx(0)


@given(value=st.floats(1, 1000), sd=deviations)
def test_a_limit_is_kept_as_likely_as_its_metric_lies_there(value: float, sd: float) -> None:
    upper, lower = (Constraint.model_validate(f"mean_ttft_ms{operator}100") for operator in ("<=", ">="))
    mean, sds = np.array([value]), np.array([sd])
    kept = chance_kept(upper, mean, sds)[0]
    assert kept + chance_kept(lower, mean, sds)[0] == pytest.approx(1)
    assert (kept > 0.5) == (value < 100) or value == pytest.approx(100)
    none = Constraint.model_validate("bubble_ratio<=0")
    assert chance_kept(none, mean, sds)[0] == 0
    assert chance_kept(none, np.array([0.0]), sds)[0] == 1


def test_costs_are_logs_that_fall_as_things_get_better() -> None:
    values = np.array([1.0, 2.0])
    assert np.diff(log_cost("output_throughput", values))[0] == pytest.approx(-np.log(2))
    assert np.diff(log_cost("mean_ttft_ms", values))[0] == pytest.approx(np.log(2))
    assert np.isfinite(log_cost("bubble_ratio", np.array([0.0]))).all()


@given(seed=st.integers(0, 99), count=st.integers(2, 4))
def test_weights_are_shares_and_the_same_for_a_seed(seed: int, count: int) -> None:
    weights = draw_weights(count, f"{seed}-0")
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert (weights == draw_weights(count, f"{seed}-0")).all()
    assert (weights != draw_weights(count, f"{seed}-1")).any()


@given(rows=st.lists(st.tuples(costs, costs), min_size=2, max_size=8), seed=st.integers(0, 9))
def test_no_weights_prefer_a_plan_that_another_dominates(rows: list[tuple[float, float]], seed: int) -> None:
    found = np.array(rows)
    least, spans = ranges(found)
    scaled = (found - least) / spans
    mean, sd = tchebycheff(scaled, np.full_like(scaled, 0.1), draw_weights(2, str(seed)))
    best = int(mean.argmin())
    dominating = (found <= found[best] - 1e-6).all(axis=1)
    assert not dominating.any()
    assert (sd > 0).all()
    assert (sd <= 0.1 * 1.1).all()
