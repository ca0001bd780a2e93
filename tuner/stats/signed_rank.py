"""Wilcoxon's signed-rank test of paired differences, exact whatever ties there are; its shift; and looks at it.

Under the null hypothesis every difference is as likely to be `d` as `-d`. Where the two sides of each pair run in
randomised order, that holds of two equal sides by design, whatever the machine's noise is and however it drifts from
pair to pair; no distribution of the noise is assumed. The test of a shift (`above`, `below`) further assumes that a
true shift adds to the logarithm.

A gate looks several times (group-sequential looks), and each look may spend some of the chance of a false alarm that
the whole gate has; the sum over looks and hypotheses is never more than that, whatever depends on what (Bonferroni).
What a look cannot use, since so few pairs cannot give so small a p, goes to the next one.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

PAIRS = (8, 12, 16, 24)
"""At which numbers of pairs a gate looks."""
FALSE_ALARM = 0.01
"""Chance that a gate whose sides are equal says FAIL, over all its hypotheses and looks."""
MISSED = 0.05
"""Chance that a gate says OK of a hypothesis that is really worse by the margin, over all its looks."""
_SHARES = (0.4, 0.2, 0.2, 0.2)
"""Shares of the chance of a false alarm, by look."""


def above(differences: Sequence[float], shift: float = 0.0) -> float:
    """p of the one-sided test that the differences are larger than `shift`.

    P(W >= w), W being the sum of the ranks of |d - shift| that positive differences have, over all 2^n signs
    (Wilcoxon 1945, Biometrics Bulletin 1, 80-83). Ties share the mean of their ranks; differences that are exactly the
    shift are ranked and then count for neither side (Pratt 1959, JASA 54, 655-667). The distribution is counted out, by
    adding one rank after the other, so that it is exact with ties as well. It is 1.0 where all differences, of which
    there is at least one and all are finite, are exactly the shift.
    """
    moved = np.asarray(differences, dtype=float) - shift
    assert moved.size > 0, "there is a difference"
    assert bool(np.isfinite(moved).all()), "differences are finite"
    _, places, counts = np.unique(np.abs(moved), return_inverse=True, return_counts=True)
    doubled = (2 * np.cumsum(counts) - counts + 1)[places]
    reached = int(doubled[moved > 0].sum())
    ways = _ways(doubled[moved != 0].tolist())
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
    """The shifts that two signed-rank tests at (1 - level) / 2 each do not exclude. Their ends are order statistics of
    the means of all pairs (Hollander, Wolfe and Chicken 2014, Nonparametric Statistical Methods, section 3.3).
    Differences too few for the level give the whole line."""
    means = np.sort(_pair_means(differences))
    outside = int(np.searchsorted(_tail(len(differences)), (1 - level) / 2, side="right"))
    return (-math.inf, math.inf) if outside == 0 else (float(means[outside - 1]), float(means[-outside]))


def noise_floor(differences: Sequence[float], pairs: int, alpha: float = 0.01) -> float:
    """What two equal sides may seem to differ by after so many pairs, once in 1/alpha gates, in the noise of these. The
    standard error of the Hodges-Lehmann shift is read off its own 80 % interval, which a few astray pairs do not widen,
    and carried over to `pairs` pairs by the root of their number."""
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
    return np.cumsum(_ways(range(1, count + 1))) / 2.0**count


def _ways(ranks: Sequence[int]) -> npt.NDArray[np.float64]:
    """How many of all signs give each sum of the positive ranks."""
    ways = np.zeros(sum(ranks) + 1)
    ways[0] = 1.0
    for rank in ranks:
        ways[rank:] = ways[rank:] + ways[:-rank]
    return ways


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One look at one hypothesis."""

    pairs: int
    alpha_fail: float
    """p up to which the look says FAIL."""
    alpha_ok: float
    """p up to which it says OK; 0 where it could not have said FAIL."""

    @property
    def can_fail(self) -> bool:
        """Whether the least p possible at this look is within its share."""
        return least_p(self.pairs) <= self.alpha_fail


def looks_for(hypotheses: int) -> tuple[Look, ...]:
    """The looks of each of so many hypotheses. OK is not corrected for their number: a gate is OK only if all its
    hypotheses are, so that one which is worse by the margin lets it be so no more often than itself
    (intersection-union; Berger 1982, Technometrics 24, 295-300)."""
    assert hypotheses >= 1
    looks, saved = [], 0.0
    for pairs, share in zip(PAIRS, _SHARES, strict=True):
        saved += FALSE_ALARM * share / hypotheses
        can_fail = least_p(pairs) <= saved
        looks.append(Look(pairs=pairs, alpha_fail=saved, alpha_ok=MISSED / len(PAIRS) if can_fail else 0.0))
        if can_fail:
            saved = 0.0
    assert any(look.can_fail for look in looks), f"{hypotheses} hypotheses are too many for {PAIRS[-1]} pairs"
    return tuple(looks)
