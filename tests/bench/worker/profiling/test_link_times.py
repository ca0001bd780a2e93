"""Latency and bandwidth through a few messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.worker.profiling.link_times import ROUND_TRIPS, fit


@given(latency_s=st.floats(1e-6, 1e-2), bytes_per_s=st.floats(1e7, 1e11))
def test_a_straight_line_is_found_again(latency_s: float, bytes_per_s: float) -> None:
    found_s, found_bytes_per_s = fit({size: latency_s + size / bytes_per_s for size in ROUND_TRIPS})
    for size in ROUND_TRIPS:
        expected = latency_s + size / bytes_per_s
        assert found_s + size / found_bytes_per_s == pytest.approx(expected, rel=1e-3, abs=2e-9)


@given(st.lists(st.floats(1e-6, 1.0), min_size=3, max_size=3))
def test_whatever_was_measured_is_neither_negative_nor_infinite(times: list[float]) -> None:
    latency_s, bytes_per_s = fit(dict(zip(ROUND_TRIPS, times, strict=True)))
    assert latency_s >= 0
    assert 0 < bytes_per_s < float("inf")


def test_larger_messages_that_took_no_longer_say_only_how_wide_the_link_is_at_least() -> None:
    latency_s, bytes_per_s = fit([(1000, 2e-3), (10_000, 1e-3), (100_000, 1e-3)])
    assert latency_s > 0
    assert bytes_per_s >= 1e8
