"""Where to look next for the highest rate that a plan sustains, by the shares of requests that kept their limits.

A share falls steeply near that rate. Between the highest rate that was sustained and the lowest that was not, the next
one is where a line through the two shares, over the logarithm of the rate, crosses the share that is wanted; or in the
middle, where one of them is of a rate far beyond it.
"""

import math
from collections.abc import Mapping

STEP = 1.25
"""Factor to go on by while all rates, or none, were sustained; its square behind the second one, and so on."""
_EDGE = 0.2
"""A rate that lies so near to one of two, as a share of the way between them, tells little."""


def bracket(shares: Mapping[float, float], wanted: float) -> tuple[float | None, float | None]:
    """The highest rate up to which all were sustained, and the lowest that was not; None where there is none."""
    low = high = None
    for rate in sorted(shares):
        if shares[rate] < wanted:
            high = rate
            break
        low = rate
    return low, high


def next_rate(shares: Mapping[float, float], wanted: float, *, guess: float) -> float:
    """The rate to measure next; `shares` are those of the rates that were."""
    low, high = bracket(shares, wanted)
    if low is None and high is None:
        return guess
    if high is None:
        return max(shares) * STEP ** len(shares)
    if low is None:
        return min(shares) / STEP ** len(shares)
    return math.exp(_crossing(shares, wanted, low, high, edge=_EDGE))


def estimate(shares: Mapping[float, float], wanted: float) -> float | None:
    """The highest rate, where two that were measured enclose it."""
    low, high = bracket(shares, wanted)
    # By rounding it could lie below a rate that was sustained.
    return None if low is None or high is None else max(low, math.exp(_crossing(shares, wanted, low, high, edge=0.0)))


def _crossing(shares: Mapping[float, float], wanted: float, low: float, high: float, *, edge: float) -> float:
    drop = shares[low] - shares[high]
    # Few of them say nothing of where they began to fall.
    place = (shares[low] - wanted) / drop if drop > 0 and shares[high] > wanted / 2 else 0.5
    place = min(max(place, edge), 1 - edge)
    return math.log(low) + place * (math.log(high) - math.log(low))
