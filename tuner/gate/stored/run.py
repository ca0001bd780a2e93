"""A gate whose baseline is stored: it says how little it can see, and INCONCLUSIVE rather than a guess.

The units are sessions, as `tuner.gate.stored.rule` judges them. One stored session says nothing of how much nights
differ, and decides nothing unless `gate.session_noise` says it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipetune.bench.errors import ConfigError, StudyError
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Workload
from pipetune.tuner.config.gate import GateConfig, Tolerance
from pipetune.tuner.gate.cases import SideRequest, case_of, metrics_of
from pipetune.tuner.gate.run import said
from pipetune.tuner.gate.runners import Contenders, FreshProcesses
from pipetune.tuner.gate.stored.rule import SESSION_RUNS, finding_of, foreseen, judge_case, out_of_time, stored_problem
from pipetune.tuner.gate.stored.sessions import NOW, Stored, is_benchmark_file, read_benchmarks, read_study
from pipetune.tuner.gate.values import EXIT_CODES, Case, Finding, GateResult, Reason, Sample, Session, verdict_of
from pipetune.tuner.progress import Reporter
from pipetune.tuner.study.diff import differences

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
    """From the start to the end."""
    contenders: Callable[[tuple[Case, ...]], Contenders] = FreshProcesses
    """Who runs the candidate."""

    def run(self, reporter: Reporter) -> GateResult:
        """Measures the candidate, and judges.

        Raises:
            ConfigError: the stored side did other work than the candidate is asked for.
        """
        clock = _Clock.start(self.max_minutes)
        case = case_of("default", self.candidate, self.candidate)
        try:
            stored = read_stored(self.stored, case, other_dtype=self.other_dtype)
        except StudyError as error:
            return _undecided(case.name, case.metrics, Reason.UNREADABLE, str(error), clock)
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
        findings = judge_case(case.name, case.metrics, sessions, new, gate)
        if len(new.samples) < SESSION_RUNS:
            # Runs that are missing though none failed are those for which there was no time.
            findings = out_of_time(findings, len(new.samples))
        notes = _notes(stored, new, case.candidate.model)
        return _result(findings, stored, (new,), clock, cases=(case,), notes=tuple(notes))

    def _measure(self, case: Case, stored: Sequence[Session], reporter: Reporter, clock: _Clock) -> Session:
        contenders = self.contenders((case,))
        samples: list[Sample] = []
        with contenders:
            contenders.prepare(clock.deadline)
            machine = contenders.machine("candidate")
            if machine is None or machine.hardware.hardware_id in {
                run.hardware_id for one in stored for run in one.samples
            }:
                samples = self._runs(case, contenders, reporter, clock)
        return Session(place=NOW, case=case.name, samples=tuple(samples), machine=machine)

    def _runs(self, case: Case, contenders: Contenders, reporter: Reporter, clock: _Clock) -> list[Sample]:
        """A rehearsal, which compares its output with the unsplit model's and is not counted, then the session.

        Fewer than a session's where one failed, or the time was up.
        """
        reporter.begin(f"rehearsal: {case.candidate.describe()}")
        last = _sample(case, contenders, clock, check=case.protocol.check_outputs)
        if last is None:
            return []
        reporter.end(said(last))
        if not last.is_measured:
            return [last]
        reporter.say(self._forecast(last.wall_s))
        samples: list[Sample] = []
        while len(samples) < SESSION_RUNS and last.wall_s <= clock.left_s():
            reporter.begin(f"candidate {len(samples) + 1} of {SESSION_RUNS}: {case.candidate.describe()}")
            run = _sample(case, contenders, clock, check=False)
            if run is None:
                break
            reporter.end(said(run))
            samples.append(run)
            if not run.is_measured:
                break
            last = run
        return samples

    def _forecast(self, run_s: float) -> str:
        """`5 runs of about 26 s: 2 min from here`."""
        minutes = max(1, round(SESSION_RUNS * run_s / 60))
        text = f"{SESSION_RUNS} runs of about {run_s:.0f} s: {minutes} min from here"
        return text if self.max_minutes is None else f"{text}, and no more than {self.max_minutes:g} in all"


def _sample(case: Case, contenders: Contenders, clock: _Clock, *, check: bool) -> Sample | None:
    """One run; None where the time is up, since one that the deadline ended says nothing of the candidate."""
    left_s = clock.left_s()
    if left_s <= 0:
        return None
    sample = contenders.run(case, "candidate", check=check, timeout_s=None if math.isinf(left_s) else left_s)
    return None if sample.failure is not None and clock.left_s() <= 0 else sample


def nothing_stored(place: Path, gate: GateConfig) -> GateResult:
    """Of a study that has no best plan, as one has that is empty or did not end: there is nothing to run now either."""
    why = f"{place}: the study has no best plan, since it is empty or did not end; name a plan by --candidate-plan FILE"
    return _undecided("default", gate.metrics, Reason.MISSING_BASELINE, why, _Clock.start())


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
        return _undecided("all", gate.metrics, Reason.UNREADABLE, str(error), clock)
    names = list(dict.fromkeys(name for file in (*old, new) for name in file))
    if not names:
        why = f"there is no benchmark in {', '.join(map(str, (*baselines, candidate)))}"
        return _undecided("all", gate.metrics, Reason.MISSING_BASELINE, why, clock)
    metrics = {
        name: _metrics_of(name, next(file[name] for file in (*old, new) if name in file), gate) for name in names
    }
    hypotheses = sum(len(wanted) for wanted in metrics.values())
    findings: list[Finding] = []
    newest: list[Session] = []
    notes: dict[str, list[str]] = {}
    for name in names:
        stored = [file[name] for file in old if name in file]
        now = new[name].session if name in new else Session(place=str(candidate), case=name, samples=())
        newest.append(now)
        lacking = [path for path, file in zip(baselines, old, strict=True) if stored and name not in file]
        lines = [f"{path} is left out: it lacks the benchmark" for path in lacking]
        lines += _notes(stored, now, new[name].model if name in new else None)
        for line in lines:
            notes.setdefault(line, []).append(name)
        why = ""
        if name in new and (other := _other_work(stored, new[name].model, new[name].workload)):
            why = f"what is stored under this name did other work ({other}); give the plan another name"
        elif other := _other_plans(stored):
            why = f"what is stored under this name is of different plans ({other}); give each plan a name of its own"
        if why:
            findings += [finding_of(name, *one, Reason.MISSING_BASELINE, why) for one in metrics[name].items()]
            continue
        sessions = [one.session for one in stored]
        findings += judge_case(name, metrics[name], sessions, now, gate, hypotheses=hypotheses)
    stored = [file[name] for name in names for file in old if name in file]
    told = [line if len(of) == len(names) else f"{', '.join(of)}: {line}" for line, of in notes.items()]
    return _result(tuple(findings), stored, newest, clock, notes=tuple(told))


def read_stored(places: Sequence[Path], case: Case, *, other_dtype: bool = False) -> tuple[Stored, ...]:
    """Stored sessions of a case; of studies, all of the plan that is best in the first.

    Args:
        other_dtype: whether another dtype is what is compared.

    Raises:
        StudyError: a place that holds no session that can be read.
        ConfigError: it did other work, or another plan than the places before it; or the first study has no best plan.
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
            if key is None and not found and len(places) > 1:
                raise ConfigError(
                    f"--stored {place}: no plan of this study, the first, has a rank, so that none is named whose "
                    "sessions the others hold; leave it out, or give another one first"
                )
        other = _other_work([one], case.candidate.model, case.workload, other_dtype=other_dtype)
        if other:
            raise ConfigError(
                f"--stored {place}: other work was measured there than is asked for now ({other}); give the same by "
                "flags, or by a --config; another dtype is compared by --candidate-dtype"
            )
        session = one.session.model_copy(update={"case": case.name})
        found.append(dataclasses.replace(one, session=session))
    if other := _other_plans(found):
        raise ConfigError(f"--stored: the sessions are of different plans ({other}); give those of one plan")
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


def _other_plans(stored: Sequence[Stored]) -> str:
    """Which two of the stored sessions are of different plans, and of which; empty where all are of one.

    A study is asked for an effective plan, in which caps that come to the same are one; a file does not say to what its
    plan's caps came.
    """
    plans = [(one, one.plan) for one in stored if one.plan is not None]
    for one, plan in plans[1:]:
        first, its_plan = plans[0]
        of_study = first.of_study or one.of_study
        if plan != its_plan and not (of_study and _uncapped(plan) == _uncapped(its_plan)):
            texts = [its_plan.describe(), plan.describe()]
            what = " → ".join(texts) if texts[0] != texts[1] else "; ".join(differences(its_plan, plan))
            return f"{first.session.place} and {one.session.place}: {what}"
    return ""


def _uncapped(plan: Plan) -> str:
    return EffectivePlan(plan=plan, in_flight=1).key


def _model_lines(stored: ModelSpec, now: ModelSpec) -> list[str]:
    """A revision that is not known is none that differs."""
    known = stored.revision is not None and now.revision is not None
    return [line for line in differences(stored, now) if known or not line.startswith("revision:")]


def _by_content(workload: Workload) -> Workload:
    path, sha256 = workload.prompts_file, workload.prompts_sha256
    if path is not None and sha256 is None and Path(path).is_file():
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return workload.model_copy(update={"prompts_file": None, "prompts_sha256": sha256})


def _notes(stored: Sequence[Stored], new: Session, model: ModelSpec | None) -> list[str]:
    """Of one case: which stored sessions hold nothing, and what differs and is no reason not to compare.

    Args:
        model: the candidate's; None where it has none.
    """
    lines = [f"{one.session.place} is left out: {one.empty_because}" for one in stored if one.empty_because is not None]
    used = [one for one in stored if one.session.samples]
    for one in used:
        if model is not None:
            lines += [f"model differs: {line}" for line in _model_lines(one.model, model)]
        then, now = one.session.machine, new.machine
        if then is not None and now is not None:
            lines += [f"software differs: {line}" for line in differences(then.software, now.software)]
    of_sides: dict[str, Sequence[Sample]] = {
        "stored": [run for one in used for run in one.session.samples],
        "new": new.samples,
    }
    for side, runs in of_sides.items():
        disturbed = [run.disturbances[0] for run in runs if run.disturbances]
        if disturbed:
            lines.append(f"{len(disturbed)} of {len(runs)} {side} runs were disturbed, the first by {disturbed[0]}")
    return list(dict.fromkeys(lines))


def _undecided(case: str, metrics: Mapping[str, Tolerance], reason: Reason, why: str, clock: _Clock) -> GateResult:
    """The same of every metric, where there is nothing to compare."""
    findings = tuple(finding_of(case, *one, reason, why) for one in metrics.items())
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
        machines={
            "baseline": old[0].machine if old else None,
            "candidate": next((one.machine for one in new if one.machine is not None), None),
        },
        started_at=clock.started_at,
        took_s=round(clock.took_s(), 1),
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _Clock:
    """When a gate began, for people and for sums, and when it has to end."""

    started_at: str
    began: float
    deadline: float

    @classmethod
    def start(cls, max_minutes: float | None = None) -> _Clock:
        began = time.monotonic()
        return cls(
            started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            began=began,
            deadline=math.inf if max_minutes is None else began + 60 * max_minutes,
        )

    def took_s(self) -> float:
        return time.monotonic() - self.began

    def left_s(self) -> float:
        return self.deadline - time.monotonic()
