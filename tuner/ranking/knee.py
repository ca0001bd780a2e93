"""The knee of a Pareto front: the point that bulges farthest from the plane through the front's ends.

Das 1999, "On characterizing the 'knee' of the Pareto curve based on normal-boundary intersection", Structural
Optimization 18, 107-115. Before the knee much of one objective is gained for little of another, behind it the other way
round; so it is what to take for those who gave no weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEWEST_POINTS = 3
"""Two points are both ends of their front: nothing lies between them."""
_FLAT = 1e-9


def bulges(costs: Sequence[Sequence[float]]) -> tuple[float, ...] | None:
    """How far each point lies before the plane through the best points of each objective, towards the ideal.

    Every objective is scaled to the range that the points span.

    Args:
        costs: a row for each point, a column for each objective; less is better, and no value is infinite.

    Returns:
        One distance a point; None where there are too few points, or none of them bulges.
    """
    table = np.asarray(costs, dtype=float)
    if len(table) < FEWEST_POINTS or table.shape[1] < 2:
        return None
    span = np.ptp(table, axis=0)
    table = (table - table.min(axis=0)) / np.where(span > 0, span, 1.0)
    table = table[:, span > 0]
    if table.shape[1] < 2:
        return None
    ends = table[np.argmin(table, axis=0)]
    normal = _normal(ends)
    distances = (ends @ normal).mean() - table @ normal
    return tuple(map(float, distances)) if distances.max() > _FLAT else None


def _normal(ends: np.ndarray) -> np.ndarray:
    """Unit normal of the plane through the ends; of the even plane where they span none that faces the ideal."""
    even = np.ones(ends.shape[1])
    normal = even
    if np.linalg.matrix_rank(ends) == ends.shape[1]:
        solved = np.linalg.solve(ends, even)
        normal = solved if (solved > 0).all() else even
    return normal / np.linalg.norm(normal)
