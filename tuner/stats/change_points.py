"""Where a series of nights changed its level: circular binary segmentation, judged by random orders.

In a stretch of n values with centred scores s and sums S_k = s_1 + … + s_k, two statistics look for what does not lie
in line (Olshen, Venkatraman, Lucito and Wigler 2004, Biostatistics 5, 557-572, sections 2 and 3):

* a *step*: one level before k and another after it, Z_k = |S_k| / sqrt(k · (n - k) / n);
* a *spell*: another level from i to j, then the first again, Z_ij = |S_j - S_i| / sqrt((j - i) · (n - j + i) / n).
  A step alone would overlook a fall that was soon mended.

Each one's p is the share of random orders of the stretch with as large a maximum, and the smaller p counts twice. A
stretch that has changed is split there, and its parts are looked at again. Nothing is assumed of how the noise is
shaped, but that nights of one level might as well have come in another order. Nights that hang together, such as a
machine that is slow for a week, are changes of level to this test: `dependence` tells of them.

Scores are values cut off at three robust deviations from the median, so that one stray night cannot make a level; where
more than half of the values are equal, as bytes are, they are signs.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST_NIGHTS = 3
"""A level lasts for so many nights at least."""
ALPHA = 0.01
"""Chance of a change being seen in a series that has none."""
_CUT = 3.0
_MAD_TO_SD = 1.4826
_SEED = 0
_BATCH = 500
_ENOUGH = 10
"""Orders as extreme as what was seen, after which p is not small (Besag and Clifford 1991, Biometrika 78, 301-304)."""

Rows = npt.NDArray[np.float64]
Statistic = Callable[[Rows], tuple[Rows, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangePoint:
    """A new level."""

    index: int
    """Index of the first value at the new level."""
    p: float
    before: float
    """Median of the stretch before."""
    after: float
    """Median from there on to the next change."""


def change_points(values: Sequence[float], *, alpha: float = ALPHA) -> tuple[ChangePoint, ...]:
    """All changes of level, in order of time, as the values are, which are finite; `alpha` is that of each stretch
    that is looked at: of the whole series as long as nothing is found."""
    found = dict(_split(np.asarray(values, dtype=np.float64), 0, alpha))
    cuts = sorted(found)
    while True:
        parts = itertools.pairwise((0, *cuts, len(values)))
        levels = [float(statistics.median(values[first:end])) for first, end in parts if end > first]
        # Parts may differ in how often they stray, and not in their level.
        same = [cut for cut, (before, after) in zip(cuts, itertools.pairwise(levels), strict=True) if before == after]
        if not same:
            break
        cuts.remove(same[0])
    steps = zip(cuts, itertools.pairwise(levels), strict=True)
    return tuple(ChangePoint(index=cut, p=found[cut], before=before, after=after) for cut, (before, after) in steps)


def dependence(values: Sequence[float], changes: Sequence[ChangePoint]) -> float | None:
    """Autocorrelation from one night to the next, around the levels. None where it is no more than what nights without
    any show (1.96 / sqrt(n): Anderson 1942, Annals of Mathematical Statistics 13, 1-13), and in series of fewer than 10
    nights."""
    edges = (0, *(change.index for change in changes), len(values))
    parts = [np.asarray(values[first:end], dtype=np.float64) for first, end in itertools.pairwise(edges)]
    away = np.concatenate([part - part.mean() for part in parts if part.size] or [np.zeros(0)])
    whole = float(away @ away)
    if away.size < 10 or whole == 0.0:
        return None
    found = float(away[1:] @ away[:-1]) / whole
    return found if found > 1.96 / math.sqrt(away.size) else None


def _split(values: Rows, offset: int, alpha: float) -> list[tuple[int, float]]:
    """Where levels begin, each with its p."""
    if values.size < 2 * LEAST_NIGHTS:
        return []
    scores = _scores(values)
    for statistic in (_steps, _spells):
        largest, cuts = statistic(scores[None, :])
        p = 2 * _share_of_orders(scores, statistic, float(largest[0]), alpha) if cuts else 1.0
        if p <= alpha:
            parts = itertools.pairwise((0, *cuts, values.size))
            inner = [change for first, end in parts for change in _split(values[first:end], offset + first, alpha)]
            return [*inner, *((offset + cut, p) for cut in cuts)]
    return []


def _scores(values: Rows) -> Rows:
    """Cut off and centred; a value's score has nothing to do with its place, without which orders would not compare."""
    away = values - np.median(values)
    deviation = _MAD_TO_SD * float(np.median(np.abs(away)))
    scores = np.clip(away / deviation, -_CUT, _CUT) if deviation > 0 else np.sign(away)
    centred: Rows = scores - scores.mean()
    return centred


def _share_of_orders(scores: Rows, statistic: Statistic, seen: float, alpha: float) -> float:
    """p of a maximum; the order that was seen is one of all orders, so that it is never 0 (Phipson and Smyth 2010)."""
    draws = np.random.default_rng(_SEED)
    orders = math.ceil(2 * _ENOUGH / alpha)
    done = extreme = 0
    while done < orders and extreme < _ENOUGH:
        rows = draws.permuted(np.tile(scores, (min(_BATCH, orders - done), 1)), axis=1)
        extreme += int(np.sum(statistic(rows)[0] >= seen - 1e-9))
        done += len(rows)
    return (1 + extreme) / (1 + done)


def _steps(scores: Rows) -> tuple[Rows, tuple[int, ...]]:
    """Largest Z_k of each row, and where it lies in the first row."""
    count = scores.shape[1]
    before = np.arange(LEAST_NIGHTS, count - LEAST_NIGHTS + 1)
    sums = np.abs(np.cumsum(scores, axis=1)[:, before - 1])
    sums /= np.sqrt(before * (count - before) / count)
    return sums.max(axis=1), (int(before[sums[0].argmax()]),)


def _spells(scores: Rows) -> tuple[Rows, tuple[int, ...]]:
    """Largest Z_ij of each row, and i and j in the first row; none where there is no room for three levels."""
    count = scores.shape[1]
    largest = np.zeros(len(scores))
    cuts: tuple[int, ...] = ()
    sums = np.cumsum(scores, axis=1)[:, LEAST_NIGHTS - 1 : count - LEAST_NIGHTS]
    for length in range(LEAST_NIGHTS, sums.shape[1]):
        spells = np.abs(sums[:, length:] - sums[:, :-length]) / math.sqrt(length * (count - length) / count)
        if spells[0].max() > largest[0]:
            first = LEAST_NIGHTS + int(spells[0].argmax())
            cuts = (first, first + length)
        np.maximum(largest, spells.max(axis=1), out=largest)
    return largest, cuts
