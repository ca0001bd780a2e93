"""The finals: the best plans and the baseline measured again, side by side, until luck no longer chooses.

The best of many noisy trials looks better than it is; so those take part that the refitted model thinks best, which
has smoothed luck out. In each round every finalist runs once, in random order, so that a machine that slows down
slows all of them alike. Rounds go on until the fastest is told apart from the others, or a tie is declared:
`tuner.ranking.elimination` has the statistics. Plans that fell behind take no part in further rounds.

All that is here is a function of the records: a study that was stopped anywhere goes on with the run that was due.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipetune.bench.record import Measurement, Record
from pipetune.bench.spec import EffectivePlan, Protocol
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.ranking.elimination import State, decide
from pipetune.tuner.ranking.knee import bulges
from pipetune.tuner.ranking.order import costs_of
from pipetune.tuner.ranking.rank import rank, why_broken
from pipetune.tuner.ranking.rounds import last_finals, log_costs
from pipetune.tuner.ranking.runs import PlanRun, medians_of
from pipetune.tuner.ranking.values import Objective, Ranking, Row

_ROOM_FOR_THE_OTHER = 3
BASELINE = "baseline"
"""Stands for the un-pipelined model; all other names are keys of effective plans."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finalists:
    """Who takes part in a finals."""

    plans: tuple[EffectivePlan, ...]
    """Empty: there is no finals."""
    baseline_batch_size: int | None
    """None where no baseline was measured."""

    def plan(self, key: str) -> EffectivePlan:
        """The finalist of that key."""
        return next(effective for effective in self.plans if effective.key == key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """The run that comes next."""

    name: str
    """Key of an effective plan, or `BASELINE`."""
    round: int
    """Number in the record, which counts on over all finals of a study."""
    shown_round: int
    """Number within these finals, from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalsResult:
    """What the finals found."""

    kind: Literal["separated", "tie", "front", "alone", "none"]
    """`front`: of several objectives no single one can tell plans apart. `alone`: one finalist was left, or there was
    but one; `none`: not even one."""
    incumbent: str | None
    tied: tuple[str, ...]
    """Keys of the plans that are not told apart from the incumbent."""
    rounds: int
    text: str


def choose(
    records: Sequence[Record],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    *,
    count: int,
    min_stages: int = 1,
    preferred: Sequence[str] = (),
) -> Finalists:
    """Who takes part in the finals that follow the last trial; the same whether none or some of its rounds are done.

    Args:
        preferred: keys of plans, best first, that go before all others where there is one objective; before them go
            those that ran in these finals already, so that what was learnt in between changes nothing.
    """
    _, own = last_finals(records)
    ran = dict.fromkeys(record.effective.key for record in own if record.effective is not None)
    ranking = rank(before_finals(records), objectives, constraints)
    return Finalists(
        plans=_best(ranking, count, min_stages, tuple(dict.fromkeys((*ran, *preferred)))),
        baseline_batch_size=ranking.baseline.batch_size if ranking.baseline else None,
    )


def before_finals(records: Sequence[Record]) -> list[Record]:
    """Without the finals that follow the last trial."""
    _, own = last_finals(records)
    numbers = {record.number for record in own}
    return [record for record in records if record.number not in numbers]


def _best(ranking: Ranking, count: int, min_stages: int, preferred: Sequence[str]) -> tuple[EffectivePlan, ...]:
    """The best plans that keep the constraints and the bounds of the search; the single stage may lie outside these.

    Of three or more places the last goes to the best pipeline where all others went to replicas, or the other way
    round: which of the two ways is better is then told by common rounds. Of several objectives' front those around its
    knee are taken.
    """
    rows = [row for row in ranking.rows if row.feasible and len(row.plan.stages) >= min_stages]
    if len(ranking.objectives) > 1:
        return tuple(row.effective for row in _knee_first(rows, ranking.objectives)[:count])
    places = {key: place for place, key in enumerate(preferred)}
    rows.sort(key=lambda row: places.get(row.key, len(places)))
    chosen, left = rows[:count], rows[count:]
    there = {row.plan.replicas > 1 for row in chosen if len(row.plan.devices) > 1}
    other = next((row for row in left if len(row.plan.devices) > 1 and (row.plan.replicas > 1) not in there), None)
    if other is not None and len(chosen) >= _ROOM_FOR_THE_OTHER:
        chosen[-1] = other
    return tuple(row.effective for row in chosen)


def _knee_first(rows: Sequence[Row], objectives: Sequence[Objective]) -> list[Row]:
    """The front by how far it bulges, then the rest as ranked."""
    front = [row for row in rows if row.on_front]
    found = bulges([costs_of(row, objectives) for row in front])
    if found is not None:
        order = sorted(range(len(front)), key=lambda index: -found[index])
        front = [front[index] for index in order]
    return [*front, *(row for row in rows if not row.on_front)]


def next_step(
    records: Sequence[Record],
    finalists: Finalists,
    *,
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint] = (),
    min_rounds: int,
    max_rounds: int,
    seed: int,
) -> Due | FinalsResult:
    """The run that is due, or what the finals found.

    With one objective, rounds go on until the fastest plan is told apart from all others, until those left are surely
    within a practical margin of it, or until `max_rounds`. A plan that falls behind after `min_rounds`, breaks a
    constraint by the medians of so many rounds, or fails twice, leaves. With several objectives each finalist gets
    `min_rounds`. The baseline takes part in every round.

    Args:
        records: all of the study.
        finalists: who takes part in these finals.
        seed: of the order within each round.
    """
    first_round, own = last_finals(records)
    by_name: dict[str, list[Record]] = {effective.key: [] for effective in finalists.plans}
    if finalists.baseline_batch_size is not None:
        by_name[BASELINE] = []
    for record in own:
        name = record.effective.key if record.effective else BASELINE
        if name in by_name:
            by_name[name].append(record)
    cells = {
        name: log_costs(group, first_round, objectives[0])
        for name, group in by_name.items()
        if name == BASELINE or not _is_broken(group, constraints, min_rounds)
    }
    several = len(objectives) > 1
    state = decide(
        cells,
        min_rounds=min_rounds,
        max_rounds=min_rounds if several else max_rounds,
        controls={BASELINE} & set(cells),
    )
    if state.kind == "open":
        order = random.Random(f"{seed}-{first_round + state.rounds}").sample(sorted(cells), len(cells))
        return Due(
            name=next(name for name in order if name in state.due),
            round=first_round + state.rounds,
            shown_round=state.rounds,
        )
    return _outcome(state, records, objectives, constraints, rounds=(min_rounds, max_rounds))


def _is_broken(group: Sequence[Record], constraints: Sequence[Constraint], enough: int) -> bool:
    runs = [PlanRun(record, record.result) for record in group if isinstance(record.result, Measurement)]
    if len(runs) < enough:
        return False
    values = medians_of(runs)
    return any(why_broken(constraint, values) for constraint in constraints)


def _outcome(
    state: State,
    records: Sequence[Record],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    *,
    rounds: tuple[int, int],
) -> FinalsResult:
    ranking = rank(records, objectives, constraints, rounds)
    text = ranking.separation.text
    if ranking.recommended_because:
        text += f"; {ranking.recommended_because}"
    if state.kind in ("none", "open"):
        text = "no finalist is left: each failed twice or breaks a constraint"
    several = len(objectives) > 1 and state.kind != "none"
    assert state.kind != "open"
    return FinalsResult(
        kind="front" if several else state.kind,
        incumbent=state.incumbent,
        tied=() if several else state.active[1:],
        rounds=state.rounds,
        text=text,
    )


def side_by_side(protocol: Protocol) -> Protocol:
    """One timed repetition a round; the output was checked when the plan was first measured."""
    return protocol.model_copy(update={"num_iters": 1, "check_outputs": False})
