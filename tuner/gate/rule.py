"""The gate's rule: from paired differences of one metric to FAIL, OK, INCONCLUSIVE, or more pairs. Pure.

At each look, in this order: FAIL, if the signed-rank test says that the candidate is worse and the shift is at least
the least effect and the noise floor; INCONCLUSIVE, if the noise floor is above the margin; OK, if the same test says
that it is less than the margin worse, and this look could have said FAIL. Otherwise more pairs, while there are any.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.faults import Fault, fault_of, unsteady_of
from pipetune.tuner.gate.values import (
    REHEARSAL,
    SIDES,
    Case,
    Finding,
    LookTaken,
    Pair,
    Reason,
    Sample,
    SideName,
    finding_of,
    log_cost,
)
from pipetune.tuner.stats import signed_rank
from pipetune.tuner.stats.looks import Look


def judge(
    case: Case, metric: str, pairs: Sequence[Pair], looks: Sequence[Look], *, because: Reason | None = None
) -> Finding | None:
    """What is to be said of a metric by now; None for: more pairs.

    What was decided at one look stays decided whatever later pairs show, or fail to show: a hypothesis may be judged
    again with all pairs of a gate that went on for the sake of another.

    Args:
        pairs: of this case, in order.
        looks: as `looks_for` the number of hypotheses of the whole gate.
        because: why no more pairs will come, so that something must be said; OUT_OF_TIME, for one.
    """
    told = _Told(case=case, metric=metric, pairs=tuple(pairs))
    for look in looks:
        if len(told.differences) < look.pairs:
            break
        decided = told.look(look, last=looks[-1].pairs)
        if decided is not None:
            return told.finding(*decided, at=look.pairs)
    if len(told.differences) >= looks[-1].pairs:
        return told.finding(*told.undecided(Reason.NOT_TOLD))
    if told.broken is not None:
        return told.finding(*told.broken)
    return told.finding(*told.undecided(because)) if because is not None else None


def look_at(
    differences: Sequence[float], look: Look, tolerance: Tolerance, *, noise_floor: float, last: int
) -> tuple[LookTaken, Reason | None]:
    """One look at one hypothesis: what it saw, and WORSE, WITHIN_MARGIN or, left open, None.

    Args:
        differences: as many as the look asks for; logarithms, worse being positive.
        noise_floor: that is known beforehand, as a share.
        last: pairs of the last look, after which the noise floor is to hold.
    """
    floor = max(math.expm1(signed_rank.noise_floor(differences, last)), noise_floor)
    taken = LookTaken(
        pairs=look.pairs,
        p_fail=signed_rank.above(differences),
        alpha_fail=look.alpha_fail,
        p_ok=signed_rank.below(differences, math.log1p(tolerance.margin)),
        alpha_ok=look.alpha_ok,
        estimate=math.expm1(signed_rank.hodges_lehmann(differences)),
        floor=floor,
    )
    if taken.p_fail <= taken.alpha_fail and taken.estimate >= max(tolerance.least_effect, floor):
        return taken, Reason.WORSE
    if floor <= tolerance.margin and taken.p_ok <= taken.alpha_ok:
        return taken, Reason.WITHIN_MARGIN
    return taken, None


@dataclass
class _Told:
    """One hypothesis while it is looked at."""

    case: Case
    metric: str
    pairs: tuple[Pair, ...]
    taken: list[LookTaken] = field(default_factory=list)

    @property
    def tolerance(self) -> Tolerance:
        return self.case.metrics[self.metric]

    @functools.cached_property
    def differences(self) -> tuple[float, ...]:
        """log(candidate / baseline) of the pairs before anything broke, turned so that worse is positive."""
        return tuple(
            log_cost(self.metric, pair.candidate.metrics[self.metric] / pair.baseline.metrics[self.metric])
            for pair in self.pairs[: self._whole]
        )

    @property
    def broken(self) -> Fault | None:
        """What ended the comparison of this metric, whatever its values are; None while nothing did."""
        return self._break[1]

    @property
    def _whole(self) -> int:
        return self._break[0]

    @functools.cached_property
    def _break(self) -> tuple[int, Fault | None]:
        """How many pairs are whole, and what is wrong with the next one."""
        hardware = next((pair.baseline.hardware_id for pair in self.pairs), None)
        recorded: dict[SideName, str] = {}
        for count, pair in enumerate(self.pairs):
            for name in SIDES:
                run = pair.side(name)
                now = run.recorded_hardware_id
                before = recorded.setdefault(name, now) if now is not None else None
                problem = self._problem(name, run, hardware) or _moved(before, now)
                if problem is not None:
                    reason, text = problem
                    where = "rehearsal" if pair.number == REHEARSAL else f"pair {pair.number + 1}"
                    return count, (reason, f"{where}, {name}: {text}")
        return len(self.pairs), None

    def _problem(self, name: SideName, run: Sample, hardware: str | None) -> Fault | None:
        fault = fault_of(self.metric, name, run)
        if fault is not None:
            return fault
        if run.hardware_id is None:
            text = "the hardware that it ran on could not be read, so that none can be called equal"
            return Reason.OTHER_HARDWARE, text
        if run.hardware_id != hardware:
            return Reason.OTHER_HARDWARE, f"it ran on hardware {run.hardware_id}, and the first run on {hardware}"
        return None

    def look(self, look: Look, *, last: int) -> Fault | None:
        """What one look says; None leaves it open."""
        seen = self.differences[: look.pairs]
        one, reason = look_at(seen, look, self.tolerance, noise_floor=self.case.noise_floor, last=last)
        self.taken.append(one)
        if reason is None or self._unsteady(look.pairs) is not None:
            return None
        if reason is Reason.WORSE:
            return reason, f"{one.estimate:.1%} worse; p {one.p_fail:.2g}, and equal sides differ by {one.floor:.1%}"
        return reason, f"surely less than {self.tolerance.margin:.0%} worse"

    def undecided(self, reason: Reason) -> Fault:
        """Why nothing could be said when no more pairs come."""
        unsteady = self._unsteady(len(self.pairs))
        if unsteady is not None:
            return unsteady
        floor, margin = (self.taken[-1].floor if self.taken else 0.0), self.tolerance.margin
        if floor > margin:
            return (
                Reason.UNFIT_MACHINE,
                f"equal sides may seem to differ by {floor:.1%} here, more than the margin of {margin:.0%}; "
                "take a quieter machine, longer runs, or a wider margin",
            )
        count = len(self.differences)
        if reason is Reason.SETTLED:
            return reason, f"not told after {count} pairs, when another metric of the case failed"
        if reason is Reason.OUT_OF_TIME:
            return reason, f"the time was up after {count} pairs; give more --max-minutes"
        return reason, (
            f"after {count} pairs it is neither surely worse nor surely within {margin:.0%}; "
            "longer runs or a quieter machine would tell"
        )

    def finding(self, reason: Reason, text: str, *, at: int | None = None) -> Finding:
        differences = self.differences[:at]
        low, high = signed_rank.interval(differences, 0.95) if differences else (-math.inf, math.inf)
        return finding_of(
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
        sides = (unsteady_of(name, self._runs(name)[:count]) for name in SIDES)
        return next((fault for fault in sides if fault is not None), None)

    def _median(self, name: SideName) -> float | None:
        values = [run.metrics.get(self.metric, math.nan) for run in self._runs(name)]
        values = [value for value in values if math.isfinite(value)]
        return statistics.median(values) if values else None

    def _runs(self, name: SideName) -> list[Sample]:
        return [pair.side(name) for pair in self.pairs]


def _moved(before: str | None, now: str | None) -> Fault | None:
    """Whether a run of one side was on other hardware than that side's first."""
    if before == now:
        return None
    return Reason.OTHER_HARDWARE, f"it ran on hardware {now}, and the first run of its side on {before}"
