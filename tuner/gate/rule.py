"""The gate's rule: from paired differences of one metric to FAIL, OK, INCONCLUSIVE, or more pairs. Pure.

At each look, in this order: FAIL, if the signed-rank test says that the candidate is worse and the shift is at least
the least effect and the noise floor; INCONCLUSIVE, if the noise floor is above the margin; OK, if the same test says
that it is less than the margin worse, and this look could have said FAIL. Otherwise more pairs, while there are any.

Runs that failed, say nothing, or hold no number end a comparison whatever the numbers say.
"""

import math
import statistics
from collections.abc import Sequence

from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate import values as v
from pipetune.tuner.stats import signed_rank
from pipetune.tuner.stats.signed_rank import Look

Fault = tuple[v.Reason, str]
"""Why nothing can be compared, and that in words."""


def judge(
    case: v.Case, metric: str, pairs: Sequence[v.Pair], looks: Sequence[Look], *, because: v.Reason | None = None
) -> v.Finding | None:
    """What is to be said of a metric by now; None for: more pairs.

    What was decided at one look stays decided whatever later pairs show, or fail to show: a hypothesis may be judged
    again with all pairs of a gate that went on for the sake of another. The looks are those of `looks_for` the number
    of hypotheses of the whole gate; `because`, such as OUT_OF_TIME, is why no more pairs will come, so that something
    must be said.
    """
    told = _Told(case, metric, pairs)
    for look in looks:
        if len(told.differences) < look.pairs:
            break
        if (decided := told.look(look, last=looks[-1].pairs)) is not None:
            return told.finding(*decided, at=look.pairs)
    if len(told.differences) >= looks[-1].pairs:
        return told.finding(*told.undecided(v.Reason.NOT_TOLD))
    if told.broken is not None:
        return told.finding(*told.broken)
    return told.finding(*told.undecided(because)) if because is not None else None


def look_at(
    differences: Sequence[float], look: Look, tolerance: Tolerance, *, noise_floor: float, last: int
) -> tuple[v.LookTaken, v.Reason | None]:
    """One look at one hypothesis: what it saw, and WORSE, WITHIN_MARGIN or, left open, None. Differences are
    logarithms, worse being positive, as many as the look asks for; the noise floor, a share that is known beforehand,
    is to hold after the last look's pairs, `last`."""
    floor = max(math.expm1(signed_rank.noise_floor(differences, last)), noise_floor)
    taken = v.LookTaken(
        pairs=look.pairs,
        p_fail=signed_rank.above(differences),
        alpha_fail=look.alpha_fail,
        p_ok=signed_rank.below(differences, math.log1p(tolerance.margin)),
        alpha_ok=look.alpha_ok,
        estimate=math.expm1(signed_rank.hodges_lehmann(differences)),
        floor=floor,
    )
    if taken.p_fail <= taken.alpha_fail and taken.estimate >= max(tolerance.least_effect, floor):
        return taken, v.Reason.WORSE
    if floor <= tolerance.margin and taken.p_ok <= taken.alpha_ok:
        return taken, v.Reason.WITHIN_MARGIN
    return taken, None


class _Told:
    """One hypothesis while it is looked at."""

    def __init__(self, case: v.Case, metric: str, pairs: Sequence[v.Pair]) -> None:
        self.case, self.metric, self.pairs = case, metric, pairs
        self.tolerance = case.metrics[metric]
        self.taken: list[v.LookTaken] = []
        whole, self.broken = _break_of(metric, pairs)
        # log(candidate / baseline) of the pairs before anything broke, turned so that worse is positive.
        self.differences = tuple(
            v.log_cost(metric, pair.candidate.metrics[metric] / pair.baseline.metrics[metric]) for pair in pairs[:whole]
        )

    def look(self, look: Look, *, last: int) -> Fault | None:
        """What one look says; None leaves it open."""
        seen = self.differences[: look.pairs]
        one, reason = look_at(seen, look, self.tolerance, noise_floor=self.case.noise_floor, last=last)
        self.taken.append(one)
        if reason is None or self._unsteady(look.pairs) is not None:
            return None
        if reason is v.Reason.WORSE:
            worse = abs(v.change_of(self.metric, one.estimate))
            return reason, f"{worse:.1%} worse; p {one.p_fail:.2g}, and equal sides differ by {one.floor:.1%}"
        return reason, f"surely less than {self.tolerance.margin:.0%} worse"

    def undecided(self, reason: v.Reason) -> Fault:
        """Why nothing could be said when no more pairs come."""
        if (unsteady := self._unsteady(len(self.pairs))) is not None:
            return unsteady
        floor, margin = (self.taken[-1].floor if self.taken else 0.0), self.tolerance.margin
        if floor > margin:
            return (
                v.Reason.UNFIT_MACHINE,
                f"equal sides may seem to differ by {floor:.1%} here, more than the margin of {margin:.0%}; "
                "take a quieter machine, longer runs, or a wider margin",
            )
        count = len(self.differences)
        if reason is v.Reason.SETTLED:
            return reason, f"not told after {count} pairs, when another metric of the case failed"
        if reason is v.Reason.OUT_OF_TIME:
            return reason, f"the time was up after {count} pairs; give more --max-minutes"
        return reason, (
            f"after {count} pairs it is neither surely worse nor surely within {margin:.0%}; "
            "longer runs or a quieter machine would tell"
        )

    def finding(self, reason: v.Reason, text: str, *, at: int | None = None) -> v.Finding:
        differences = self.differences[:at]
        low, high = signed_rank.interval(differences, 0.95) if differences else (-math.inf, math.inf)
        return v.finding_of(
            self.case.name,
            self.metric,
            self.tolerance,
            reason,
            text,
            pairs=len(differences),
            estimate=math.expm1(signed_rank.hodges_lehmann(differences)) if differences else None,
            interval=(math.expm1(low), math.expm1(high)) if math.isfinite(low) else None,
            floor=self.taken[-1].floor if self.taken else None,
            looks=tuple(self.taken),
            differences=self.differences,
            baseline=self._median("baseline"),
            candidate=self._median("candidate"),
        )

    def _unsteady(self, count: int) -> Fault | None:
        sides = (unsteady_of(name, [pair.side(name) for pair in self.pairs[:count]]) for name in v.SIDES)
        return next((fault for fault in sides if fault is not None), None)

    def _median(self, name: v.SideName) -> float | None:
        values = [pair.side(name).metrics.get(self.metric, math.nan) for pair in self.pairs]
        values = [value for value in values if math.isfinite(value)]
        return statistics.median(values) if values else None


def _break_of(metric: str, pairs: Sequence[v.Pair]) -> tuple[int, Fault | None]:
    """How many pairs are whole, and what is wrong with the next one."""
    hardware = next((pair.baseline.hardware_id for pair in pairs), None)
    first_of: dict[v.SideName, str] = {}
    for count, pair in enumerate(pairs):
        for name in v.SIDES:
            run = pair.side(name)
            recorded = run.recorded_hardware_id
            first = first_of.setdefault(name, recorded) if recorded is not None else None
            if (fault := fault_of(metric, name, run) or _moved(run, hardware, first)) is not None:
                where = "rehearsal" if pair.number == v.REHEARSAL else f"pair {pair.number + 1}"
                return count, (fault[0], f"{where}, {name}: {fault[1]}")
    return len(pairs), None


def _moved(run: v.Sample, hardware: str | None, recorded: str | None) -> Fault | None:
    """Whether a run was on other hardware than the first of all, or than the first of its side recorded."""
    if run.hardware_id is None:
        text = "the hardware that it ran on could not be read, so that none can be called equal"
    elif run.hardware_id != hardware:
        text = f"it ran on hardware {run.hardware_id}, and the first run on {hardware}"
    elif run.recorded_hardware_id != recorded:
        text = f"it ran on hardware {run.recorded_hardware_id}, and the first run of its side on {recorded}"
    else:
        return None
    return v.Reason.OTHER_HARDWARE, text


def fault_of(metric: str, side: v.SideName, run: v.Sample) -> Fault | None:
    """Why a run yields no number to compare; None where it does."""
    if run.not_comparable is not None:
        return v.Reason.NOT_COMPARABLE, run.not_comparable
    if run.failure is not None:
        failed = v.Reason.CANDIDATE_FAILED if side == "candidate" else v.Reason.BASELINE_FAILED
        return failed, f"{run.failure.kind.value}: {run.failure.message}"
    if metric not in run.metrics:
        return v.Reason.MISSING_METRIC, f"there is no {metric}; there are: {', '.join(run.metrics) or 'none'}"
    value = run.metrics[metric]
    if not (math.isfinite(value) and value > 0):
        return v.Reason.NOT_FINITE, f"{metric} is {value}, of which there is no ratio"
    return None


def unsteady_of(side: v.SideName, runs: Sequence[v.Sample]) -> Fault | None:
    """Whether more than a third of a side's runs never got steady."""
    unsteady = sum(not run.steady for run in runs)
    if 3 * unsteady <= len(runs):
        return None
    return v.Reason.NEVER_STEADY, (
        f"{unsteady} of {len(runs)} runs of the {side} never got steady; give them more warm-up "
        "(protocol.max_warmup), or look at what else the machine does"
    )
