"""One new session beside stored ones: what can be told when two sides did not run together.

A session is all runs of one study or file; its level is the median of its runs' logarithms. Sessions of one thing differ
by more than their runs do: another night, other neighbours, another temperature. So sessions are the units, however
many runs each has, and the new one is compared with what stored ones let expect of a further one: a prediction
interval of the normal distribution (Hahn and Meeker 1991, Statistical Intervals, section 4.5),

    mean +- t(k - 1) · s · sqrt(1 + 1 / k)

With fewer than three sessions their spread is unknown. A spread is then assumed, as a normal one, which is good for
finding gross differences and for nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import nct, norm, t

LEAST_SESSIONS = 3
"""Below so many, their spread is assumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """How a new session's level lies to what stored ones let expect of it."""

    difference: float
    """Of logarithms: the new session's level less the stored ones' mean."""
    error: float
    """Standard error of that, were nothing but the night another."""
    freedom: float
    """Degrees of freedom; infinite where the spread is assumed."""
    sessions: int

    @property
    def is_assumed(self) -> bool:
        return math.isinf(self.freedom)

    def above(self, shift: float = 0.0) -> float:
        """p of the one-sided test that the new session lies more than `shift` above."""
        return self._tail(self.difference - shift)

    def below(self, shift: float) -> float:
        """p of the one-sided test that it lies less than `shift` above."""
        return self._tail(shift - self.difference)

    def interval(self, level: float) -> tuple[float, float]:
        """Differences that two tests at (1 - level) / 2 each do not exclude."""
        half = self._quantile((1 + level) / 2) * self.error
        return self.difference - half, self.difference + half

    def power(self, shift: float, alpha: float) -> float:
        """Chance that `above` is at most alpha where the true difference is `shift`."""
        bound = self._quantile(1 - alpha)
        if self.error == 0.0:
            return 1.0 if shift > 0 else 0.0
        if self.is_assumed:
            return float(norm.sf(bound - shift / self.error))
        return float(nct.sf(bound, self.freedom, shift / self.error))

    def _tail(self, above: float) -> float:
        if self.error == 0.0:
            return 0.0 if above > 0 else 1.0
        ratio = above / self.error
        return float(norm.sf(ratio)) if self.is_assumed else float(t.sf(ratio, self.freedom))

    def _quantile(self, share: float) -> float:
        return float(norm.ppf(share)) if self.is_assumed else float(t.ppf(share, self.freedom))


def predict(stored: Sequence[Sequence[float]], new: Sequence[float], *, assumed_sd: float) -> Prediction:
    """How a new session lies to stored ones.

    Args:
        stored: of each session, the logarithms of its runs; at least one session with a run.
        new: the logarithms of the new session's runs, at least one.
        assumed_sd: of a session's level, where too few are stored to tell.
    """
    levels = [statistics.median(session) for session in stored if session]
    assert levels, "there are stored runs"
    assert new, "there are new runs"
    difference = statistics.median(new) - statistics.fmean(levels)
    count = len(levels)
    known = count >= LEAST_SESSIONS
    sd = statistics.stdev(levels) if known else assumed_sd
    return Prediction(
        difference=difference,
        error=sd * math.sqrt(1 + 1 / count),
        freedom=float(count - 1) if known else math.inf,
        sessions=count,
    )
