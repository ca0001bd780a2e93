"""What interleaved rounds say: gains within a round, and whether the best plan is told apart from the second."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from tuner.pooling import Run
from tuner.standings import Objective, Ratio, Row, Separation

MIN_ROUNDS = 3
"""Rounds below which winning every one of them separates nothing."""


def by_round(runs: Sequence[Run], objective: Objective) -> dict[int, float]:
    """The objective's median in each interleaved round in which the plan was measured."""
    values_of: dict[int, list[float]] = {}
    for run in runs:
        if run.confirms and run.record.round is not None and objective.metric in run.metrics:
            values_of.setdefault(run.record.round, []).append(run.metrics[objective.metric])
    return {number: statistics.median(values) for number, values in values_of.items()}


def gain_over(
    objective: Objective,
    ours: Sequence[Run],
    our_value: float | None,
    theirs: Sequence[Run],
    their_value: float | None,
) -> Ratio | None:
    """How many times better ours is: over their common rounds, else by the two medians; None where neither is there."""
    our_rounds, their_rounds = by_round(ours, objective), by_round(theirs, objective)
    gains = [
        gain
        for number in sorted(our_rounds.keys() & their_rounds.keys())
        if (gain := objective.gain(our_rounds[number], their_rounds[number])) is not None
    ]
    if gains:
        return Ratio(value=statistics.median(gains), low=min(gains), high=max(gains), rounds=len(gains))
    if our_value is None or their_value is None or (gain := objective.gain(our_value, their_value)) is None:
        return None
    return Ratio(value=gain)


def separation_of(ranked: Sequence[Row], plans: Mapping[str, Sequence[Run]], objective: Objective) -> Separation:
    """Best against second by their common rounds: separated only when the best won every one of them."""
    if not ranked:
        return Separation(separated=False, text="no plan has a rank")
    if len(ranked) == 1:
        return Separation(separated=False, text="only one plan was ranked, there is no second to compare with")
    best, second = ranked[:2]
    names = [f"{row.plan.describe()} · {row.effective.in_flight} in flight" for row in (best, second)]
    ours, theirs = (by_round(plans[row.key], objective) for row in (best, second))
    common = sorted(ours.keys() & theirs.keys())
    won = [objective.cost(ours[number]) < objective.cost(theirs[number]) for number in common]
    if not common:
        text = f"{names[0]} is not told apart from {names[1]}: the two were not measured side by side"
        return Separation(separated=False, text=text)
    if len(common) < MIN_ROUNDS:
        text = f"{names[0]} is not told apart from {names[1]}: {len(common)} common rounds are too few"
    elif all(won):
        text = f"{names[0]} beat {names[1]} in all {len(common)} interleaved rounds"
    else:
        text = f"tie within noise: {names[0]} won {sum(won)} of {len(common)} rounds against {names[1]}"
    separated = len(common) >= MIN_ROUNDS and all(won)
    return Separation(separated=separated, text=text, wins=sum(won), rounds=len(common))
