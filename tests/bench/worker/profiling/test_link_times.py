"""Latency and bandwidth through a few messages, in the time there is, and between real workers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.spec import ModelSpec
from pipetune.bench.worker.profiling.link_times import PAIR_S, ROUND_TRIPS, fit, time_sizes
from tests.hooks import break_workers
from tests.tiny_models import save_tiny_model


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


class Wire:
    """A link by the fake clock: round trips last what latency and bandwidth make of their bytes."""

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.counts: dict[int, int] = {}
        self.spent_s = 0.0

    def round_trips(self, size: int, count: int) -> list[float]:
        times = [2 * (self.latency_s + size / self.bytes_per_s)] * count
        self.counts[size] = self.counts.get(size, 0) + count
        self.spent_s += sum(times)
        return times


@given(latency_s=st.floats(1e-6, 0.3), bytes_per_s=st.floats(1.25e5, 1e11))
@example(latency_s=1e-3, bytes_per_s=1.25e5)
@example(latency_s=0.3, bytes_per_s=1e9)
def test_a_pair_takes_no_longer_than_it_may_and_its_line_is_found(latency_s: float, bytes_per_s: float) -> None:
    wire = Wire(latency_s, bytes_per_s)
    found = time_sizes(wire.round_trips)
    assert wire.spent_s <= PAIR_S
    assert len(found) > 1, "one size tells no bandwidth"
    found_s, found_bytes_per_s = fit(found)
    for size in found:
        expected = latency_s + size / bytes_per_s
        assert found_s + size / found_bytes_per_s == pytest.approx(expected, rel=1e-3, abs=2e-9)


def test_a_quick_link_is_timed_in_full() -> None:
    wire = Wire(1e-4, 1e9)
    assert list(time_sizes(wire.round_trips)) == list(ROUND_TRIPS)
    assert all(wire.counts[size] > count for size, count in ROUND_TRIPS.items()), "and warmed up"


def test_on_the_slowest_one_something_is_known_soon() -> None:
    wire = Wire(0.5, 1e3)
    assert list(time_sizes(wire.round_trips)) == [4096]
    assert sum(wire.counts.values()) <= 4


@pytest.mark.slow
def test_of_two_hosts_one_pair_speaks_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "module.device_host = lambda device: 'a' if device == 'cpu:0' else 'b'"
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.worker.profiling.link_times", body=body)
    devices = ("cpu:0", "cpu:1", "cpu:2")
    folder = save_tiny_model(tmp_path / "llama", "llama")
    with Fleet.start(ModelSpec(name=str(folder)), devices) as fleet:
        links = {(link.source, link.target): link for link in fleet.time_links()}
    assert set(links) == set(itertools.permutations(devices, 2))
    assert all(1e6 < link.bytes_per_s < 1e12 and link.latency_s < 1 for link in links.values())
    between, other, within = (
        (link.latency_s, link.bytes_per_s)
        for link in (links["cpu:0", "cpu:1"], links["cpu:2", "cpu:0"], links["cpu:1", "cpu:2"])
    )
    assert between == other != within
