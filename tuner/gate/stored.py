"""A gate whose baseline is stored: it says how little it can see, and INCONCLUSIVE rather than a guess.

The units are sessions, as `tuner.gate.stored_rule` judges them. One stored session says nothing of how much nights
differ, and decides nothing unless `gate.session_noise` says it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from bench.errors import ConfigError, StudyError
from bench.spec import ModelSpec, Workload
from tuner.differences import differences
from tuner.gate.cases import SideRequest, case_of, metrics_of
from tuner.gate.contenders import FreshProcesses
from tuner.gate.session import said
from tuner.gate.sessions import NOW, Stored, is_benchmark_file, read_benchmarks, read_study
from tuner.gate.stored_rule import SESSION_RUNS, finding_of, foreseen, judge_case, stored_problem
from tuner.gate.values import (
    EXIT_CODES,
    Case,
    Finding,
    GateConfig,
    GateResult,
    Reason,
    Sample,
    Session,
    Tolerance,
    verdict_of,
)
from tuner.progress import Reporter

BLIND_TO_NIGHTS = (
    "what changed on the machine between the stored sessions and now, or a mood of it that no stored session had: "
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

    def run(self, reporter: Reporter) -> GateResult:
        """Measures the candidate, and judges.

        Raises:
            ConfigError: the stored side did other work than the candidate is asked for.
        """
        clock = _Clock.start()
        case = case_of("default", self.candidate, self.candidate)
        try:
            stored = read_stored(self.stored, case, other_dtype=self.other_dtype)
        except StudyError as error:
            return _unreadable(case.name, case.metrics, error, clock)
        plan, model = next((one.plan for one in stored if one.plan is not None), None), stored[0].model
        baseline = case.baseline.model_copy(update={"model": model, **({"plan": plan} if plan is not None else {})})
        case = case.model_copy(update={"baseline": baseline})
        sessions = [one.session for one in stored]
        gate = self.candidate.config.gate
        new = Session(place=NOW, case=case.name, samples=())
        if any(stored_problem(metric, sessions) is None for metric in case.metrics):
            with reporter:
                for line in foreseen(case.metrics, sessions, gate):
                    reporter.say(line)
                new = self._measure(case, sessions, reporter, clock)
        return _result(
            judge_case(case.name, case.metrics, sessions, new, gate),
            stored,
            (new,),
            clock,
            cases=(case,),
            notes=_notes(stored[0], new, case),
        )

    def _measure(self, case: Case, stored: Sequence[Session], reporter: Reporter, clock: _Clock) -> Session:
        contenders = FreshProcesses((case,))
        samples: list[Sample] = []
        with contenders:
            machine = contenders.machine("candidate")
            if machine is None or machine.hardware.hardware_id in {
                run.hardware_id for one in stored for run in one.samples
            }:
                samples = self._runs(case, contenders, reporter, clock)
        return Session(place=NOW, case=case.name, samples=tuple(samples), machine=machine)

    def _runs(self, case: Case, contenders: FreshProcesses, reporter: Reporter, clock: _Clock) -> list[Sample]:
        """A rehearsal, which compares its output with the unsplit model's and is not counted, then the session."""
        check = case.protocol.check_outputs
        samples: list[Sample] = []
        for number in range(SESSION_RUNS):
            if not samples and check:
                reporter.begin(f"rehearsal: {case.candidate.describe()}")
                rehearsal = contenders.run(case, "candidate", check=True)
                reporter.end(said(rehearsal))
                if rehearsal.failure is not None:
                    return [rehearsal]
            if samples and clock.took_s() + samples[-1].wall_s > 60 * (self.max_minutes or math.inf):
                break
            reporter.begin(f"candidate {number + 1} of {SESSION_RUNS}: {case.candidate.describe()}")
            samples.append(contenders.run(case, "candidate", check=False))
            reporter.end(said(samples[-1]))
            if samples[-1].failure is not None:
                break
        return samples


def nothing_stored(place: Path, gate: GateConfig) -> GateResult:
    """Of a study that has no best plan, as one has that is empty or did not end: there is nothing to run now either."""
    why = f"{place}: the study has no best plan, since it is empty or did not end; name a plan by --candidate-plan FILE"
    findings = tuple(finding_of("default", *one, Reason.MISSING_BASELINE, why) for one in gate.metrics.items())
    return _result(findings, (), (), _Clock.start())


def compare_files(baselines: Sequence[Path], candidate: Path, gate: GateConfig) -> GateResult:
    """Files of pytest-benchmark, benchmark by benchmark; one that only one side has is never passed over.

    Args:
        baselines: each holds a session of every benchmark.

    Raises:
        ConfigError: a metric that is asked for by name is not measured in a benchmark.
    """
    clock = _Clock.start()
    try:
        old, new = [read_benchmarks(path) for path in baselines], read_benchmarks(candidate)
    except StudyError as error:
        return _unreadable("all", gate.metrics, error, clock)
    names = list(dict.fromkeys(name for file in (*old, new) for name in file))
    metrics = {
        name: _metrics_of(name, next(file[name] for file in (*old, new) if name in file), gate) for name in names
    }
    hypotheses = sum(len(wanted) for wanted in metrics.values())
    findings: list[Finding] = []
    for name in names:
        stored = [file[name] for file in old if name in file]
        now = new[name].session if name in new else Session(place=str(candidate), case=name, samples=())
        if stored and name in new and (other := _other_work(stored, new[name].model, new[name].workload)):
            why = f"what is stored under this name did other work ({other}); give the plan another name"
            findings += [finding_of(name, *one, Reason.MISSING_BASELINE, why) for one in metrics[name].items()]
            continue
        sessions = [one.session for one in stored]
        findings += judge_case(name, metrics[name], sessions, now, gate, hypotheses=hypotheses)
    stored = [file[name] for name in names for file in old if name in file]
    return _result(tuple(findings), stored, [one.session for one in new.values()], clock, notes=())


def read_stored(places: Sequence[Path], case: Case, *, other_dtype: bool = False) -> tuple[Stored, ...]:
    """Stored sessions of a case; of studies, all of the plan that is best in the first.

    Args:
        other_dtype: whether another dtype is what is compared.

    Raises:
        StudyError: a place that holds no session that can be read.
        ConfigError: it did other work.
    """
    found: list[Stored] = []
    key: str | None = None
    for place in places:
        if is_benchmark_file(place):
            sessions = list(read_benchmarks(place).values())
            if len(sessions) != 1:
                raise ConfigError(
                    f"--stored {place}: holds {len(sessions)} benchmarks; give a file of one, or two files to compare"
                )
            one = sessions[0]
        else:
            one = read_study(place, key=key)
            key = one.key
        other = _other_work([one], case.candidate.model, case.workload, other_dtype=other_dtype)
        if other:
            raise ConfigError(
                f"--stored {place}: other work was measured there than is asked for now ({other}); give the same by "
                "flags, or by a --config; another dtype is compared by --candidate-dtype"
            )
        session = one.session.model_copy(update={"case": case.name})
        found.append(dataclasses.replace(one, session=session))
    return tuple(found)


def _metrics_of(name: str, stored: Stored, gate: GateConfig) -> dict[str, Tolerance]:
    machine = stored.session.machine
    return metrics_of(name, gate, stored.workload, gpu=machine is not None and bool(machine.hardware.gpus))


def _other_work(stored: Sequence[Stored], model: ModelSpec, workload: Workload, *, other_dtype: bool = False) -> str:
    """What sets the stored work apart, in words; empty where it is the same.

    Of the model its name and dtype: its revision, its attention kernel and the like may be what is compared, and are
    only shown. Prompts are the same if what they say is, wherever the file lies.
    """
    keys = {"name"} if other_dtype else {"name", "dtype"}
    lines: list[str] = []
    for one in stored:
        lines += [f"model.{line}" for line in _model_lines(one.model, model) if line.partition(":")[0] in keys]
        lines += [f"workload.{line}" for line in differences(_by_content(one.workload), _by_content(workload))]
    return "; ".join(dict.fromkeys(lines))


def _model_lines(stored: ModelSpec, now: ModelSpec) -> list[str]:
    """A revision that is not known is none that differs."""
    known = stored.revision is not None and now.revision is not None
    return [line for line in differences(stored, now) if known or not line.startswith("revision:")]


def _by_content(workload: Workload) -> Workload:
    path, sha256 = workload.prompts_file, workload.prompts_sha256
    if path is not None and sha256 is None and Path(path).is_file():
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return workload.model_copy(update={"prompts_file": None, "prompts_sha256": sha256})


def _notes(stored: Stored, new: Session, case: Case) -> tuple[str, ...]:
    """What differs and is no reason not to compare."""
    then, now = stored.session.machine, new.machine
    pairs: list[tuple[str, BaseModel, BaseModel]] = []
    if then is not None and now is not None:
        pairs.append(("software", then.software, now.software))
    lines = [f"model differs: {line}" for line in _model_lines(stored.model, case.candidate.model)]
    lines += [f"{what} differs: {line}" for what, one, other in pairs for line in differences(one, other)]
    disturbed = [run.disturbances[0] for run in new.samples if run.disturbances]
    if disturbed:
        lines.append(f"{len(disturbed)} of {len(new.samples)} runs were disturbed, the first by {disturbed[0]}")
    return tuple(lines)


def _unreadable(case: str, metrics: Mapping[str, Tolerance], error: StudyError, clock: _Clock) -> GateResult:
    findings = tuple(finding_of(case, *one, Reason.UNREADABLE, str(error)) for one in metrics.items())
    return _result(findings, (), (), clock)


def _result(
    findings: tuple[Finding, ...],
    stored: Sequence[Stored],
    new: Sequence[Session],
    clock: _Clock,
    *,
    cases: tuple[Case, ...] = (),
    notes: tuple[str, ...] = (),
) -> GateResult:
    verdict = verdict_of(findings)
    old = [one.session for one in stored]
    return GateResult(
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        method="stored",
        cannot_see=(BLIND_TO_NIGHTS, *((BLIND_TO_FLEETS,) if any(one.of_study for one in stored) else ())),
        findings=findings,
        cases=cases,
        sessions=(*old, *new),
        machines={"baseline": old[0].machine if old else None, "candidate": new[0].machine if new else None},
        started_at=clock.started_at,
        took_s=round(clock.took_s(), 1),
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _Clock:
    """When a gate began, for people and for sums."""

    started_at: str
    began: float

    @classmethod
    def start(cls) -> _Clock:
        return cls(started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), began=time.monotonic())

    def took_s(self) -> float:
        return time.monotonic() - self.began
