"""A gate whose baseline is stored: it says how little it can see, and INCONCLUSIVE rather than a guess.

The units are sessions (`tuner.stats.sessions`). FAIL: surely above what the stored sessions let expect, and by more than the
least effect and the known noise floor. OK: surely within the margin, which needs three stored sessions at least. What
never differs by a byte, as memory may, is decided exactly.
"""

from __future__ import annotations

import datetime as dt
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import ConfigError, StudyError
from bench.spec import SCHEMA_VERSION
from tuner.differences import differences
from tuner.gate.cases import SideRequest, case_of
from tuner.gate.contenders import FreshProcesses
from tuner.gate.session import said
from tuner.gate.sessions import NOW, is_benchmark_file, read_benchmarks, read_study
from tuner.gate.values import (
    EXIT_CODES,
    VERDICTS,
    Case,
    Finding,
    GateConfig,
    GateResult,
    Reason,
    Sample,
    Session,
    Tolerance,
    Verdict,
    is_better_higher,
    verdict_of,
)
from tuner.progress import Reporter
from tuner.stats.looks import FALSE_ALARM, MISSED
from tuner.stats.sessions import LEAST_SESSIONS, Prediction, predict

SESSION_RUNS = 5
"""Fresh processes of the candidate: more would not help, since the session is the unit."""
CANNOT_SEE = ("what changed on the machine between the stored sessions and now: that counts as the candidate's",)


@dataclass(frozen=True, kw_only=True)
class StoredGate:
    """Stored sessions beside a candidate that is measured now."""

    stored: tuple[Path, ...]
    candidate: SideRequest
    max_minutes: float | None = None

    def run(self, reporter: Reporter) -> GateResult:
        """Measures the candidate, and judges.

        Raises:
            ConfigError: the stored side did other work than the candidate is asked for.
        """
        started_at, began = dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), time.monotonic()
        case = case_of("default", self.candidate, self.candidate)
        try:
            stored = read_stored(self.stored, case)
        except StudyError as error:
            return _unreadable(case.name, tuple(case.metrics), error, started_at)
        session = self._measure(case, reporter, began)
        findings = judge_case(case.name, case.metrics, stored, session, self.candidate.config.gate)
        return _result(findings, (*stored, session), (case,), started_at, began)

    def _measure(self, case: Case, reporter: Reporter, began: float) -> Session:
        contenders = FreshProcesses((case,))
        samples: list[Sample] = []
        with reporter, contenders:
            for number in range(SESSION_RUNS):
                late = samples and time.monotonic() - began + samples[-1].wall_s > 60 * (self.max_minutes or math.inf)
                if late or any(sample.failure is not None for sample in samples):
                    break
                reporter.begin(f"candidate {number + 1} of {SESSION_RUNS}: {case.candidate.describe()}")
                samples.append(contenders.run(case, "candidate", check=number == 0 and case.protocol.check_outputs))
                reporter.end(said(samples[-1]))
            machine = contenders.machine("candidate")
        return Session(place=NOW, case=case.name, samples=tuple(samples), machine=machine)


def compare_files(baseline: Path, candidate: Path, gate: GateConfig) -> GateResult:
    """Two files of pytest-benchmark, benchmark by benchmark; one that only one of them has is never passed over."""
    started_at, began = dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), time.monotonic()
    try:
        old, new = read_benchmarks(baseline), read_benchmarks(candidate)
    except StudyError as error:
        return _unreadable("all", tuple(gate.metrics), error, started_at)
    names = list(dict.fromkeys((*old, *new)))
    findings = tuple(
        finding
        for name in names
        for finding in judge_case(
            name,
            gate.metrics,
            [old[name]] if name in old else [],
            new.get(name, Session(place=str(candidate), case=name, samples=())),
            gate,
            hypotheses=len(names) * len(gate.metrics),
        )
    )
    return _result(findings, (*old.values(), *new.values()), (), started_at, began)


def read_stored(places: Sequence[Path], case: Case) -> tuple[Session, ...]:
    """Stored sessions of a case; of studies, all of the plan that is best in the first.

    Raises:
        StudyError: a place that holds no session that can be read.
        ConfigError: it did other work.
    """
    found: list[Session] = []
    key: str | None = None
    for place in places:
        if is_benchmark_file(place):
            sessions = list(read_benchmarks(place).values())
            if len(sessions) > 1:
                raise ConfigError(
                    f"--stored {place}: holds {len(sessions)} benchmarks; give a file of one, or two files to compare"
                )
            found += [session.model_copy(update={"case": case.name}) for session in sessions]
            continue
        study, key, session = read_study(place, key=key)
        other = differences(study.config.workload, case.workload)
        if other:
            raise ConfigError(
                f"--stored {place}: was measured with another workload ({'; '.join(other)}); give the same by flags, "
                "or by a --config"
            )
        found.append(session.model_copy(update={"case": case.name}))
    return tuple(found)


def judge_case(
    case: str,
    metrics: Mapping[str, Tolerance],
    stored: Sequence[Session],
    new: Session,
    gate: GateConfig,
    *,
    hypotheses: int | None = None,
) -> tuple[Finding, ...]:
    """A finding for every metric of a case.

    Args:
        hypotheses: of the whole gate; by default the case's own.
    """
    alpha = FALSE_ALARM / (hypotheses or len(metrics))
    return tuple(_judge(case, metric, tolerance, stored, new, gate, alpha) for metric, tolerance in metrics.items())


def _judge(
    case: str,
    metric: str,
    tolerance: Tolerance,
    stored: Sequence[Session],
    new: Session,
    gate: GateConfig,
    alpha: float,
) -> Finding:
    sign = -1.0 if is_better_higher(metric) else 1.0
    broken = _broken(metric, stored, new)
    if broken is not None:
        return _finding(case, metric, tolerance, *broken)
    old_logs = [[sign * math.log(run.metrics[metric]) for run in session.samples] for session in stored]
    new_logs = [sign * math.log(run.metrics[metric]) for run in new.samples]
    flat = [one for session in old_logs for one in session]
    found = predict(old_logs, new_logs, assumed_sd=gate.session_noise)
    level = statistics.fmean(statistics.median(session) for session in old_logs)
    if len(flat) > 1 and len(new_logs) > 1 and len({*flat, *new_logs}) == 1:
        reason, text = Reason.WITHIN_MARGIN, "every run of both sides gave exactly the same"
    else:
        reason, text = _decide(found, tolerance, gate, alpha)
    low, high = found.interval(0.95)
    return _finding(
        case,
        metric,
        tolerance,
        reason,
        text,
        estimate=math.expm1(found.difference),
        interval=(math.expm1(low), math.expm1(high)),
        differences=tuple(one - level for one in new_logs),
        baseline=math.exp(sign * level),
        candidate=statistics.median(run.metrics[metric] for run in new.samples),
    )


def _decide(found: Prediction, tolerance: Tolerance, gate: GateConfig, alpha: float) -> tuple[Reason, str]:
    estimate, margin = math.expm1(found.difference), math.log1p(tolerance.margin)
    if found.above() <= alpha and estimate >= max(tolerance.least_effect, gate.noise_floor):
        return Reason.WORSE, f"{estimate:.1%} worse; p {found.above():.2g}"
    if not found.is_assumed and found.below(margin) <= MISSED:
        return Reason.WITHIN_MARGIN, f"surely less than {tolerance.margin:.0%} worse"
    power = found.power(margin, alpha)
    seen = f"a true {tolerance.margin:+.0%} would be found {power:.0%} of the time"
    if found.is_assumed:
        spread = f"{gate.session_noise:.0%} (gate.session_noise)"
        return Reason.TOO_FEW, (
            f"{found.sessions} stored session{'s' if found.sessions > 1 else ''} cannot tell how much sessions differ, "
            f"and {spread} is assumed: {seen}; store {LEAST_SESSIONS} or more, or run the baseline beside the candidate"
        )
    return Reason.NOT_TOLD, (
        f"{found.sessions} stored sessions differ so much that {seen}; run the baseline beside the candidate"
    )


def _broken(metric: str, stored: Sequence[Session], new: Session) -> tuple[Reason, str] | None:
    old = [(session.place, run) for session in stored for run in session.samples]
    if not old:
        places = ", ".join(session.place for session in stored)
        return Reason.MISSING_BASELINE, f"there is no stored run of it{f' in {places}' if places else ''}"
    if not new.samples:
        return Reason.MISSING_CANDIDATE, f"{new.place} has no run of it"
    sides = (("baseline", Reason.BASELINE_FAILED, old), ("candidate", Reason.CANDIDATE_FAILED, [(new.place, one) for one in new.samples]))
    for side, failed, runs in sides:
        for place, run in runs:
            if run.failure is not None:
                return failed, f"{side} ({place}): {run.failure.kind.value}: {run.failure.message}"
            if metric not in run.metrics:
                return Reason.MISSING_METRIC, f"{side} ({place}): there is no {metric}"
            if not (math.isfinite(run.metrics[metric]) and run.metrics[metric] > 0):
                return Reason.NOT_FINITE, f"{side} ({place}): {metric} is {run.metrics[metric]}"
        unsteady = sum(not run.steady for _, run in runs)
        if 3 * unsteady > len(runs):
            return Reason.NEVER_STEADY, f"{unsteady} of {len(runs)} runs of the {side} never got steady"
    machines = {run.hardware_id for _, run in (*old, *((new.place, one) for one in new.samples))}
    if len(machines) > 1 or None in machines:
        return Reason.OTHER_HARDWARE, "the two sides did not run on equal hardware; `pipetune compare` is for that"
    return None


def _finding(
    case: str, metric: str, tolerance: Tolerance, reason: Reason, text: str, **values: object
) -> Finding:
    common: dict[str, object] = {"case": case, "metric": metric, "reason": reason, "text": text}
    common |= {"margin": tolerance.margin, "least_effect": tolerance.least_effect}
    return Finding.model_validate({**common, "verdict": VERDICTS.get(reason, Verdict.INCONCLUSIVE), **values})


def _unreadable(case: str, metrics: Sequence[str], error: StudyError, started_at: str) -> GateResult:
    findings = tuple(_finding(case, metric, Tolerance(), Reason.UNREADABLE, str(error)) for metric in metrics)
    return _result(findings, (), (), started_at, time.monotonic())


def _result(
    findings: tuple[Finding, ...],
    sessions: tuple[Session, ...],
    cases: tuple[Case, ...],
    started_at: str,
    began: float,
) -> GateResult:
    verdict = verdict_of(findings)
    stored = [session for session in sessions if session.place != NOW]
    new = [session for session in sessions if session.place == NOW] or stored[-1:]
    return GateResult(
        schema_version=SCHEMA_VERSION,
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        method="stored",
        cannot_see=CANNOT_SEE,
        findings=findings,
        cases=cases,
        sessions=sessions,
        machines={"baseline": stored[0].machine if stored else None, "candidate": new[0].machine if new else None},
        started_at=started_at,
        took_s=round(time.monotonic() - began, 1),
    )
