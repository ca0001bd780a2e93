"""The finals: the best plans and the baseline measured again, side by side, until luck no longer chooses.

The best of many noisy trials looks better than it is; so those take part that the refitted model thinks best, which
has smoothed luck out. In each round every finalist runs once, in random order, so that a machine that slows down
slows all of them alike. Rounds go on until the fastest is told apart from the others, those left are surely within a
practical margin of it, or `max_rounds` are over: `tuner.ranking.elimination` has the statistics.

All that is here is a function of the records: a study that was stopped anywhere goes on with the run that was due.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pipetune.bench.record import Record
from pipetune.bench.spec import EffectivePlan, Protocol
from pipetune.tuner.config.schema import Constraint, SpaceConfig
from pipetune.tuner.ranking.elimination import decide
from pipetune.tuner.ranking.order import bulges, costs_of
from pipetune.tuner.ranking.rank import rank, why_broken
from pipetune.tuner.ranking.runs import BASELINE, Finals, PlanRun, last_finals
from pipetune.tuner.ranking.values import Objective, Row

_ROOM_FOR_THE_OTHER = 3
_UNBOUND = SpaceConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class Finalists:
    """Who takes part in a finals."""

    plans: tuple[EffectivePlan, ...]
    """Those that compete; empty: there is no finals."""
    single_stage: EffectivePlan | None = None
    """Our runtime without a pipeline, or another engine at its defaults, where it may not be best: it runs in every
    round and competes with nobody."""
    baseline_batch_size: int | None
    """None where no baseline was measured."""

    def plan(self, key: str) -> EffectivePlan:
        """The finalist of that key."""
        return next(effective for effective in (*self.plans, self.single_stage) if effective and effective.key == key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """The run that comes next."""

    name: str
    """Key of an effective plan, or `BASELINE`."""
    round: int
    """Number in the record, which counts on over all finals of a study."""
    shown_round: int
    """Number within these finals, from 0."""


def choose(
    records: Sequence[Record],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    *,
    count: int,
    space: SpaceConfig = _UNBOUND,
    preferred: Sequence[str] = (),
    served: bool = False,
) -> Finalists:
    """Who takes part in the finals that follow the last trial; the same whether none or some of its rounds are done.

    Plans that keep the constraints and the bounds of the search. Of three or more places the last goes to the best
    pipeline where all others went to replicas, or the other way round: which of the two ways is better is then told by
    common rounds. Of several objectives' front those around its knee are taken. The single stage, or what another
    engine does by itself, takes part beside them, so that what is gained is told by the same rounds; not where it has
    missed the first of them, as in finals from before it did. Preferred keys of plans, best first, go before all others
    where there is one objective; before them go those that ran in these finals already, so that what was learnt in
    between changes nothing. Where finals are `served`, another engine's plans take part by its HTTP server, and the
    baseline, which is in process, does not.
    """
    first_round, own = last_finals(records)
    effectives = [record.effective for record in own if record.effective is not None]
    ran = [one.key for effective in effectives for one in (effective, effective.by(served=False))]
    ranking = rank(before_finals(records), objectives, constraints, space=space)
    single = ranking.engine_default.row if ranking.engine_default else ranking.single_stage
    rows = [row for row in ranking.rows if row.feasible and row is not single]
    if len(objectives) > 1:
        rows = _knee_first(rows, objectives)[:count]
    else:
        places = {key: place for place, key in enumerate(dict.fromkeys((*ran, *preferred)))}
        rows.sort(key=lambda row: places.get(row.key, len(places)))
        rows, left = rows[:count], rows[count:]
        there = {row.plan.replicas > 1 for row in rows if len(row.plan.devices) > 1}
        other = next((row for row in left if len(row.plan.devices) > 1 and (row.plan.replicas > 1) not in there), None)
        if other is not None and len(rows) >= _ROOM_FOR_THE_OTHER:
            rows[-1] = other
    if single and (not count or (single.key not in ran and any(run.round != first_round for run in own))):
        single = None
    if single and single.rank:
        rows.append(single)
    plans = [row.effective.by(served=True) if served else row.effective for row in rows]
    beside = single.effective if rows and single and not single.rank else None
    return Finalists(
        plans=tuple({plan.key: plan for plan in plans}.values()),
        single_stage=beside.by(served=True) if beside and served else beside,
        baseline_batch_size=ranking.baseline.batch_size if ranking.baseline and not served else None,
    )


def before_finals(records: Sequence[Record]) -> list[Record]:
    """Without the finals that follow the last trial."""
    _, own = last_finals(records)
    numbers = {record.number for record in own}
    return [record for record in records if record.number not in numbers]


def _knee_first(rows: Sequence[Row], objectives: Sequence[Objective]) -> list[Row]:
    """The front by how far it bulges, then the rest as ranked."""
    front = [row for row in rows if row.on_front]
    found = bulges([costs_of(row, objectives) for row in front]) or [0.0] * len(front)
    order = sorted(zip(found, front, strict=True), key=lambda pair: -pair[0])
    return [*(row for _, row in order), *(row for row in rows if not row.on_front)]


def next_step(
    records: Sequence[Record],
    finalists: Finalists,
    *,
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint] = (),
    space: SpaceConfig = _UNBOUND,
    min_rounds: int,
    max_rounds: int,
    seed: int,
) -> Due | str:
    """The run that is due, or what the finals found, in words.

    A plan that falls behind after `min_rounds`, breaks a constraint by the medians of so many rounds, or fails twice,
    leaves; with several objectives each finalist gets `min_rounds`. The baseline takes part in every round, whose order
    is drawn by `seed`. All records of the study are looked at.
    """
    finals = Finals([PlanRun(record) for record in records], objectives[0])
    rivals = [effective.key for effective in finalists.plans]
    controls = [finalists.single_stage.key] if finalists.single_stage else []
    controls += [BASELINE] if finalists.baseline_batch_size is not None else []
    state = decide(
        {name: finals.cells.get(name, {}) for name in (*rivals, *controls)},
        min_rounds=min_rounds,
        max_rounds=min_rounds if len(objectives) > 1 else max_rounds,
        rivals=[
            name
            for name in rivals
            if len(finals.runs(name)) < min_rounds
            or not any(why_broken(constraint, finals.values(name)) for constraint in constraints)
        ],
        controls=controls,
    )
    if state.kind == "open":
        names = sorted((*rivals, *controls))
        order = random.Random(f"{seed}-{finals.first_round + state.rounds}").sample(names, len(names))
        due = next(name for name in order if name in state.due)
        return Due(name=due, round=finals.first_round + state.rounds, shown_round=state.rounds)
    if state.kind == "none":
        return "no finalist is left: each failed twice or breaks a constraint"
    ranking = rank(records, objectives, constraints, (min_rounds, max_rounds), space=space)
    return "; ".join(text for text in (ranking.separation.text, ranking.recommended_because) if text)


def side_by_side(protocol: Protocol) -> Protocol:
    """One timed repetition a round; the output was checked when the plan was first measured."""
    return protocol.model_copy(update={"num_iters": 1, "check_outputs": False})
