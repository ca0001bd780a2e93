"""Stamps become spans and waits; without instrumentation only the times of tokens are kept."""

from __future__ import annotations

import itertools

import pytest

from pipetune.bench.runtime.device import Stamp
from pipetune.bench.runtime.timeline import ResolvedTimeline, Timeline


class CountingClock:
    """A clock whose every stamp is a second later."""

    def __init__(self) -> None:
        self._seconds = itertools.count()

    def stamp(self) -> Stamp:
        """The next second."""
        return float(next(self._seconds))

    def resolve(self, stamps: list[Stamp]) -> list[float]:
        """The seconds themselves."""
        return stamps


def two_tasks(timeline: Timeline) -> ResolvedTimeline:
    for _ in range(2):
        timeline.receive_begins()
        timeline.compute_begins()
        timeline.compute_ended()
        timeline.tokens_known()
        timeline.sent(0.25)
    return timeline.resolve()


def test_each_task_has_its_wait_its_span_and_its_tokens() -> None:
    timeline = Timeline(CountingClock())
    found = two_tasks(timeline)
    assert (found.compute_start_s, found.compute_end_s) == ([1.0, 5.0], [2.0, 6.0])
    assert (found.recv_wait_s, found.send_wait_s) == ([1.0, 1.0], [0.25, 0.25])
    assert found.token_times_s == [3.0, 7.0]
    trace = found.trace(zero_s=1.0)
    assert (trace.compute_start_s, trace.recv_wait_s) == ((0.0, 4.0), (1.0, 1.0))
    timeline.reset()
    assert two_tasks(timeline).token_times_s == [11.0, 15.0], "the first iteration is forgotten"


def test_the_host_s_gap_is_what_is_neither_compute_nor_waiting() -> None:
    found = ResolvedTimeline(
        started_s=0.0,
        ended_s=10.0,
        compute_start_s=[1.0, 5.0],
        compute_end_s=[3.0, 8.0],
        recv_wait_s=[1.0, 1.5],
        send_wait_s=[0.5, 0.5],
        token_times_s=[],
    )
    assert found.host_gap_s() == pytest.approx(10.0 - 5.0 - 2.5 - 1.0)


def test_without_instrumentation_only_tokens_are_timed() -> None:
    found = two_tasks(Timeline(CountingClock(), enabled=False))
    assert found.token_times_s == [0.0, 1.0]
    assert not found.compute_start_s
    assert found.trace(0.0).recv_wait_s == ()
