"""A gate whose baseline is stored: it says how little it can see, and INCONCLUSIVE rather than a guess.

The units are sessions, as `tuner.gate.stored.rule` judges them. One stored session says nothing of how much nights
differ, and decides nothing unless `gate.session_noise` says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipetune.bench.errors import StudyError
from pipetune.tuner.config.gate import GateConfig, Tolerance
from pipetune.tuner.gate.cases import SideRequest, case_of, metrics_of
from pipetune.tuner.gate.python_env import OutOfTime
from pipetune.tuner.gate.run import Clock, result_of
from pipetune.tuner.gate.runners import FreshProcesses, SideRunner
from pipetune.tuner.gate.stored.read import Stored, notes_of, other_plans, other_work, read_benchmarks, read_stored
from pipetune.tuner.gate.stored.rule import SESSION_RUNS, foreseen, judge_case, out_of_time, stored_fault
from pipetune.tuner.gate.values import Case, Finding, GateResult, Reason, Sample, Session, finding_of
from pipetune.tuner.progress import Reporter

BLIND_TO_NIGHTS = (
    "what changed on the machine between the stored sessions and now, or a drift of it that no stored session had: "
    "it counts as the candidate's"
)
BLIND_TO_FLEETS = (
    "what a fleet shows that has run other plans before: the runs of a study share one, and the candidate's have none"
)


@dataclass(frozen=True, kw_only=True)
class StoredGate:
    """Stored sessions beside a candidate that is measured now."""

    stored: tuple[Path, ...]
    candidate: SideRequest
    other_dtype: bool = False
    """Whether another dtype is what is compared."""
    max_minutes: float | None = None
    """From the start to the end."""
    runner: Callable[[tuple[Case, ...]], SideRunner] = FreshProcesses
    """Who runs the candidate."""

    def run(self, reporter: Reporter) -> GateResult:
        """Measures the candidate, and judges.

        Raises:
            ConfigError: the stored side did other work than the candidate is asked for.
        """
        clock = Clock.start(self.max_minutes)
        case = case_of("default", self.candidate, self.candidate)
        try:
            stored = read_stored(self.stored, case, other_dtype=self.other_dtype)
        except StudyError as error:
            return _undecided(case.name, case.metrics, Reason.UNREADABLE, str(error), clock)
        plan = next((one.plan for one in stored if one.plan is not None), case.baseline.plan)
        baseline = case.baseline.model_copy(update={"model": stored[0].model, "plan": plan})
        case = case.model_copy(update={"baseline": baseline})
        sessions = [one.session for one in stored]
        gate = self.candidate.config.gate
        new = Session(place="now", case=case.name, samples=())
        if any(stored_fault(metric, sessions) is None for metric in case.metrics):
            with reporter:
                for line in foreseen(case.metrics, sessions, gate):
                    reporter.say(line)
                new = self._measure(case, sessions, new, reporter, clock)
        findings = judge_case(case.name, case.metrics, sessions, new, gate)
        if len(new.samples) < SESSION_RUNS:
            # Runs that are missing though none failed are those for which there was no time.
            findings = out_of_time(findings, len(new.samples))
        return _result(findings, stored, (new,), clock, (case,), notes_of(stored, new, case.candidate.model))

    def _measure(
        self, case: Case, stored: Sequence[Session], empty: Session, reporter: Reporter, clock: Clock
    ) -> Session:
        """The candidate's session; empty on other hardware than that of the stored ones."""
        with self.runner((case,)) as runner:
            runner.prepare(clock.deadline)
            machine = runner.machine("candidate")
            samples: list[Sample] = []
            here = None if machine is None else machine.hardware.hardware_id
            if here is None or here in {run.hardware_id for one in stored for run in one.samples}:
                samples = self._runs(case, runner, reporter, clock)
        return empty.model_copy(update={"samples": tuple(samples), "machine": machine})

    def _runs(self, case: Case, runner: SideRunner, reporter: Reporter, clock: Clock) -> list[Sample]:
        """A rehearsal, which compares its output with the unsplit model's and is not counted, then the session.

        Fewer than a session's where one failed, or the time was up.
        """

        def sample(label: str, *, check: bool) -> Sample:
            label = f"{label}: {case.candidate.describe()}"
            return clock.sample(runner, case, "candidate", reporter, label, check=check)

        samples: list[Sample] = []
        try:
            last = sample("rehearsal", check=case.protocol.check_outputs)
            if not last.is_measured:
                return [last]
            reporter.say(self._forecast(last.wall_s))
            while len(samples) < SESSION_RUNS and last.is_measured and last.wall_s <= clock.left_s():
                last = sample(f"candidate {len(samples) + 1} of {SESSION_RUNS}", check=False)
                samples.append(last)
        except OutOfTime:
            # The deadline ended a run, which says nothing of the candidate.
            pass
        return samples

    def _forecast(self, run_s: float) -> str:
        """`5 runs of about 26 s: 2 min from here`."""
        minutes = max(1, round(SESSION_RUNS * run_s / 60))
        text = f"{SESSION_RUNS} runs of about {run_s:.0f} s: {minutes} min from here"
        return text if self.max_minutes is None else f"{text}, and no more than {self.max_minutes:g} in all"


def nothing_stored(place: Path, gate: GateConfig) -> GateResult:
    """The result for a study without a best plan, as one that is empty: there is nothing to run now either."""
    why = f"{place}: the study has no best plan, since it is empty or did not end; name a plan by --candidate-plan FILE"
    return _undecided("default", gate.metrics, Reason.MISSING_BASELINE, why, Clock.start())


def compare_files(baselines: Sequence[Path], candidate: Path, gate: GateConfig) -> GateResult:
    """Files of pytest-benchmark, benchmark by benchmark; one that only one side has is never passed over.

    Args:
        baselines: each holds a session of every benchmark.

    Raises:
        ConfigError: a metric that is asked for by name is not measured in a benchmark.
    """
    clock = Clock.start()
    try:
        old, new = [read_benchmarks(path) for path in baselines], read_benchmarks(candidate)
    except StudyError as error:
        return _undecided("all", gate.metrics, Reason.UNREADABLE, str(error), clock)
    names = list(dict.fromkeys(name for file in (*old, new) for name in file))
    if not names:
        why = f"there is no benchmark in {', '.join(map(str, (*baselines, candidate)))}"
        return _undecided("all", gate.metrics, Reason.MISSING_BASELINE, why, clock)
    first = {name: next(file[name] for file in (*old, new) if name in file) for name in names}
    metrics = {name: _metrics_of(name, one, gate) for name, one in first.items()}
    hypotheses = sum(map(len, metrics.values()))
    findings: list[Finding] = []
    newest: list[Session] = []
    notes: dict[str, list[str]] = {}
    for name in names:
        stored, now = [file[name] for file in old if name in file], new.get(name)
        session = now.session if now is not None else Session(place=str(candidate), case=name, samples=())
        newest.append(session)
        lacking = [path for path, file in zip(baselines, old, strict=True) if stored and name not in file]
        lines = [f"{path} is left out: it lacks the benchmark" for path in lacking]
        for line in (*lines, *notes_of(stored, session, now.model if now is not None else None)):
            notes.setdefault(line, []).append(name)
        why = ""
        if now is not None and (other := other_work(stored, now.model, now.workload)):
            why = f"what is stored under this name did other work ({other}); give the plan another name"
        elif other := other_plans(stored):
            why = f"what is stored under this name is of different plans ({other}); give each plan a name of its own"
        if why:
            findings += [finding_of(name, *one, Reason.MISSING_BASELINE, why) for one in metrics[name].items()]
            continue
        sessions = [one.session for one in stored]
        findings += judge_case(name, metrics[name], sessions, session, gate, hypotheses=hypotheses)
    every = [file[name] for name in names for file in old if name in file]
    told = [line if len(of) == len(names) else f"{', '.join(of)}: {line}" for line, of in notes.items()]
    return _result(tuple(findings), every, newest, clock, (), told)


def _metrics_of(name: str, stored: Stored, gate: GateConfig) -> dict[str, Tolerance]:
    machine = stored.session.machine
    return metrics_of(name, gate, stored.workload, gpu=machine is not None and bool(machine.hardware.gpus))


def _undecided(case: str, metrics: Mapping[str, Tolerance], reason: Reason, why: str, clock: Clock) -> GateResult:
    """One finding for every metric alike, where there is nothing to compare."""
    return _result(tuple(finding_of(case, *one, reason, why) for one in metrics.items()), (), (), clock, (), ())


def _result(
    findings: tuple[Finding, ...],
    stored: Sequence[Stored],
    new: Sequence[Session],
    clock: Clock,
    cases: tuple[Case, ...],
    notes: Sequence[str],
) -> GateResult:
    return result_of(
        findings,
        clock,
        method="stored",
        cannot_see=(BLIND_TO_NIGHTS, *((BLIND_TO_FLEETS,) if any(one.of_study for one in stored) else ())),
        cases=cases,
        sessions=(*(one.session for one in stored), *new),
        machines={
            "baseline": stored[0].session.machine if stored else None,
            "candidate": next((one.machine for one in new if one.machine is not None), None),
        },
        notes=tuple(notes),
    )
