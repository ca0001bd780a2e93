"""Which of the measured plans comes first: the finals' order, of a tie what takes least, of a front its knee."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipetune.tuner.ranking.elimination import MARGIN, MIN_ROUNDS, State
from pipetune.tuner.ranking.knee import bulges
from pipetune.tuner.ranking.values import Objective, Row

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
    finals = [*state.active, *state.behind] if state and not several else []
    places = {key: place for place, key in enumerate(finals)}
    found = sorted(
        rows,
        key=lambda row: (
            not row.feasible,
            not row.confirmed,
            not row.on_front if several else False,
            places.get(row.key, len(places)),
            costs_of(row, objectives),
            row.key,
        ),
    )
    ranked = [row for row in found if row.feasible and not row.unranked_because]
    chosen, because = _knee(ranked, objectives) if several else _least_of_tied(ranked, state)
    if chosen is not None:
        found.remove(chosen)
        found.insert(0, chosen)
    return found, because


def _least_of_tied(ranked: Sequence[Row], state: State | None) -> tuple[Row | None, str | None]:
    """The plan that takes least among those tied with the fastest and measured within the margin of it.

    Fewer devices, then less memory on the fullest (differences below about 5 % are none), then the earlier rank.
    """
    if state is None or state.kind == "separated" or state.rounds < MIN_ROUNDS:
        return None, None
    near = {gap.rival for gap in state.gaps if gap.rival in state.active and abs(gap.share) <= MARGIN}
    pool = [row for row in ranked if row.key == state.incumbent or row.key in near]

    def takes(row: Row) -> tuple[int, int]:
        memory = max(1.0, row.metrics.get("peak_memory_bytes", 1.0))
        return len(row.plan.devices), round(math.log(memory) / _SAME_MEMORY)

    chosen = min(pool, key=takes, default=None)
    if chosen is None or chosen.key == state.incumbent:
        return None, None
    fewer = takes(chosen)[0] < takes(pool[0])[0]
    return chosen, (
        f"{chosen.plan.describe()} is recommended: not told apart from the fastest, measured within "
        f"{100 * MARGIN:.0f} % of it, and {'on fewer devices' if fewer else 'with less memory'}"
    )


def _knee(ranked: Sequence[Row], objectives: Sequence[Objective]) -> tuple[Row | None, str | None]:
    """The knee of the front; where plans are confirmed, the confirmed one that bulges most.

    The whole front gives the scale, so that which plans came into the finals does not move it.
    """
    confirmed = [row for row in ranked if row.confirmed]
    best = pareto_front(confirmed or ranked, objectives)
    pool = [row for row in ranked if row.key in best]
    points = [*pool, *(row for row in ranked if row.on_front and row.key not in best)]
    found = bulges([costs_of(row, objectives) for row in points])
    if found is None:
        return None, None
    chosen = pool[max(range(len(pool)), key=lambda index: found[index])]
    ends = "line" if len(objectives) == 2 else "plane"
    return chosen, (
        f"{chosen.plan.describe()} is the knee of {len(points)} plans on the Pareto front, farthest from the {ends} "
        "through its ends"
    )


def pareto_front(rows: Sequence[Row], objectives: Sequence[Objective]) -> frozenset[str]:
    """Keys of the rows that no other dominates."""
    costs = {row.key: costs_of(row, objectives) for row in rows}

    def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return frozenset(key for key, own in costs.items() if not any(dominates(cost, own) for cost in costs.values()))
