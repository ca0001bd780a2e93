"""A gate as it runs: a rehearsal of both sides, then pairs in randomised order, until the rule has decided.

The rehearsal is not counted: it fills the page cache, compares the output of both sides with the unsplit model, and
tells how long a pair takes.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipetune.bench.fleet.fleet import warn_of_cores
from pipetune.bench.record import Machine, timestamp
from pipetune.tuner.config.sources import differences
from pipetune.tuner.gate import values as v
from pipetune.tuner.gate.python_env import OutOfTime
from pipetune.tuner.gate.rule import judge
from pipetune.tuner.gate.runners import SideRunner
from pipetune.tuner.progress import Reporter, values_text
from pipetune.tuner.stats.signed_rank import Look, looks_for


@dataclass(frozen=True)
class Clock:
    """When a gate began, which is now, and when it has to end, on the monotonic clock."""

    max_minutes: float | None = None
    began: float = field(default_factory=time.monotonic)
    started_at: str = field(default_factory=timestamp)
    """UTC, ISO 8601."""

    @property
    def deadline(self) -> float:
        """Infinite without one."""
        return math.inf if self.max_minutes is None else self.began + 60 * self.max_minutes

    def left_s(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return self.deadline - time.monotonic()

    def bounded(self, forecast: str) -> str:
        """A forecast, with the time that a gate has at most."""
        return forecast if self.max_minutes is None else f"{forecast}, and no more than {self.max_minutes:g} in all"

    def sample(
        self, runner: SideRunner, case: v.Case, name: v.SideName, reporter: Reporter, label: str, *, check: bool
    ) -> v.Sample:
        """One run of a side; one that the deadline ended is none, and says nothing of the side.
        OutOfTime: the time is up."""
        reporter.begin(label)
        left_s = self.left_s()
        if left_s <= 0:
            raise OutOfTime
        sample = runner.run(case, name, check=check, timeout_s=None if math.isinf(left_s) else left_s)
        if sample.failure is not None and self.left_s() <= 0:
            raise OutOfTime
        reporter.end(_said(sample))
        return sample


@dataclass
class Gate:
    """Cases, who runs them, and for how long."""

    cases: tuple[v.Case, ...]
    runner: SideRunner
    seed: int
    max_minutes: float | None = None
    """From the start to the end, what is built and rehearsed among them."""
    _clock: Clock = field(init=False)
    _pairs: dict[str, list[v.Pair]] = field(init=False)
    _findings: dict[tuple[str, str], v.Finding] = field(init=False)

    def run(self, reporter: Reporter) -> v.GateResult:
        """Runs it to its end. UserError: sides that cannot be started as they were asked for; FleetError: of a running
        fleet, the workers failed before anything was compared."""
        self._clock = Clock(self.max_minutes)
        self._pairs = {case.name: [] for case in self.cases}
        self._findings = {}
        looks = looks_for(sum(len(case.metrics) for case in self.cases))
        machines: dict[v.SideName, Machine | None] = {}
        with reporter:
            reporter.begin("getting both sides ready")
            with self.runner:
                try:
                    machines = self.runner.prepare(self._clock.deadline)
                    reporter.end(f"{len(self.cases)} case{'s' if len(self.cases) > 1 else ''}, order seed {self.seed}")
                    self._compare(reporter, looks)
                except OutOfTime:
                    for case in self.cases:
                        self._decide(case, looks, because=v.Reason.OUT_OF_TIME)
        return result_of(
            tuple(self._findings[case.name, metric] for case in self.cases for metric in case.metrics),
            self._clock,
            method=self.runner.method,
            cannot_see=self.runner.cannot_see,
            cases=self.cases,
            pairs=tuple(pair for pairs in self._pairs.values() for pair in pairs),
            order_seed=self.seed,
            machines=machines,
            notes=(*_fleets(self.cases), *_software(machines), *_disturbed(self._pairs)),
        )

    def _compare(self, reporter: Reporter, looks: tuple[Look, ...]) -> None:
        """The rehearsal, which counts where a side failed, then pair after pair of what is not decided."""
        draws = random.Random(self.seed)
        pair_s: dict[str, float] = {}
        for number in range(v.REHEARSAL, looks[-1].pairs):
            for case in self.cases:
                # Drawn for the decided ones as well, so that the order of a case hangs on the seed alone.
                first: v.SideName = v.SIDES[0] if number == v.REHEARSAL else draws.choice(v.SIDES)
                if number != v.REHEARSAL and not self._open(case):
                    continue
                if pair_s.get(case.name, -math.inf) > self._clock.left_s():
                    raise OutOfTime
                pair = self._pair(case, number, first, reporter)
                runs = [pair.side(name) for name in v.SIDES]
                is_measured = all(run.is_measured for run in runs)
                if is_measured:
                    pair_s[case.name] = sum(run.wall_s for run in runs)
                if number != v.REHEARSAL or not is_measured:
                    self._pairs[case.name].append(pair)
                    self._decide(case, looks)
                    open_, done = sum(bool(self._open(one)) for one in self.cases), sum(map(len, self._pairs.values()))
                    reporter.course(done, open_ * (looks[-1].pairs - number - 1), "pairs")
            if number == v.REHEARSAL and pair_s:
                reporter.say(self._forecast(sum(pair_s.values()), looks))
            if number == v.REHEARSAL + 1 and pair_s and self.max_minutes is not None:
                reporter.say(self._whether_enough(sum(pair_s.values()), looks))

    def _pair(self, case: v.Case, number: int, first: v.SideName, reporter: Reporter) -> v.Pair:
        """Both sides, one after the other; a rehearsal says what they are, and checks their outputs if it is asked."""
        check = number == v.REHEARSAL and case.protocol.check_outputs
        found = {}
        for name in sorted(v.SIDES, key=lambda name: name != first):
            label = f"{case.name} · pair {number + 1} · {name}"
            if number == v.REHEARSAL:
                label = f"{case.name} · rehearsal · {name}: {case.side(name).describe()}"
            found[name] = self._clock.sample(self.runner, case, name, reporter, label, check=check)
        return v.Pair(case=case.name, number=number, first=first, **found)

    def _open(self, case: v.Case) -> list[str]:
        """Metrics of a case that are not decided."""
        return [metric for metric in case.metrics if (case.name, metric) not in self._findings]

    def _decide(self, case: v.Case, looks: tuple[Look, ...], *, because: v.Reason | None = None) -> None:
        for metric in self._open(case):
            if (finding := judge(case, metric, self._pairs[case.name], looks, because=because)) is not None:
                self._findings[case.name, metric] = finding
        failed = any(self._findings[key].verdict is v.Verdict.FAIL for key in self._findings if key[0] == case.name)
        if failed and self._open(case):
            self._decide(case, looks, because=v.Reason.SETTLED)

    def _forecast(self, pair_s: float, looks: tuple[Look, ...]) -> str:
        """`8 to 24 pairs of about 26 s: 4 to 11 minutes`."""
        least, most = (next(look.pairs for look in looks if look.can_fail), looks[-1].pairs)
        minutes = [max(1, round(pairs * pair_s / 60)) for pairs in (least, most)]
        text = f"{least} to {most} pairs of about {pair_s:.0f} s: {minutes[0]} to {minutes[1]} minutes from here"
        return self._clock.bounded(text)

    def _whether_enough(self, pair_s: float, looks: tuple[Look, ...]) -> str:
        """Whether so long a pair lets the time decide, and what would."""
        least = next(look.pairs for look in looks if look.can_fail)
        fit = 1 + int(max(0.0, self._clock.left_s()) / pair_s)
        if fit >= least:
            return f"the time is enough for {min(fit, looks[-1].pairs)} pairs; {least} may decide"
        needed = math.ceil((time.monotonic() - self._clock.began + (least - 1) * pair_s) / 60 + 0.5)
        return (
            f"the time is too short to decide: {fit} of the {least} pairs fit that it takes at least; --max-minutes "
            f"{needed} has room for them, as has a shorter workload (--num-prompts, --output-len)"
        )


def result_of(
    findings: tuple[v.Finding, ...], clock: Clock, *, cases: tuple[v.Case, ...], notes: Sequence[str], **values: Any
) -> v.GateResult:
    """A gate that ends now; `values` are the further fields of its result."""
    verdict = v.verdict_of(findings)
    cores = [note for case in cases for name in v.SIDES for note in warn_of_cores(case.side(name).devices)]
    return v.GateResult(
        verdict=verdict,
        exit_code=v.EXIT_CODES[verdict],
        findings=findings,
        started_at=clock.started_at,
        took_s=round(time.monotonic() - clock.began, 1),
        cases=cases,
        notes=tuple(dict.fromkeys((*notes, *cores))),
        **values,
    )


def _said(sample: v.Sample) -> str:
    """What came of a run, in a line."""
    if sample.failure is not None:
        return f"{sample.failure.kind.value}: {sample.failure.message}"
    if sample.not_comparable is not None:
        return f"not comparable: {sample.not_comparable}"
    speed = "output_throughput" if "output_throughput" in sample.metrics else "total_token_throughput"
    parts = [values_text(sample.metrics, (speed,)), "" if sample.steady else "never steady", f"{sample.wall_s:.0f} s"]
    return " · ".join(part for part in parts if part)


def _fleets(cases: tuple[v.Case, ...]) -> list[str]:
    """Workers without a stage take their share of the cores, so that fleets are part of what is compared."""
    return [
        f"{case.name}: the fleets differ: {', '.join(case.baseline.devices)} → {', '.join(case.candidate.devices)}; "
        "--devices gives both the same"
        for case in cases
        if case.baseline.devices != case.candidate.devices
    ]


def _software(machines: Mapping[v.SideName, Machine | None]) -> list[str]:
    """What differs in software is what a gate is for, and only shown."""
    if not machines:
        return []
    one, other = (machines[name] for name in v.SIDES)
    if one is None or other is None:
        return [f"what the {name} runs on could not be read from it" for name in v.SIDES if machines[name] is None]
    return [f"software differs: {line}" for line in differences(one.software, other.software)]


def _disturbed(pairs: Mapping[str, list[v.Pair]]) -> list[str]:
    notes = []
    for case, rows in pairs.items():
        runs = [pair.side(name) for pair in rows for name in v.SIDES]
        if disturbed := [run.disturbances[0] for run in runs if run.disturbances]:
            notes.append(f"{case}: {len(disturbed)} of {len(runs)} runs were disturbed: {disturbed[0]}, for one")
    return notes
