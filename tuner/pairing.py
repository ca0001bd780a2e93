"""What interleaved rounds say: gains within a round, and whether the best plan is told apart from the second."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from tuner.pooling import Run, chosen_runs, measured_spread, searched_runs
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


def gain_over(objective: Objective, ours: Sequence[Run], theirs: Sequence[Run]) -> Ratio | None:
    """How many times better ours is: over common rounds, else by the medians of the search; None without either.

    A machine may be in another mood during the finals than it was during the search, so a value of the one is never
    set against a value of the other where that can be helped.
    """
    our_rounds, their_rounds = by_round(ours, objective), by_round(theirs, objective)
    gains = [
        gain
        for number in sorted(our_rounds.keys() & their_rounds.keys())
        if (gain := objective.gain(our_rounds[number], their_rounds[number])) is not None
    ]
    if gains:
        return Ratio(value=statistics.median(gains), low=min(gains), high=max(gains), rounds=len(gains))
    sides = [searched_runs(ours), searched_runs(theirs)]
    if not all(sides):
        sides = [chosen_runs(ours), chosen_runs(theirs)]
    our_spread, their_spread = (measured_spread(side, objective.metric) for side in sides)
    if our_spread is None or their_spread is None:
        return None
    gain = objective.gain(our_spread.median, their_spread.median)
    return None if gain is None else Ratio(value=gain)


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
        odds = 2 ** (len(common) - 1)
        text = (
            f"{names[0]} beat {names[1]} in all {len(common)} interleaved rounds "
            f"(of two equal plans one would do so 1 time in {odds})"
        )
    else:
        text = f"tie within noise: {names[0]} won {sum(won)} of {len(common)} rounds against {names[1]}"
    separated = len(common) >= MIN_ROUNDS and all(won)
    return Separation(separated=separated, text=text, wins=sum(won), rounds=len(common))
