"""SideRunner without processes: what each run gives is said beforehand, and how long it took is made up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Self

from pipetune.bench.record import Machine
from pipetune.tuner.gate.python_env import OutOfTime
from pipetune.tuner.gate.values import Case, Method, Sample, SideName
from tests.record_factory import make_machine
from tests.tuner.gate.factory import make_sample

Answer = Callable[[Case, SideName, int], Sample]
"""Of a case, a side, and the number of its run: 0 is the rehearsal."""


class FakeRunner:
    """Answers by a function, and remembers who was asked."""

    method: Method = "fresh_processes"
    cannot_see: tuple[str, ...] = ()

    def __init__(self, answer: Answer, machines: dict[SideName, Machine | None] | None = None) -> None:
        self.answer = answer
        self.machines = machines or {"baseline": make_machine(), "candidate": make_machine()}
        self.asked: list[tuple[str, SideName, bool]] = []
        self.open = False
        self.getting_ready_s = -math.inf
        """How long it would take to be ready."""

    def __enter__(self) -> Self:
        self.open = True
        return self

    def __exit__(self, *exit_info: object) -> None:
        self.open = False

    def prepare(self, deadline: float) -> dict[SideName, Machine | None]:
        if deadline < time.monotonic() + self.getting_ready_s:
            raise OutOfTime
        return self.machines

    def run(self, case: Case, name: SideName, *, check: bool, timeout_s: float | None = None) -> Sample:
        assert self.open
        number = sum(asked[:2] == (case.name, name) for asked in self.asked)
        self.asked.append((case.name, name, check))
        return self.answer(case, name, number)


def equal(case: Case, name: SideName, number: int) -> Sample:
    """Both sides alike, with a little noise."""
    return make_sample(dict.fromkeys(case.metrics, 100.0 + 0.1 * (7 * number % 5)))
