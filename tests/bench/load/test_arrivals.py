"""Arrival processes: gaps of the given shape, the same for all rates, and what is no process refused."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.load.arrivals import arrival_times_s, unit_trace
from pipetune.bench.spec import Arrivals


@given(st.integers(1, 200), st.floats(0.05, 50), st.floats(0.01, 1000), st.integers(0, 9))
def test_the_last_of_n_requests_arrives_at_n_over_the_rate(n: int, burstiness: float, rate: float, seed: int) -> None:
    times = arrival_times_s(Arrivals(request_rate=rate, burstiness=burstiness, seed=seed), n)
    assert len(times) == n
    assert times[-1] == pytest.approx(n / rate)
    assert all(0.0 < a <= b for a, b in itertools.pairwise(times))


def test_all_rates_share_the_gaps_of_one_seed() -> None:
    slow, fast = (arrival_times_s(Arrivals(request_rate=rate, seed=4), 50) for rate in (2.0, 8.0))
    assert slow == pytest.approx([4 * at for at in fast])
    assert arrival_times_s(Arrivals(request_rate=2.0, seed=5), 50) != slow


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_vary_as_much_as_the_shape_says(burstiness: float) -> None:
    times = unit_trace(20_000, burstiness, 0)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1.0, rel=0.02)
    assert statistics.stdev(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_large_shape_is_a_constant_rate() -> None:
    even = arrival_times_s(Arrivals(request_rate=4.0, burstiness=1e9), 8)
    assert even == pytest.approx([0.25 * (index + 1) for index in range(8)], rel=1e-3)


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_goes_from_one_rate_to_another(strategy: Any) -> None:
    ramp = Arrivals(ramp_up_strategy=strategy, ramp_up_start_rps=2.0, ramp_up_end_rps=50.0, burstiness=1e9)
    gaps = [b - a for a, b in itertools.pairwise((0.0, *arrival_times_s(ramp, 100)))]
    assert gaps[0] == pytest.approx(1 / 2, rel=1e-3)
    assert gaps[-1] == pytest.approx(1 / 50, rel=0.05)
    assert all(a >= b for a, b in itertools.pairwise(gaps))
    middle = {"linear": 26.0, "exponential": 10.0}
    assert 1 / gaps[50] == pytest.approx(middle[strategy], rel=1e-3)


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        ({"request_rate": 0}, "request_rate"),
        ({"request_rate": -1}, "request_rate"),
        ({"request_rate": float("nan")}, "request_rate"),
        ({"request_rate": float("inf")}, "request_rate"),
        ({"request_rate": 1, "burstiness": 0}, "burstiness"),
        ({"request_rate": 1, "trace": "x.jsonl"}, "request_rate: trace says when requests come as well"),
        ({"burstiness": 2}, "nothing says when requests come; give a rate, a trace or a ramp"),
        ({"trace": "x.jsonl", "time_scale": 0}, "time_scale"),
        ({"request_rate": 1, "max_concurrency": 0}, "max_concurrency"),
        ({"ramp_up_start_rps": 1}, "give ramp_up_strategy as well"),
        ({"ramp_up_strategy": "linear", "ramp_up_start_rps": 1}, "give ramp_up_start_rps and ramp_up_end_rps"),
        (
            {"ramp_up_strategy": "linear", "ramp_up_start_rps": 1, "ramp_up_end_rps": 2, "request_rate": 3},
            "request_rate: ramp_up_strategy says when requests come as well",
        ),
    ],
)
def test_what_is_no_process_is_refused_by_name(given_: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Arrivals.model_validate(given_)
