"""The rule for a stored baseline: from stored sessions and a new one to a verdict, and to how little is seen. Pure.

FAIL: surely above what the stored sessions let expect (`tuner.stats.sessions`), and by more than the least effect and
the known noise floor. OK: surely within the margin. What never differs by a byte, as memory may, is decided exactly.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from pipetune.tuner.config.gate import GateConfig, Tolerance
from pipetune.tuner.gate import values as v
from pipetune.tuner.gate.rule import Fault, fault_of, unsteady_of
from pipetune.tuner.stats.sessions import NewLevel
from pipetune.tuner.stats.signed_rank import FALSE_ALARM, MISSED

SESSION_RUNS = 5
"""Fresh processes of the candidate: more would not help, since the session is the unit."""


def judge_case(
    case: str,
    metrics: Mapping[str, Tolerance],
    stored: Sequence[v.Session],
    new: v.Session,
    gate: GateConfig,
    *,
    hypotheses: int | None = None,
) -> tuple[v.Finding, ...]:
    """A finding for every metric of a case; `hypotheses` are those of the whole gate, by default the case's own."""
    alpha = FALSE_ALARM / (hypotheses or len(metrics))
    findings = []
    for metric, tolerance in metrics.items():
        if (fault := _stored_fault(metric, stored) or _candidate_fault(metric, stored, new)) is not None:
            findings.append(v.finding_of(case, metric, tolerance, *fault))
            continue
        old_levels, (new_levels,) = _levels(stored, metric), _levels((new,), metric)
        found = NewLevel(old_levels, new_levels, told_spread=gate.session_noise)
        old = [one for session in old_levels for one in session]
        if min(len(old), len(new_levels)) > 1 and len({*old, *new_levels}) == 1:
            reason, text = v.Reason.WITHIN_MARGIN, "every run of both sides gave exactly the same"
        else:
            reason, text = _decide(metric, found, tolerance, gate, alpha)
        level = statistics.fmean(statistics.median(session) for session in old_levels)
        ends = found.interval(0.95)
        values = {
            "estimate": math.expm1(found.difference),
            "interval": None if ends is None else (math.expm1(ends[0]), math.expm1(ends[1])),
            "differences": tuple(one - level for one in new_levels),
            "baseline": v.from_log_cost(metric, level),
            "candidate": statistics.median(run.metrics[metric] for run in new.samples),
        }
        findings.append(v.finding_of(case, metric, tolerance, reason, text, **values))
    return tuple(findings)


def out_of_time(findings: Sequence[v.Finding], runs: int) -> tuple[v.Finding, ...]:
    """Findings of a candidate's session that was cut short after so many runs by the time that a gate was given. What
    its runs decided all the same stays decided, and what more of them would not help is still the reason."""
    why = f"the time was up after {runs} of {SESSION_RUNS} runs; give more --max-minutes"

    def cut(one: v.Finding) -> v.Finding:
        if one.reason not in (v.Reason.MISSING_CANDIDATE, v.Reason.NOT_TOLD):
            return one
        text = f"{why}; {one.text}" if runs else why
        return one.model_copy(update={"reason": v.Reason.OUT_OF_TIME, "text": text})

    return tuple(map(cut, findings))


def foreseen(metrics: Mapping[str, Tolerance], stored: Sequence[v.Session], gate: GateConfig) -> list[str]:
    """What can be seen of each metric, before anything is measured."""
    lines = []
    for metric, tolerance in metrics.items():
        if _stored_fault(metric, stored) is None:
            levels = _levels(stored, metric)
            typical = statistics.median(one for session in levels for one in session)
            found = NewLevel(levels, [typical] * SESSION_RUNS, told_spread=gate.session_noise)
            lines.append(f"{metric}: {_seen(found, tolerance, FALSE_ALARM / len(metrics))}")
    return lines


def _stored_fault(metric: str, stored: Sequence[v.Session]) -> Fault | None:
    """Why nothing can be compared with what is stored, whatever the candidate does."""
    if any(session.samples for session in stored):
        return _fault(metric, "baseline", stored)
    places = ", ".join(session.place for session in stored)
    return v.Reason.MISSING_BASELINE, f"there is no stored run of it{f' in {places}' if places else ''}"


def _decide(metric: str, found: NewLevel, tolerance: Tolerance, gate: GateConfig, alpha: float) -> Fault:
    estimate, margin = math.expm1(found.difference), math.log1p(tolerance.margin)
    seen = _seen(found, tolerance, alpha)
    if found.above() <= alpha and estimate >= max(tolerance.least_effect, gate.noise_floor):
        return v.Reason.WORSE, f"{abs(v.change_of(metric, estimate)):.1%} worse; p {found.above():.2g}; {seen}"
    if gate.noise_floor > tolerance.margin:
        return v.Reason.UNFIT_MACHINE, (
            f"equal sides may differ by {gate.noise_floor:.1%} here (gate.noise_floor), more than the margin of "
            f"{tolerance.margin:.0%}; take a quieter machine, or a wider margin"
        )
    if found.below(margin) <= MISSED:
        return v.Reason.WITHIN_MARGIN, f"surely less than {tolerance.margin:.0%} worse; {seen}"
    if found.spread is None:
        return v.Reason.TOO_FEW, (
            f"{seen}; store more sessions, set gate.session_noise to what is known of this machine, or run the "
            "baseline beside the candidate"
        )
    return v.Reason.NOT_TOLD, (
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


def _candidate_fault(metric: str, stored: Sequence[v.Session], new: v.Session) -> Fault | None:
    here = {run.hardware_id for run in new.samples}
    if new.machine is not None:
        here.add(new.machine.hardware.hardware_id)
    if None in here:
        return v.Reason.OTHER_HARDWARE, "the candidate's hardware could not be read, so that it cannot be called equal"
    if len(here | {run.hardware_id for session in stored for run in session.samples}) > 1:
        return v.Reason.OTHER_HARDWARE, (
            "the stored and the new runs are of different hardware (hardware_id), and a ratio of the two says nothing "
            "of the candidate; `pipetune compare` is for that"
        )
    if not new.samples:
        return v.Reason.MISSING_CANDIDATE, f"{new.place}: there is no run of the candidate"
    return _fault(metric, "candidate", (new,))


def _fault(metric: str, side: v.SideName, sessions: Sequence[v.Session]) -> Fault | None:
    for session in sessions:
        for run in session.samples:
            if (fault := fault_of(metric, side, run)) is not None:
                return fault[0], f"{side} ({session.place}): {fault[1]}"
    return unsteady_of(side, [run for session in sessions for run in session.samples])


def _levels(sessions: Sequence[v.Session], metric: str) -> list[list[float]]:
    """Log costs of the runs of each session that has any."""
    return [[v.log_cost(metric, run.metrics[metric]) for run in one.samples] for one in sessions if one.samples]
