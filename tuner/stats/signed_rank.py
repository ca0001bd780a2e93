"""Wilcoxon's signed-rank test of paired differences, exact whatever ties there are, and the shift that belongs to it.

Under the null hypothesis every difference is as likely to be `d` as `-d`. Where the two sides of each pair run in
randomised order, that holds of two equal sides by design, whatever the machine's noise is and however it drifts from
pair to pair; no distribution of the noise is assumed. The test of a shift (`above`, `below`) further assumes that a
true shift adds to the logarithm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri
from scipy.stats import rankdata


def above(differences: Sequence[float], shift: float = 0.0) -> float:
    """p of the one-sided test that the differences are larger than `shift`.

    P(W >= w), W being the sum of the ranks of |d - shift| that positive differences have, over all 2^n signs
    (Wilcoxon 1945, Biometrics Bulletin 1, 80-83). Ties share the mean of their ranks; differences that are exactly the
    shift are ranked and then count for neither side (Pratt 1959, JASA 54, 655-667). The distribution is counted out, by
    adding one rank after the other, so that it is exact with ties as well.

    Args:
        differences: at least one, all finite.

    Returns:
        The p value; 1.0 where all differences are exactly the shift.
    """
    moved = np.asarray(differences, dtype=float) - shift
    assert moved.size > 0, "there is a difference"
    assert bool(np.isfinite(moved).all()), "differences are finite"
    doubled = np.rint(2 * rankdata(np.abs(moved))).astype(int)
    reached = int(doubled[moved > 0].sum())
    ways = np.zeros(int(doubled[moved != 0].sum()) + 1)
    ways[0] = 1.0
    for rank in doubled[moved != 0]:
        ways[rank:] = ways[rank:] + ways[:-rank]
    return float(ways[reached:].sum() / ways.sum())


def below(differences: Sequence[float], shift: float) -> float:
    """p of the one-sided test that the differences are smaller than `shift`; as `above`."""
    return above([-one for one in differences], -shift)


def least_p(pairs: int) -> float:
    """The least p that so many pairs can give: all differences on one side."""
    return 2.0**-pairs


def hodges_lehmann(values: Sequence[float]) -> float:
    """Median of the means of all pairs, a value with itself among them (Hodges and Lehmann 1963, AMS 34, 598-611)."""
    return float(np.median(_pair_means(values)))


def interval(differences: Sequence[float], level: float) -> tuple[float, float]:
    """The shifts that two signed-rank tests at (1 - level) / 2 each do not exclude.

    Their ends are order statistics of the means of all pairs (Hollander, Wolfe and Chicken 2014, Nonparametric
    Statistical Methods, section 3.3). Differences too few for the level give the whole line.
    """
    means = np.sort(_pair_means(differences))
    outside = int(np.searchsorted(_tail(len(differences)), (1 - level) / 2, side="right"))
    return (-math.inf, math.inf) if outside == 0 else (float(means[outside - 1]), float(means[-outside]))


def noise_floor(differences: Sequence[float], pairs: int, alpha: float = 0.01) -> float:
    """What two equal sides may seem to differ by after so many pairs, once in 1/alpha gates, in the noise of these.

    The standard error of the Hodges-Lehmann shift is read off its own 80 % interval, which a few astray pairs do not
    widen, and carried over to `pairs` pairs by the root of their number.
    """
    low, high = interval(differences, 0.8)
    error = (high - low) / 2 / float(ndtri(0.9))
    return float(ndtri(1 - alpha)) * error * math.sqrt(len(differences) / pairs)


def _pair_means(values: Sequence[float]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=float)
    first, second = np.triu_indices(array.size)
    means: npt.NDArray[np.float64] = (array[first] + array[second]) / 2
    return means


@functools.lru_cache
def _tail(count: int) -> npt.NDArray[np.float64]:
    """P(W <= w) of so many values without ties, for w = 0, 1, …"""
    ways = np.ones(1)
    for rank in range(1, count + 1):
        ways = np.concatenate([ways, np.zeros(rank)]) + np.concatenate([np.zeros(rank), ways])
    tail: npt.NDArray[np.float64] = np.cumsum(ways) / 2.0**count
    return tail
