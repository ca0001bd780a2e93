"""The rule for a stored baseline: from stored sessions and a new one to a verdict, and to how little is seen. Pure.

FAIL: surely above what the stored sessions let expect (`tuner.stats.sessions`), and by more than the least effect and
the known noise floor. OK: surely within the margin. What never differs by a byte, as memory may, is decided exactly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from pipetune.tuner.config.gate import GateConfig, Tolerance
from pipetune.tuner.gate.values import VERDICTS, Finding, Reason, Sample, Session, Verdict, is_better_higher
from pipetune.tuner.stats.looks import FALSE_ALARM, MISSED
from pipetune.tuner.stats.sessions import NewLevel, predict

SESSION_RUNS = 5
"""Fresh processes of the candidate: more would not help, since the session is the unit."""


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


def out_of_time(findings: Sequence[Finding], runs: int) -> tuple[Finding, ...]:
    """Findings of a candidate's session that was cut short by the time that a gate was given.

    What its runs decided all the same stays decided, and what more of them would not help is still the reason.

    Args:
        runs: that the session has.
    """
    why = f"the time was up after {runs} of {SESSION_RUNS} runs; give more --max-minutes"

    def cut(one: Finding) -> Finding:
        if one.reason not in (Reason.MISSING_CANDIDATE, Reason.NOT_TOLD):
            return one
        text = f"{why}; {one.text}" if runs else why
        return one.model_copy(update={"reason": Reason.OUT_OF_TIME, "text": text})

    return tuple(map(cut, findings))


def foreseen(metrics: Mapping[str, Tolerance], stored: Sequence[Session], gate: GateConfig) -> list[str]:
    """What can be seen of each metric, before anything is measured."""
    lines = []
    for metric, tolerance in metrics.items():
        if stored_problem(metric, stored) is None:
            logs = [_logs(session, metric) for session in stored if session.samples]
            level = statistics.median(one for session in logs for one in session)
            found = predict(logs, [level] * SESSION_RUNS, told_spread=gate.session_noise)
            lines.append(f"{metric}: {_seen(found, tolerance, FALSE_ALARM / len(metrics))}")
    return lines


def _judge(
    case: str,
    metric: str,
    tolerance: Tolerance,
    stored: Sequence[Session],
    new: Session,
    gate: GateConfig,
    alpha: float,
) -> Finding:
    broken = _broken(metric, stored, new)
    if broken is not None:
        return finding_of(case, metric, tolerance, *broken)
    old_logs, new_logs = [_logs(session, metric) for session in stored if session.samples], _logs(new, metric)
    flat = [one for session in old_logs for one in session]
    found = predict(old_logs, new_logs, told_spread=gate.session_noise)
    level = statistics.fmean(statistics.median(session) for session in old_logs)
    if len(flat) > 1 and len(new_logs) > 1 and len({*flat, *new_logs}) == 1:
        reason, text = Reason.WITHIN_MARGIN, "every run of both sides gave exactly the same"
    else:
        reason, text = _decide(found, tolerance, gate, alpha)
    interval = found.interval(0.95)
    return finding_of(
        case,
        metric,
        tolerance,
        reason,
        text,
        estimate=math.expm1(found.difference),
        interval=(math.expm1(interval[0]), math.expm1(interval[1])) if interval is not None else None,
        differences=tuple(one - level for one in new_logs),
        baseline=math.exp(_sign(metric) * level),
        candidate=statistics.median(run.metrics[metric] for run in new.samples),
    )


def _decide(found: NewLevel, tolerance: Tolerance, gate: GateConfig, alpha: float) -> tuple[Reason, str]:
    estimate, margin = math.expm1(found.difference), math.log1p(tolerance.margin)
    seen = _seen(found, tolerance, alpha)
    if found.above() <= alpha and estimate >= max(tolerance.least_effect, gate.noise_floor):
        return Reason.WORSE, f"{estimate:.1%} worse; p {found.above():.2g}; {seen}"
    if gate.noise_floor > tolerance.margin:
        return Reason.UNFIT_MACHINE, (
            f"equal sides may differ by {gate.noise_floor:.1%} here (gate.noise_floor), more than the margin of "
            f"{tolerance.margin:.0%}; take a quieter machine, or a wider margin"
        )
    if found.below(margin) <= MISSED:
        return Reason.WITHIN_MARGIN, f"surely less than {tolerance.margin:.0%} worse; {seen}"
    if found.spread is None:
        return Reason.TOO_FEW, (
            f"{seen}; store more sessions, set gate.session_noise to what is known of this machine, or run the "
            "baseline beside the candidate"
        )
    return Reason.NOT_TOLD, (
        f"neither surely worse nor surely within {tolerance.margin:.0%}: {seen}; run the baseline beside the candidate"
    )


def _seen(found: NewLevel, tolerance: Tolerance, alpha: float) -> str:
    """How little can be seen: the power at the margin."""
    if found.spread is None and found.error == 0.0:
        return "one stored session does not say how much sessions differ, so nothing is decided"
    share = f"{found.power(math.log1p(tolerance.margin), alpha):.0%} of the time"
    true = f"a true {tolerance.margin:+.0%}"
    if found.spread is None:
        return (
            "one stored session does not say how much sessions differ, so nothing is decided; even if they were all "
            f"alike, {true} would be found {share}"
        )
    said_by = f"the {found.sessions} stored" if math.isfinite(found.freedom) else "gate.session_noise:"
    return f"{said_by} sessions differ by {found.spread:.1%} (SD), by which {true} is found {share}"


def stored_problem(metric: str, stored: Sequence[Session]) -> tuple[Reason, str] | None:
    """Why nothing can be compared with what is stored, whatever the candidate does."""
    runs = [(session.place, run) for session in stored for run in session.samples]
    if not runs:
        places = ", ".join(session.place for session in stored)
        return Reason.MISSING_BASELINE, f"there is no stored run of it{f' in {places}' if places else ''}"
    return _problem(metric, "baseline", runs)


def _broken(metric: str, stored: Sequence[Session], new: Session) -> tuple[Reason, str] | None:
    broken = stored_problem(metric, stored)
    if broken is not None:
        return broken
    here = {run.hardware_id for run in new.samples}
    if new.machine is not None:
        here.add(new.machine.hardware.hardware_id)
    if None in here:
        return Reason.OTHER_HARDWARE, "the candidate's hardware could not be read, so that it cannot be called equal"
    if len(here | {run.hardware_id for session in stored for run in session.samples}) > 1:
        return Reason.OTHER_HARDWARE, (
            "the stored and the new runs are of different hardware (hardware_id), and a ratio of the two says nothing "
            "of the candidate; `pipetune compare` is for that"
        )
    if not new.samples:
        return Reason.MISSING_CANDIDATE, f"{new.place}: there is no run of the candidate"
    return _problem(metric, "candidate", [(new.place, run) for run in new.samples])


def _problem(metric: str, side: str, runs: Sequence[tuple[str, Sample]]) -> tuple[Reason, str] | None:
    failed = Reason.BASELINE_FAILED if side == "baseline" else Reason.CANDIDATE_FAILED
    for place, run in runs:
        if run.failure is not None:
            return failed, f"{side} ({place}): {run.failure.kind.value}: {run.failure.message}"
        if run.not_comparable is not None:
            return Reason.NOT_COMPARABLE, f"{side} ({place}): {run.not_comparable}"
        if metric not in run.metrics:
            there = ", ".join(run.metrics) or "none"
            return Reason.MISSING_METRIC, f"{side} ({place}): there is no {metric}; there are: {there}"
        if not _is_number(run, metric):
            return Reason.NOT_FINITE, f"{side} ({place}): {metric} is {run.metrics[metric]}, of which there is no ratio"
    unsteady = sum(not run.steady for _, run in runs)
    if 3 * unsteady > len(runs):
        return Reason.NEVER_STEADY, f"{unsteady} of {len(runs)} runs of the {side} never got steady"
    return None


def _is_number(run: Sample, metric: str) -> bool:
    """One that has a logarithm."""
    value = run.metrics.get(metric, math.nan)
    return math.isfinite(value) and value > 0


def _sign(metric: str) -> float:
    return -1.0 if is_better_higher(metric) else 1.0


def _logs(session: Session, metric: str) -> list[float]:
    """Of the runs, turned so that worse is more."""
    return [_sign(metric) * math.log(run.metrics[metric]) for run in session.samples]


def finding_of(case: str, metric: str, tolerance: Tolerance, reason: Reason, text: str, **values: object) -> Finding:
    common: dict[str, object] = {"case": case, "metric": metric, "reason": reason, "text": text}
    common |= {"margin": tolerance.margin, "least_effect": tolerance.least_effect}
    return Finding.model_validate({**common, "verdict": VERDICTS.get(reason, Verdict.INCONCLUSIVE), **values})
