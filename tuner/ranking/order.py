"""Which of the measured plans comes first: the finals' order, of a tie what takes least, of a front its knee.

The knee is the point that bulges farthest from the plane through the front's ends: before it much of one objective is
gained for little of another, behind it the other way round; so it is what to take for those who gave no weights. Das
1999, "On characterizing the 'knee' of the Pareto curve based on normal-boundary intersection", Structural Optimization
18, 107-115.
"""

import math
from collections.abc import Sequence

import numpy as np

from pipetune.tuner.ranking.elimination import MARGIN, MIN_ROUNDS, State
from pipetune.tuner.ranking.values import Objective, Row

_FEWEST_POINTS = 3
"""Two points are both ends of their front: nothing lies between them."""
_FLAT = 1e-9
_SAME_MEMORY = 0.05
"""A difference of so much of it is none."""


def costs_of(row: Row, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Less is better; a metric that is missing is worst."""
    return tuple(
        objective.cost(row.metrics[objective.metric]) if objective.metric in row.metrics else math.inf
        for objective in objectives
    )


def ordered(rows: Sequence[Row], objectives: Sequence[Objective], state: State | None) -> tuple[list[Row], str | None]:
    """The rows, best first, and why the first is what is recommended where its value alone does not say so."""
    several = len(objectives) > 1

    def place(row: Row) -> tuple[bool, bool, bool, tuple[float, ...], str]:
        behind = several and not row.on_front
        return not row.feasible, not row.in_finals, behind, costs_of(row, objectives), row.key

    found = sorted(rows, key=place)
    ranked = [row for row in found if row.feasible and not row.unranked_because]
    chosen, because = _knee(ranked, objectives) if several else _least_of_tied(ranked, state)
    if chosen is not None:
        found.remove(chosen)
        found.insert(0, chosen)
    return found, because


def _least_of_tied(ranked: Sequence[Row], state: State | None) -> tuple[Row | None, str | None]:
    """The plan that takes least among those tied with the fastest and measured within the margin of it. Fewer devices,
    then less memory on the fullest (differences below about 5 % are none), then the earlier rank."""
    fastest = ranked[0] if ranked else None
    if state is None or fastest is None or state.rounds < MIN_ROUNDS:
        return None, None
    gains = ((row, state.ratio(fastest.key, row.key)) for row in ranked if row.in_finals)
    pool = [row for row, gain in gains if gain and not gain.is_told and gain.value - 1 <= MARGIN]

    def takes(row: Row) -> tuple[int, int]:
        memory = max(1.0, row.metrics.get("peak_memory_bytes", 1.0))
        return len(row.plan.devices), round(math.log(memory) / _SAME_MEMORY)

    chosen = min(pool, key=takes, default=fastest)
    if chosen is fastest:
        return None, None
    fewer = takes(chosen)[0] < takes(fastest)[0]
    return chosen, (
        f"{chosen.plan.describe()} is recommended: not told apart from the fastest, measured within "
        f"{100 * MARGIN:.0f} % of it, and {'on fewer devices' if fewer else 'with less memory'}"
    )


def _knee(ranked: Sequence[Row], objectives: Sequence[Objective]) -> tuple[Row | None, str | None]:
    """The knee of the front; where plans are confirmed, the confirmed one that bulges most. The whole front gives the
    scale, so that which plans came into the finals does not move it."""
    best = pareto_front([row for row in ranked if row.in_finals] or ranked, objectives)
    pool = [row for row in ranked if row.key in best]
    points = [*pool, *(row for row in ranked if row.on_front and row.key not in best)]
    if (found := bulges([costs_of(row, objectives) for row in points])) is None:
        return None, None
    chosen = pool[max(range(len(pool)), key=lambda index: found[index])]
    ends = "line" if len(objectives) == 2 else "plane"
    return chosen, (
        f"{chosen.plan.describe()} is the knee of {len(points)} plans on the Pareto front, farthest from the {ends} "
        "through its ends"
    )


def bulges(costs: Sequence[Sequence[float]]) -> tuple[float, ...] | None:
    """How far each point, a row with a column for each objective, lies before the plane through the best points of each
    objective, towards the ideal; None where there are too few points, or none of them bulges. Less is better, no value
    is infinite, and every objective is scaled to the range that the points span."""
    table = np.asarray(costs, dtype=float)
    if len(table) < _FEWEST_POINTS or table.shape[1] < 2:
        return None
    span = np.ptp(table, axis=0)
    table = (table - table.min(axis=0)) / np.where(span > 0, span, 1.0)
    table = table[:, span > 0]
    if table.shape[1] < 2:
        return None
    ends = table[np.argmin(table, axis=0)]
    normal = even = np.ones(ends.shape[1])
    if np.linalg.matrix_rank(ends) == ends.shape[1]:
        solved = np.linalg.solve(ends, even)
        # Of the plane through the ends; of the even plane where they span none that faces the ideal.
        normal = solved if (solved > 0).all() else even
    normal = normal / np.linalg.norm(normal)
    distances = (ends @ normal).mean() - table @ normal
    return tuple(map(float, distances)) if distances.max() > _FLAT else None


def pareto_front(rows: Sequence[Row], objectives: Sequence[Objective]) -> frozenset[str]:
    """Keys of the rows that no other dominates."""
    costs = {row.key: costs_of(row, objectives) for row in rows}

    def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return frozenset(key for key, own in costs.items() if not any(dominates(cost, own) for cost in costs.values()))
