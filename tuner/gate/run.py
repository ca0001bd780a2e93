"""A gate as it runs: a rehearsal of both sides, then pairs in randomised order, until the rule has decided.

The rehearsal is not counted: it fills the page cache, compares the output of both sides with the unsplit model, and
tells how long a pair takes.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipetune.bench.record import Machine, timestamp
from pipetune.tuner.gate.python_env import OutOfTime
from pipetune.tuner.gate.rule import judge
from pipetune.tuner.gate.runners import SideRunner
from pipetune.tuner.gate.values import (
    EXIT_CODES,
    REHEARSAL,
    SIDES,
    Case,
    Finding,
    GateResult,
    Pair,
    Reason,
    Sample,
    SideName,
    Verdict,
    verdict_of,
)
from pipetune.tuner.progress import Reporter, values_text
from pipetune.tuner.stats.looks import Look, looks_for
from pipetune.tuner.study.diff import differences


@dataclass(frozen=True, kw_only=True)
class Clock:
    """When a gate began and when it has to end, on the monotonic clock."""

    started_at: str
    """UTC, ISO 8601."""
    began: float
    deadline: float

    @classmethod
    def start(cls, max_minutes: float | None = None) -> Clock:
        """A clock that begins now; None sets no deadline."""
        began = time.monotonic()
        deadline = math.inf if max_minutes is None else began + 60 * max_minutes
        return cls(started_at=timestamp(), began=began, deadline=deadline)

    def took_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def left_s(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return self.deadline - time.monotonic()

    def sample(
        self, runner: SideRunner, case: Case, name: SideName, reporter: Reporter, label: str, *, check: bool
    ) -> Sample:
        """One run of a side; one that the deadline ended is none, and says nothing of the side.

        Raises:
            OutOfTime: the time is up.
        """
        reporter.begin(label)
        left_s = self.left_s()
        if left_s <= 0:
            raise OutOfTime
        sample = runner.run(case, name, check=check, timeout_s=None if math.isinf(left_s) else left_s)
        if sample.failure is not None and self.left_s() <= 0:
            raise OutOfTime
        reporter.end(said(sample))
        return sample


@dataclass
class Gate:
    """Cases, who runs them, and for how long."""

    cases: tuple[Case, ...]
    runner: SideRunner
    seed: int
    max_minutes: float | None = None
    """From the start to the end, what is built and rehearsed among them."""
    _clock: Clock = field(default_factory=lambda: Clock.start())
    _pairs: dict[str, list[Pair]] = field(default_factory=dict)
    _open: dict[str, list[str]] = field(default_factory=dict)
    """Metrics of each case that are not decided."""
    _findings: dict[tuple[str, str], Finding] = field(default_factory=dict)

    def run(self, reporter: Reporter) -> GateResult:
        """Runs it to its end.

        Raises:
            UserError: sides that cannot be started as they were asked for.
            FleetError: of a running fleet, the workers failed before anything was compared.
        """
        self._clock = Clock.start(self.max_minutes)
        self._pairs = {case.name: [] for case in self.cases}
        self._open = {case.name: list(case.metrics) for case in self.cases}
        self._findings = {}
        looks = looks_for(sum(len(case.metrics) for case in self.cases))
        machines: dict[SideName, Machine | None] = {}
        with reporter:
            reporter.begin("getting both sides ready")
            with self.runner:
                try:
                    self.runner.prepare(self._clock.deadline)
                    reporter.end(f"{len(self.cases)} case{'s' if len(self.cases) > 1 else ''}, order seed {self.seed}")
                    machines = {name: self.runner.machine(name) for name in SIDES}
                    pair_s = self._rehearse(reporter, looks)
                    if pair_s:
                        reporter.say(self._forecast(sum(pair_s.values()), looks))
                        self._go_on(reporter, looks, pair_s)
                except OutOfTime:
                    for case in self.cases:
                        self._decide(case, looks, because=Reason.OUT_OF_TIME)
        findings = tuple(self._findings[case.name, metric] for case in self.cases for metric in case.metrics)
        return result_of(
            findings,
            self._clock,
            method=self.runner.method,
            cannot_see=self.runner.cannot_see,
            cases=self.cases,
            pairs=tuple(pair for pairs in self._pairs.values() for pair in pairs),
            order_seed=self.seed,
            machines=machines,
            notes=(*_fleets(self.cases), *_software(machines), *_disturbed(self._pairs)),
        )

    def _rehearse(self, reporter: Reporter, looks: tuple[Look, ...]) -> dict[str, float]:
        """Seconds of a pair, by case; those of which a side failed are decided already."""
        pair_s = {}
        for case in self.cases:
            found = {}
            for name in SIDES:
                label = f"{case.name} · rehearsal · {name}: {case.side(name).describe()}"
                found[name] = self._sample(case, name, reporter, label, check=case.protocol.check_outputs)
            if not all(sample.is_measured for sample in found.values()):
                self._pairs[case.name].append(Pair(case=case.name, number=REHEARSAL, first=SIDES[0], **found))
                self._decide(case, looks)
            else:
                pair_s[case.name] = sum(sample.wall_s for sample in found.values())
        return pair_s

    def _go_on(self, reporter: Reporter, looks: tuple[Look, ...], pair_s: dict[str, float]) -> None:
        draws = random.Random(self.seed)
        for number in range(looks[-1].pairs):
            for case in self.cases:
                # Drawn for the decided ones as well, so that the order of a case hangs on the seed alone.
                first: SideName = draws.choice(SIDES)
                if not self._open[case.name]:
                    continue
                if pair_s[case.name] > self._clock.left_s():
                    raise OutOfTime
                pair = self._pair(case, number, first, reporter)
                pair_s[case.name] = sum(pair.side(name).wall_s for name in SIDES)
                self._pairs[case.name].append(pair)
                self._decide(case, looks)

    def _pair(self, case: Case, number: int, first: SideName, reporter: Reporter) -> Pair:
        found = {}
        for name in (first, *(other for other in SIDES if other != first)):
            found[name] = self._sample(case, name, reporter, f"{case.name} · pair {number + 1} · {name}", check=False)
        return Pair(case=case.name, number=number, first=first, **found)

    def _sample(self, case: Case, name: SideName, reporter: Reporter, label: str, *, check: bool) -> Sample:
        return self._clock.sample(self.runner, case, name, reporter, label, check=check)

    def _decide(self, case: Case, looks: tuple[Look, ...], *, because: Reason | None = None) -> None:
        for metric in list(self._open[case.name]):
            finding = judge(case, metric, self._pairs[case.name], looks, because=because)
            if finding is not None:
                self._findings[case.name, metric] = finding
                self._open[case.name].remove(metric)
        failed = any(self._findings[key].verdict is Verdict.FAIL for key in self._findings if key[0] == case.name)
        if failed and self._open[case.name]:
            self._decide(case, looks, because=Reason.SETTLED)

    def _forecast(self, pair_s: float, looks: tuple[Look, ...]) -> str:
        """`8 to 24 pairs of about 26 s: 4 to 11 minutes`."""
        least, most = (next(look.pairs for look in looks if look.can_fail), looks[-1].pairs)
        minutes = [max(1, round(pairs * pair_s / 60)) for pairs in (least, most)]
        text = f"{least} to {most} pairs of about {pair_s:.0f} s: {minutes[0]} to {minutes[1]} minutes from here"
        return text if self.max_minutes is None else f"{text}, and no more than {self.max_minutes:g} in all"


def result_of(findings: tuple[Finding, ...], clock: Clock, **values: Any) -> GateResult:
    """A gate that ends now; `values` are the further fields of its result."""
    verdict = verdict_of(findings)
    return GateResult(
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        findings=findings,
        started_at=clock.started_at,
        took_s=round(clock.took_s(), 1),
        **values,
    )


def said(sample: Sample) -> str:
    """What came of a run, in a line."""
    if sample.failure is not None:
        return f"{sample.failure.kind.value}: {sample.failure.message}"
    if sample.not_comparable is not None:
        return f"not comparable: {sample.not_comparable}"
    speed = "output_throughput" if "output_throughput" in sample.metrics else "total_token_throughput"
    parts = [values_text(sample.metrics, (speed,)), "" if sample.steady else "never steady", f"{sample.wall_s:.0f} s"]
    return " · ".join(part for part in parts if part)


def _fleets(cases: tuple[Case, ...]) -> list[str]:
    """Workers without a stage take their share of the cores, so that fleets are part of what is compared."""
    return [
        f"{case.name}: the fleets differ: {', '.join(case.baseline.devices)} → {', '.join(case.candidate.devices)}; "
        "--devices gives both the same"
        for case in cases
        if case.baseline.devices != case.candidate.devices
    ]


def _software(machines: Mapping[SideName, Machine | None]) -> list[str]:
    """What differs in software is what a gate is for, and only shown."""
    if not machines:
        return []
    one, other = (machines[name] for name in SIDES)
    if one is None or other is None:
        return [f"what the {name} runs on could not be read from it" for name in SIDES if machines[name] is None]
    return [f"software differs: {line}" for line in differences(one.software, other.software)]


def _disturbed(pairs: Mapping[str, list[Pair]]) -> list[str]:
    notes = []
    for case, rows in pairs.items():
        runs = [pair.side(name) for pair in rows for name in SIDES]
        disturbed = [run for run in runs if run.disturbances]
        if disturbed:
            notes.append(
                f"{case}: {len(disturbed)} of {len(runs)} runs were disturbed: {disturbed[0].disturbances[0]}, for one"
            )
    return notes
