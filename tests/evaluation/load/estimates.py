"""Shares of requests within limits, the search for a rate, and intervals by bootstrap. Pure."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipetune.bench.metrics import percentile
from pipetune.tuner.search import rates

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What came of one request."""

    at_s: float
    """When it was to arrive."""
    times_s: tuple[float, ...]
    """When each token was known."""
    tokens: tuple[int, ...] = ()

    @property
    def ttft_s(self) -> float:
        """From the scheduled arrival to the first token."""
        return self.times_s[0] - self.at_s

    @property
    def tpot_s(self) -> float:
        """Between tokens, on the mean; 0 of one token."""
        return (self.times_s[-1] - self.times_s[0]) / max(len(self.times_s) - 1, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a good request takes at most, in ms."""

    ttft: float
    tpot: float

    def share(self, served: Sequence[Served]) -> float:
        """The share of requests that keep both."""
        good = sum(1e3 * one.ttft_s <= self.ttft and 1e3 * one.tpot_s <= self.tpot for one in served)
        return good / len(served)


def limits_of(alone: Sequence[Sequence[Served]], *, ttft_factor: float, tpot_factor: float) -> Limits:
    """Limits from requests that ran alone on each side: a factor on the medians of the slowest one, rounded up."""
    ttft = max(statistics.median(one.ttft_s for one in served) for served in alone)
    tpot = max(statistics.median(one.tpot_s for one in served) for served in alone)
    return Limits(ttft=round_up(1e3 * ttft_factor * ttft), tpot=round_up(1e3 * tpot_factor * tpot))


def round_up(value: float) -> float:
    """To two digits, upwards."""
    step: float = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(round(value / step, 9)) * step:.6g}")


@dataclass(kw_only=True)
class RateSearch:
    """The highest rate of one side, asked for run by run as `bench --max-request-rate` does."""

    wanted: float
    guess: float
    tolerance: float = 0.03
    most: int = 8
    """Runs."""
    shares: dict[float, float] = field(default_factory=dict)

    def next(self) -> float | None:
        """The rate to measure next; None where it is known, or no run is left."""
        if self.is_narrow or len(self.shares) >= self.most:
            return None
        rate = float(f"{rates.next_rate(self.shares, self.wanted, guess=self.guess):.4g}")
        return None if rate in self.shares else rate

    def tell(self, rate: float, share: float) -> None:
        """What a run at the rate gave."""
        self.shares[rate] = share

    @property
    def is_narrow(self) -> bool:
        """Whether two rates enclose it as narrowly as is asked for."""
        low, high = rates.bracket(self.shares, self.wanted)
        return low is not None and high is not None and high <= low * (1 + self.tolerance)

    @property
    def found(self) -> float | None:
        """The rate; None as long as no two that were measured enclose it."""
        return rates.estimate(self.shares, self.wanted)

    @property
    def highest(self) -> float:
        """The rate, or the highest one that was sustained; 0 where none was."""
        return self.found or rates.bracket(self.shares, self.wanted)[0] or 0.0


def interval(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float] = statistics.median, *, seed: int = 0
) -> tuple[float | None, float | None]:
    """Of 95 %, by percentile bootstrap; none of fewer than three values."""
    if len(values) < 3:
        return None, None
    source = random.Random(seed)
    drawn = [statistic(source.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return percentile(drawn, 0.025), percentile(drawn, 0.975)
