"""What interleaved rounds say: gains within a round, and whether the best plan is told apart from the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from pipetune.bench.record import Failure, FailureKind, Measurement, Record
from pipetune.tuner.ranking.elimination import ALPHA, MIN_ROUNDS, Gap, State
from pipetune.tuner.ranking.runs import PlanRun, chosen_runs, measured_spread, searched_runs
from pipetune.tuner.ranking.values import Objective, Ratio, Row, Separation


def last_finals(records: Sequence[Record]) -> tuple[int, tuple[Record, ...]]:
    """The finals that chose among all trials; plans measured after a finals call for a new one.

    Returns:
        Number of its first round, which is behind all rounds of earlier finals, and its records.
    """
    last_trial = max(
        (record.number for record in records if record.role == "trial" and isinstance(record.result, Measurement)),
        default=-1,
    )
    finals = [record for record in records if record.role == "finalist" and record.round is not None]
    first_round = max((record.round + 1 for record in finals if record.number < last_trial), default=0)  # type: ignore[operator]
    return first_round, tuple(record for record in finals if record.number > last_trial)


def log_costs(runs: Sequence[Record], first_round: int, objective: Objective) -> dict[int, float | None]:
    """Log cost of one plan's records of a finals by round, counted from its first; None where the run failed."""
    found: dict[int, list[float]] = {}
    for record in runs:
        if record.round is None or _was_stopped(record):
            continue
        values = found.setdefault(record.round - first_round, [])
        if isinstance(record.result, Measurement):
            value = PlanRun(record, record.result).metrics.get(objective.metric, 0.0)
            if value > 0:
                values.append(-math.log(value) if objective.higher_is_better else math.log(value))
    return {number: statistics.median(values) if values else None for number, values in found.items()}


def _was_stopped(record: Record) -> bool:
    return isinstance(record.result, Failure) and record.result.kind == FailureKind.INTERRUPTED


def by_round(runs: Sequence[PlanRun], objective: Objective) -> dict[int, float]:
    """The objective's median in each interleaved round in which the plan was measured."""
    values_of: dict[int, list[float]] = {}
    for run in runs:
        if run.confirms and run.record.round is not None and objective.metric in run.metrics:
            values_of.setdefault(run.record.round, []).append(run.metrics[objective.metric])
    return {number: statistics.median(values) for number, values in values_of.items()}


def gain_over(objective: Objective, ours: Sequence[PlanRun], theirs: Sequence[PlanRun]) -> Ratio | None:
    """How many times better ours is: over common rounds, else by the medians of the search; None without either.

    A machine may drift between the search and the finals, so a value of the one is never set against a value of the
    other where that can be helped.
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


def separation_of(ranked: Sequence[Row], state: State | None, *, several: bool) -> Separation:
    """What a finals says of its fastest plan, in words.

    Args:
        ranked: the rows that keep the constraints, best first.
        state: of the last finals; None without one.
        several: whether there are several objectives.
    """
    if not ranked:
        return Separation(separated=False, text="no plan has a rank")
    if several:
        text = "of several objectives' front no plan is best in all: one is given for another"
        return Separation(separated=False, text=text)
    names = {row.key: f"{row.plan.describe()} · {row.effective.in_flight} in flight" for row in ranked}
    if len(ranked) == 1:
        return Separation(separated=False, text="only one plan was ranked, there is no second to compare with")
    incumbent = state.incumbent if state else None
    if state is None or incumbent is None or not (state.gaps or state.behind):
        both = [names[row.key] for row in ranked[:2]]
        text = f"{both[0]} is not told apart from {both[1]}: the two were not measured side by side"
        return Separation(separated=False, text=text)
    rivals = [gap for gap in state.gaps if gap.rival in state.active]
    if state.kind == "separated":
        beaten = [gap for gap in state.gaps if gap.is_behind(state.level)]
        # One that was told to be behind another incumbent may not be told to be behind this one by the rounds it had.
        nearest = min(beaten or state.gaps, key=lambda gap: gap.log_ratio)
        others = " and all other finalists" if 1 < len(beaten) == len(state.gaps) else ""
        text = (
            f"{names[incumbent]} beats {names[nearest.rival]}{others}: by {_gap_text(nearest, state.level)} over "
            f"{_rounds_text(nearest.rounds)} (two equal plans would be told apart so 1 time in {1 / ALPHA:.0f})"
        )
        return Separation(separated=True, text=text, rounds=state.rounds)
    if not rivals:
        return Separation(separated=False, text=f"{names[incumbent]} alone was left in the finals", rounds=state.rounds)
    nearest = min(rivals, key=lambda gap: abs(gap.log_ratio))
    further = f" and {len(rivals) - 1} more" if len(rivals) > 1 else ""
    told = f"{names[incumbent]} is not told apart from {names[nearest.rival]}{further}"
    if state.rounds < MIN_ROUNDS:
        text = f"{told}: {_rounds_text(nearest.rounds)} are too few"
    elif state.kind == "open":
        text = f"{told} by the {_rounds_text(state.rounds)} so far: {_gap_text(nearest, state.level)}"
    else:
        text = f"tie: {told} over {_rounds_text(state.rounds)}: {_gap_text(nearest, state.level)}"
    return Separation(separated=False, text=text, rounds=state.rounds, tied=(incumbent, *(gap.rival for gap in rivals)))


def _rounds_text(count: int) -> str:
    return f"{count} interleaved round{'' if count == 1 else 's'}"


def _gap_text(gap: Gap, level: float) -> str:
    """`3.1 % (1.9 to 4.3 %)`, with what the test leaves possible."""
    if gap.freedom == 0:
        return f"{100 * gap.share:.1f} %"
    low, high = gap.interval(level)
    return f"{100 * gap.share:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"
