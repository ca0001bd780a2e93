"""One new session beside stored ones: what can be told when two sides did not run together.

A session is all runs of one study or file; its level is the median of its runs' logarithms. Sessions of one thing
differ by more than their runs do: another night, other neighbours, another temperature. So sessions are the units,
however many runs each has, and the new one is compared with what stored ones let expect of a further one: a prediction
interval of the normal distribution (Hahn and Meeker 1991, Statistical Intervals, section 4.5),

    mean +- t(k - 1) · sqrt(s² · (1 + 1 / k) + max(0, v - w))

s² being the variance of the k stored levels. It holds what the nights differ by, and w, what the runs of a stored
session leave open of its median, in the mean. The new session has a number of runs of its own, and leaves v open: where
that is more, as in a session of few runs, or in one whose runs scatter more, the difference is added; where it is less,
nothing is taken away. So the error rates hold for any number of runs.

Of one session nothing says how much nights differ. Where that is not told either, there is no test: the runs alone
say only what could be seen at most, were all nights alike.
"""

import math
import statistics
from collections.abc import Sequence

from scipy.special import chdtr, nctdtr, ndtr, ndtri, stdtr, stdtrit

LEAST_SESSIONS = 2
"""From so many on, their own spread is known, by one degree of freedom less."""
_FAR = 30.0
"""Standard errors."""


class NewLevel:
    """How a new session's level lies to what stored ones let expect of it."""

    def __init__(self, stored: Sequence[Sequence[float]], new: Sequence[float], *, told_spread: float | None) -> None:
        """Logarithms of runs, at least one of a stored session and one of the new; `told_spread`, the SD of the levels
        of sessions, is used where too few are stored to tell, and None where nobody knows."""
        sessions = [session for session in stored if session]
        assert sessions, "there are stored runs"
        assert new, "there are new runs"
        levels = [statistics.median(session) for session in sessions]
        self.sessions = count = len(levels)
        of_stored, of_new = _variance_of_runs(sessions), _variance_of_runs([new])
        known = of_new if of_stored is None else of_stored
        old_open = statistics.fmean(_open(known or 0.0, len(session)) for session in sessions)
        new_open = _open(max(of_stored or 0.0, of_new or 0.0), len(new))
        runs_alone = new_open + old_open / count
        self.spread = spread = statistics.stdev(levels) if count >= LEAST_SESSIONS else told_spread
        """SD of the levels of sessions, from the stored ones or as told; None where nothing says it."""
        variance = runs_alone if spread is None else spread**2 * (1 + 1 / count) + max(0.0, new_open - old_open)
        if count < LEAST_SESSIONS:
            variance = max(variance, runs_alone)
        self.difference = statistics.median(new) - statistics.fmean(levels)
        """Logarithm of the new session's level less the mean of the stored ones'."""
        self.error = math.sqrt(variance)
        """Standard error of that, were nothing but the night another; a lower bound where the nights' spread is
        unknown."""
        self.freedom = float(count - 1) if count >= LEAST_SESSIONS else math.inf
        """Degrees of freedom of the error; infinite where the spread of the nights was told, or is left out."""

    def above(self, shift: float = 0.0) -> float:
        """p of the one-sided test that the new session lies more than `shift` above; 1 where there is no test."""
        return self._tail(self.difference - shift)

    def below(self, shift: float) -> float:
        """p of the one-sided test that it lies less than `shift` above; 1 where there is no test."""
        return self._tail(shift - self.difference)

    def interval(self, level: float) -> tuple[float, float] | None:
        """Differences that two tests at (1 - level) / 2 each do not exclude; None where there is no test."""
        if self.spread is None:
            return None
        half = self._quantile((1 + level) / 2) * self.error
        return self.difference - half, self.difference + half

    def power(self, shift: float, alpha: float) -> float:
        """Chance that `above` is at most alpha where the true difference is `shift`, in the noise that was found. By
        the noncentral t distribution. Where there is no test: what a test could have at most, were all nights alike."""
        bound = self._quantile(1 - alpha)
        if self.error == 0.0:
            return 1.0 if shift > 0 else 0.0
        if math.isinf(self.freedom):
            return float(ndtr(shift / self.error - bound))
        apart = shift / self.error
        if apart > _FAR:
            # There the normal part of t hardly varies, and scipy's noncentral t overflows.
            # Past as many bounds it is 1, and a square of more would overflow.
            return float(chdtr(self.freedom, self.freedom * min(apart / bound, _FAR) ** 2))
        return 1.0 - float(nctdtr(self.freedom, apart, bound))

    def _tail(self, above: float) -> float:
        if self.spread is None:
            return 1.0
        if self.error == 0.0:
            return 0.0 if above > 0 else 1.0
        ratio = above / self.error
        return float(ndtr(-ratio)) if math.isinf(self.freedom) else float(stdtr(self.freedom, -ratio))

    def _quantile(self, share: float) -> float:
        return float(ndtri(share)) if math.isinf(self.freedom) else float(stdtrit(self.freedom, share))


def _variance_of_runs(sessions: Sequence[Sequence[float]]) -> float | None:
    """Within sessions, pooled; None where each has but one run."""
    if not (freedom := sum(len(session) - 1 for session in sessions)):
        return None
    return sum(statistics.variance(session) * (len(session) - 1) for session in sessions if len(session) > 1) / freedom


def _open(variance: float, runs: int) -> float:
    """Variance of a median of so many runs: a mean's up to two, beyond it that of a large normal sample's median. The
    latter is a little more than few runs have (Kendall and Stuart 1977, Advanced Theory of Statistics 1, 14.8)."""
    return variance * (1.0 if runs <= 2 else math.pi / 2) / runs
