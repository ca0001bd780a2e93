"""Where a series of nights changed its level: Pettitt's rank test, segment by segment.

In a stretch of n values with ranks r, U_k = 2 · Σ_{i<=k} r_i - k · (n + 1) is far from 0 where the values up to k differ from
those after it, and K = max |U_k| over all k (Pettitt 1979, Applied Statistics 28, 126-135). Its p value is counted over
random orders of the stretch, so that ties and short series are no special case. A stretch that has changed is split there,
and both parts are looked at again (binary segmentation: Scott and Knott 1974, Biometrics 30, 507-512).

One stray night changes no level: ranks hold it down, and a level lasts `LEAST_NIGHTS` nights at least.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

LEAST_NIGHTS = 3
ALPHA = 0.01
"""Of each stretch that is looked at."""
_ORDERS = 9999
_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangePoint:
    """A new level."""

    index: int
    """Of the first value at the new level."""
    p: float
    before: float
    """Median of the stretch before."""
    after: float
    """Median from there on to the next change."""


def change_points(values: Sequence[float], *, alpha: float = ALPHA) -> tuple[ChangePoint, ...]:
    """All changes of level, in order.

    Args:
        values: in order of time, all finite.
    """
    found = dict(_split(np.asarray(values, dtype=float), 0, alpha))
    edges = [0, *sorted(found), len(values)]
    levels = [statistics.median(values[first:end]) for first, end in zip(edges, edges[1:], strict=False) if end > first]
    return tuple(
        ChangePoint(index=index, p=found[index], before=levels[place], after=levels[place + 1])
        for place, index in enumerate(sorted(found))
    )


def _split(values: npt.NDArray[np.float64], offset: int, alpha: float) -> list[tuple[int, float]]:
    count = values.size
    if count < 2 * LEAST_NIGHTS:
        return []
    ranks = rankdata(values)
    largest, place = _largest(ranks[None, :])
    lots = np.random.default_rng(_SEED)
    orders = lots.permuted(np.tile(ranks, (_ORDERS, 1)), axis=1)
    # The order that was seen is one of all orders, so that p is never 0 (Phipson and Smyth 2010).
    p = float(1 + np.sum(_largest(orders)[0] >= largest[0] - 1e-9)) / (_ORDERS + 1)
    if p > alpha:
        return []
    cut = int(place[0])
    return [
        *_split(values[:cut], offset, alpha),
        (offset + cut, p),
        *_split(values[cut:], offset + cut, alpha),
    ]


def _largest(ranks: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """K of each row, and how many values lie before the change."""
    count = ranks.shape[1]
    steps = np.arange(1, count + 1)
    sums = np.abs(2 * np.cumsum(ranks, axis=1) - steps * (count + 1))
    allowed = sums[:, LEAST_NIGHTS - 1 : count - LEAST_NIGHTS]
    return allowed.max(axis=1), allowed.argmax(axis=1) + LEAST_NIGHTS
