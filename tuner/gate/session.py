"""A gate as it runs: a rehearsal of both sides, then pairs in an order drawn by lot, until the rule has decided.

The rehearsal is not counted: it fills the page cache, compares the output of both sides with the unsplit model, and
tells how long a pair takes.
"""

from __future__ import annotations

import datetime as dt
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tuner.differences import differences
from tuner.gate.contenders import Contenders
from tuner.gate.rule import judge
from tuner.gate.values import (
    EXIT_CODES,
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
from tuner.progress import Reporter
from tuner.stats.looks import Look, looks_for


@dataclass
class Gate:
    """Cases, who runs them, and for how long."""

    cases: tuple[Case, ...]
    contenders: Contenders
    seed: int
    max_minutes: float | None = None
    on_pair: Callable[[Pair], None] = lambda pair: None
    """Told of every pair as soon as it is there."""
    _pairs: dict[str, list[Pair]] = field(default_factory=dict)
    _open: dict[str, list[str]] = field(default_factory=dict)
    """Metrics of each case that are not decided."""
    _findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    _notes: list[str] = field(default_factory=list)

    def run(self, reporter: Reporter) -> GateResult:
        """Runs it to its end.

        Raises:
            ConfigError: sides that cannot be started as they were asked for.
            FleetError: of a running fleet, the workers failed before anything was compared.
        """
        started_at, began = dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), time.monotonic()
        self._pairs = {case.name: [] for case in self.cases}
        self._open = {case.name: list(case.metrics) for case in self.cases}
        looks = looks_for(sum(len(case.metrics) for case in self.cases))
        with reporter, self.contenders:
            machines = {name: self.contenders.machine(name) for name in SIDES}
            pair_s = self._rehearse(reporter)
            if pair_s:
                reporter.say(self._forecast(pair_s, looks))
            self._go_on(reporter, looks, deadline=None if self.max_minutes is None else began + 60 * self.max_minutes)
        findings = tuple(self._findings[case.name, metric] for case in self.cases for metric in case.metrics)
        verdict = verdict_of(findings)
        return GateResult(
            verdict=verdict,
            exit_code=EXIT_CODES[verdict],
            method=self.contenders.method,
            cannot_see=self.contenders.cannot_see,
            findings=findings,
            cases=self.cases,
            pairs=tuple(pair for pairs in self._pairs.values() for pair in pairs),
            order_seed=self.seed,
            machines=machines,
            started_at=started_at,
            took_s=round(time.monotonic() - began, 1),
            notes=(*self._notes, *_software(machines), *_disturbed(self._pairs)),
        )

    def _rehearse(self, reporter: Reporter) -> dict[str, float]:
        """Seconds of a pair, by case; those of which a side failed are decided already."""
        pair_s = {}
        for case in self.cases:
            found: dict[SideName, Sample] = {}
            for name in SIDES:
                reporter.begin(f"{case.name} · rehearsal · {name}: {case.side(name).describe()}")
                found[name] = self.contenders.run(case, name, check=case.protocol.check_outputs)
                reporter.end(said(found[name]))
            if any(sample.failure is not None for sample in found.values()):
                self._pairs[case.name].append(Pair(case=case.name, number=0, first="baseline", **found))
                self._decide(case, looks_for(1))
            else:
                pair_s[case.name] = sum(sample.wall_s for sample in found.values())
        return pair_s

    def _go_on(self, reporter: Reporter, looks: tuple[Look, ...], *, deadline: float | None) -> None:
        lots = random.Random(self.seed)
        longest_s = 0.0
        for number in range(looks[-1].pairs):
            for case in self.cases:
                first: SideName = lots.choice(SIDES)
                if not self._open[case.name]:
                    continue
                if deadline is not None and time.monotonic() + longest_s > deadline:
                    for late in self.cases:
                        self._decide(late, looks, because=Reason.OUT_OF_TIME)
                    return
                began = time.monotonic()
                pair = self._pair(case, number, first, reporter)
                longest_s = max(longest_s, time.monotonic() - began)
                self._pairs[case.name].append(pair)
                self.on_pair(pair)
                self._decide(case, looks)

    def _pair(self, case: Case, number: int, first: SideName, reporter: Reporter) -> Pair:
        found: dict[str, Sample] = {}
        for name in (first, *(other for other in SIDES if other != first)):
            reporter.begin(f"{case.name} · pair {number + 1} · {name}")
            found[name] = self.contenders.run(case, name, check=False)
            reporter.end(said(found[name]))
        return Pair(
            case=case.name, number=number, first=first, baseline=found["baseline"], candidate=found["candidate"]
        )

    def _decide(self, case: Case, looks: tuple[Look, ...], *, because: Reason | None = None) -> None:
        for metric in list(self._open[case.name]):
            finding = judge(case, metric, self._pairs[case.name], looks, because=because)
            if finding is not None:
                self._findings[case.name, metric] = finding
                self._open[case.name].remove(metric)
        if any(found.verdict is Verdict.FAIL for (name, _), found in self._findings.items() if name == case.name):
            for metric in self._open[case.name]:
                settled = judge(case, metric, self._pairs[case.name], looks, because=Reason.SETTLED)
                assert settled is not None
                self._findings[case.name, metric] = settled
            self._open[case.name] = []

    def _forecast(self, pair_s: Mapping[str, float], looks: tuple[Look, ...]) -> str:
        """`8 to 24 pairs of about 26 s: 4 to 11 minutes`."""
        all_s = sum(pair_s.values())
        least, most = (next(look.pairs for look in looks if look.can_fail), looks[-1].pairs)
        text = (
            f"{least} to {most} pairs of about {all_s:.0f} s: {least * all_s / 60:.0f} to {most * all_s / 60:.0f} "
            "minutes from here"
        )
        return text if self.max_minutes is None else f"{text}, and no more than {self.max_minutes:g} in all"


def said(sample: Sample) -> str:
    """What came of a run, in a line."""
    if sample.failure is not None:
        return f"{sample.failure.kind.value}: {sample.failure.message}"
    speed = sample.metrics.get("output_throughput", sample.metrics["total_token_throughput"])
    steady = "" if sample.steady else " · never steady"
    return f"{speed:.1f} tok/s{steady} · {sample.wall_s:.0f} s"


def _software(machines: Mapping[SideName, object]) -> list[str]:
    """What differs in software is what a gate is for, and only shown."""
    from bench.record import Machine

    one, other = (machines[name] for name in SIDES)
    if not (isinstance(one, Machine) and isinstance(other, Machine)):
        missing = [name for name in SIDES if machines[name] is None]
        return [f"what the {name} runs on could not be read from it" for name in missing]
    return [f"software differs: {line}" for line in differences(one.software, other.software)]


def _disturbed(pairs: Mapping[str, list[Pair]]) -> list[str]:
    notes = []
    for case, rows in pairs.items():
        runs = [run for pair in rows for name in SIDES if (run := pair.side(name)) is not None]
        disturbed = [run for run in runs if run.disturbances]
        if disturbed:
            notes.append(
                f"{case}: {len(disturbed)} of {len(runs)} runs were disturbed, the first by {disturbed[0].disturbances[0]}"
            )
    return notes
