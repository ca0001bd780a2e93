"""Lets a strategy loose on the record factory's machine, record by record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipetune.bench.record import Failure, FailureKind, Measurement, Outcome, Record
from pipetune.bench.spec import EffectivePlan, Plan
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.policy.strategy import Strategy
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.search_log import Proposal, Stop
from tests.record_factory import make_measurement, make_record

World = Callable[[Plan, int], Outcome]
"""What a plan gives, run as record number so-and-so."""


def make_strategy(
    built: tuple[SearchSpace, CostModel, Resolver], *, n_trials: int = 20, stop_early: bool = True, **options: Any
) -> Strategy:
    """A strategy over a space, with no TPE unless given."""
    options = {"objectives": ("output_throughput",), "constraints": (), "seed": 0, **options}
    options.setdefault("suggest", lambda is_new: None)
    return Strategy(*built, n_trials=n_trials, stop_early=stop_early, **options)


def as_measured(plan: Plan, number: int) -> Measurement:
    """The machine that the cost model of the record factory's shape knows roughly."""
    return make_measurement(plan, seed=number, hop_s=1e-3)


def trial(space: SearchSpace, resolve: Resolver, step: Proposal, number: int, world: World = as_measured) -> Record:
    """The record of a proposal."""
    plan = space.plan(step.point)
    resolved = resolve(plan)
    result = world(plan, number) if isinstance(resolved, EffectivePlan) else resolved
    record = make_record(number, "trial", plan, result, trial_number=number)
    effective = resolved if isinstance(resolved, EffectivePlan) else None
    return record.model_copy(update={"params": dict(step.point), "effective": effective})


def play(
    strategy: Strategy,
    built: tuple[SearchSpace, CostModel, Resolver],
    *,
    world: World = as_measured,
    before: Sequence[Record] = (),
    most: int = 60,
) -> tuple[list[Record], list[Proposal], Stop | None]:
    """Runs what is proposed until the strategy stops, or for so many trials."""
    space, _, resolve = built
    records, steps = list(before), list[Proposal]()
    for _ in range(most):
        step = strategy.next(records)
        if isinstance(step, Stop):
            return records, steps, step
        steps.append(step)
        records.append(trial(space, resolve, step, len(records), world))
    return records, steps, None


def failed(kind: FailureKind, **fields: Any) -> Failure:
    """A failure of that kind."""
    return Failure(kind=kind, message=kind.value, **fields)
