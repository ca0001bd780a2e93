"""Shares of requests within limits, the search for a rate, and intervals by bootstrap. Pure."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipetune.bench.metrics import percentile

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


def interval(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float] = statistics.median, *, seed: int = 0
) -> tuple[float | None, float | None]:
    """Of 95 %, by percentile bootstrap; none of fewer than three values."""
    if len(values) < 3:
        return None, None
    source = random.Random(seed)
    drawn = [statistic(source.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return percentile(drawn, 0.025), percentile(drawn, 0.975)
