"""Shares of a task among its parts, by stamps of a clock that is tied to the host's anew at each look."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipetune.bench.worker.profiling.part_times import PartStamps


class Drifting:
    """A clock that is off by one more second at each look."""

    def __init__(self) -> None:
        self.looks = 0

    def stamp(self) -> float:
        return 0.0

    def resolve(self, stamps: list[float]) -> list[float]:
        self.looks += 1
        return [stamp + self.looks - 1 for stamp in stamps]


def test_begins_and_ends_are_resolved_at_one_look() -> None:
    stage: Any = SimpleNamespace(own_layers=range(2))
    stamps = PartStamps(stage, Drifting())
    stamps._calls = [("embedding", 0.0, 0.1), (0, 0.1, 0.4), (1, 0.4, 0.6)]
    (shares,) = stamps.shares([(0.0, 1.0)])
    expected = {"embedding": 0.1, 0: 0.3, 1: 0.2, "head": 0.4, "overhead": 0.0}
    assert shares == pytest.approx(expected)
