"""The finals: the best plans and the baseline measured again, side by side, so that luck no longer chooses.

The best of many noisy trials looks better than it is. In each round every contender runs once, in random order, so
that a machine that slows down slows all of them alike.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from bench.record import Record
from bench.spec import EffectivePlan, Protocol
from tuner.standings import Ranking

_ROOM_FOR_THE_OTHER = 3
BASELINE = "baseline"
"""Stands in a schedule for the un-pipelined model; all other entries are keys of effective plans."""


def choose(ranking: Ranking, count: int, *, min_stages: int = 1) -> tuple[EffectivePlan, ...]:
    """The best plans that keep the constraints and the bounds of the search; the single stage may lie outside these.

    Of three or more places the last goes to the best pipeline where all others went to replicas, or the other way
    round: which of the two ways is better is then told by common rounds.
    """
    rows = [row for row in ranking.rows if row.feasible and len(row.plan.stages) >= min_stages]
    chosen, left = rows[:count], rows[count:]
    there = {row.plan.replicas > 1 for row in chosen if len(row.plan.devices) > 1}
    other = next((row for row in left if len(row.plan.devices) > 1 and (row.plan.replicas > 1) not in there), None)
    if other is not None and len(chosen) >= _ROOM_FOR_THE_OTHER:
        chosen[-1] = other
    return tuple(row.effective for row in chosen)


def side_by_side(protocol: Protocol) -> Protocol:
    """One timed repetition a round; the output was checked when the plan was first measured."""
    return protocol.model_copy(update={"num_iters": 1, "check_outputs": False})


def schedule(
    contenders: Sequence[str], *, rounds: int, seed: int, done: Collection[tuple[int, str]] = (), first_round: int = 0
) -> tuple[tuple[int, str], ...]:
    """Rounds of all contenders, each in an order of its own.

    Args:
        done: what was measured before an interruption; it is left out, the order of the rest stays.
        first_round: number of the first round.

    Returns:
        `(round, contender)` in the order to run.
    """
    order = []
    for round_ in range(first_round, first_round + rounds):
        rng = random.Random(f"{seed}-{round_}")
        order += [(round_, contender) for contender in rng.sample(contenders, len(contenders))]
    return tuple(entry for entry in order if entry not in done)


def finished(records: Sequence[Record]) -> tuple[int, frozenset[tuple[int, str]]]:
    """What of the finals is done.

    Finals that began before the last trial chose among fewer plans: they count as done, and new rounds follow theirs.

    Returns:
        The first round of the finals to run, and what of it was measured already.
    """
    last_trial = max((record.number for record in records if record.role == "trial"), default=-1)
    finals = [record for record in records if record.role == "finalist" and record.round is not None]
    first_round = max((record.round + 1 for record in finals if record.number < last_trial), default=0)  # type: ignore[operator]
    return first_round, frozenset(
        (record.round, record.effective.key if record.effective else BASELINE)
        for record in finals
        if record.round is not None and record.round >= first_round
    )
