"""Where to look next for the highest rate that a plan sustains, by the shares of requests that kept their limits.

A share falls steeply near that rate. Between the highest rate that was sustained and the lowest that was not it is
thought to be where a line through the two shares, over the logarithm of the rate, crosses the share that is wanted; or
in the middle, where one of them is of a rate far beyond it; or halfway from there to the higher rate, where all kept
them at the lower. The next one to try is so far beside that place that two rates are likely to enclose it as narrowly
as is asked for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

from pipetune.bench.spec import HIGHEST_RATE, Arrivals

STEP = 1.1
"""Factor to go on by while all rates, or none, were sustained; its fourth power behind the second one, its ninth behind
the third, and so on: guesses are good, or far off."""
_HIGHEST = 2**12
"""How many times higher than the first a rate is tried, while all are sustained."""
_FURTHEST = 16
"""How many times higher than the arrivals' rate a search begins at most."""
_MOST_SIMULATED = 20


def bracket(shares: Mapping[float, float], wanted: float) -> tuple[float | None, float | None]:
    """The highest rate up to which all were sustained, and the lowest that was not; None where there is none."""
    high = min((rate for rate, share in shares.items() if share < wanted), default=None)
    return max((rate for rate in shares if high is None or rate < high), default=None), high


def next_rate(shares: Mapping[float, float], wanted: float, *, guess: float, tolerance: float = 0.03) -> float:
    """The rate to measure next, of four digits; `shares` are those of the rates that were."""
    # Less than it, for what is rounded.
    return float(f"{_next(shares, wanted, guess, 0.9 * math.log1p(tolerance)):.4g}")


def _next(shares: Mapping[float, float], wanted: float, guess: float, room: float) -> float:
    low, high = bracket(shares, wanted)
    if low is None and high is None:
        return guess
    if high is None:
        return max(shares) * STEP ** len(shares) ** 2
    if low is None:
        return min(shares) / STEP ** len(shares) ** 2
    place = _crossing(shares, wanted, low, high)
    if place - math.log(low) < room:
        return low * math.exp(room)
    if math.log(high) - place < room:
        return high / math.exp(room)
    return math.exp(place + room / 2)


def estimate(shares: Mapping[float, float], wanted: float) -> float | None:
    """The highest rate, where two that were measured enclose it."""
    low, high = bracket(shares, wanted)
    # By rounding it could lie below a rate that was sustained.
    return None if low is None or high is None else max(low, math.exp(_crossing(shares, wanted, low, high)))


@dataclass(kw_only=True)
class RateSearch:
    """The highest rate that one plan sustains, run by run."""

    wanted: float
    """Share of requests that keep their limits, at a rate that is sustained."""
    guess: float
    tolerance: float = 0.03
    """Between two rates that differ by no more it is found."""
    most: int
    """Rates that are tried at most."""
    lowest: float = 3.75
    """How many times lower than the guess one is tried, while none is sustained."""
    shares: dict[float, float] = field(default_factory=dict)
    """By the rates that were tried."""

    @classmethod
    def of(cls, arrivals: Arrivals, *, near: float | None = None) -> Self:
        """As arrivals with `slo_attainment` ask for it: from their rate on, or from one that it is thought to be near,
        a quarter of theirs or 16 times as high at most. Down to a quarter of theirs, since lower ones take longer."""
        wanted, first = arrivals.slo_attainment, arrivals.request_rate
        assert wanted is not None
        assert first is not None
        lowest = first / cls.lowest
        guess = first if near is None else min(max(near, lowest), _FURTHEST * first, HIGHEST_RATE)
        return cls(wanted=wanted, guess=guess, most=arrivals.most_rates, lowest=guess / lowest)

    @classmethod
    def simulated(cls, wanted: float, *, guess: float, tolerance: float) -> Self:
        """One whose runs cost nothing: it goes on until the rate is found, however low that is."""
        return cls(wanted=wanted, guess=guess, tolerance=tolerance, most=_MOST_SIMULATED, lowest=_HIGHEST)

    def run(self, share_at: Callable[[float], float]) -> float:
        """The highest rate, by runs that cost nothing: each gives the share at a rate."""
        while (rate := self.next()) is not None:
            self.shares[rate] = share_at(rate)
        return self.highest

    def next(self) -> float | None:
        """The rate to measure next; None where it is known, or no run is left; or where none is sustained, down to the
        lowest."""
        is_hopeless = bool(self.shares) and (
            self.sustained >= self.guess * _HIGHEST
            or (not self.sustained and min(self.shares) <= self.guess / self.lowest)
        )
        if self.is_narrow or is_hopeless or len(self.shares) >= self.most:
            return None
        rate = next_rate(self.shares, self.wanted, guess=self.guess, tolerance=self.tolerance)
        rate = rate if self.sustained else max(rate, float(f"{self.guess / self.lowest:.4g}"))
        return None if rate in self.shares or rate > HIGHEST_RATE else rate

    @property
    def is_narrow(self) -> bool:
        """Whether two rates enclose it as narrowly as is asked for."""
        low, high = bracket(self.shares, self.wanted)
        return low is not None and high is not None and high <= low * (1 + self.tolerance)

    @property
    def sustained(self) -> float:
        """The highest rate that was tried and sustained; 0 where none was."""
        return bracket(self.shares, self.wanted)[0] or 0.0

    @property
    def highest(self) -> float:
        """The rate, or the highest one that was sustained where no two enclose it; 0 where none was."""
        return estimate(self.shares, self.wanted) or self.sustained


def _crossing(shares: Mapping[float, float], wanted: float, low: float, high: float) -> float:
    drop = shares[low] - shares[high]
    # Few of them say nothing of where they began to fall; all of them only that it was no earlier.
    place = (shares[low] - wanted) / drop if drop > 0 and shares[high] > wanted / 2 else 0.5
    if shares[low] == 1.0 and shares[high] > wanted / 2:
        place = (1 + place) / 2
    return math.log(low) + place * (math.log(high) - math.log(low))
