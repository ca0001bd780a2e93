"""How many times better one thing is than another when the two were not measured side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioEstimate:
    """A ratio of two levels."""

    value: float
    low: float | None = None
    """End of the confidence interval; None where a side has one run alone."""
    high: float | None = None


def ratio_of(ours: Sequence[float], theirs: Sequence[float], *, level: float = LEVEL) -> RatioEstimate:
    """The ratio of geometric means, with Welch's interval of the logarithms (Welch 1947, Biometrika 34, 28-35).

    The runs are taken for independent. Those of one study share a session, so the interval says what runs differ by
    and nothing of what nights do.

    Args:
        ours: at least one, all above zero; `theirs` as well.
    """
    one, other = ([math.log(value) for value in side] for side in (ours, theirs))
    difference = statistics.fmean(one) - statistics.fmean(other)
    if len(one) < 2 or len(other) < 2:
        return RatioEstimate(value=math.exp(difference))
    shares = [statistics.variance(side) / len(side) for side in (one, other)]
    if sum(shares) == 0.0:
        return RatioEstimate(value=math.exp(difference), low=math.exp(difference), high=math.exp(difference))
    freedom = sum(shares) ** 2 / sum(
        share**2 / (len(side) - 1) for share, side in zip(shares, (one, other), strict=True)
    )
    half = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(sum(shares))
    return RatioEstimate(value=math.exp(difference), low=math.exp(difference - half), high=math.exp(difference + half))
