"""Records as Optuna's trials, and back to points: out of memory is infeasible, and what failed otherwise is a failure.

Out of memory is a broken constraint of graded amount, then PRUNED: so TPE learns where the edge is. Every told trial
carries every constraint, in one order. What failed for another reason is FAIL, which TPE passes over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipetune.bench import metrics
from pipetune.bench.record import Failure, FailureKind, Measurement, Outcome, Record
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.search.space.resolver import overrun
from pipetune.tuner.search.space.space import Point, SearchSpace

MEMORY_CONSTRAINT = "memory"
INFEASIBLE = frozenset({FailureKind.OVER_MEMORY_CAP, FailureKind.OUT_OF_MEMORY})


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The dimensions of a space, as Optuna describes them."""
    return {name: IntDistribution(low, high, log=log) for name, (low, high, log) in space.dimensions().items()}


def point_of_trial(trial: FrozenTrial) -> Point:
    """The point that a trial runs; empty for one that only keeps the count."""
    return {name: int(value) for name, value in trial.params.items()}


class TrialCodec:
    """Trials of one space under one set of objectives and constraints."""

    def __init__(self, space: SearchSpace, objectives: Sequence[str], constraints: Sequence[Constraint]) -> None:
        self._objectives, self._constraints = tuple(objectives), tuple(constraints)
        self._distributions = distributions(space)
        # Cuts are kept with a trial, and TPE goes by the rank beside them.
        self._cut = IntDistribution(1, max(2, sum(space.partitions[0]) - 1))

    def running(self, point: Point, attributes: Mapping[str, str]) -> FrozenTrial:
        """A trial that begins."""
        return self._trial(TrialState.RUNNING, None, {}, point, attributes)

    def finished(self, record: Record | None, attributes: Mapping[str, str]) -> FrozenTrial:
        """A trial made of a record; a failed one, which keeps the count, where there is none."""
        if record is None or not record.params:
            return self._trial(TrialState.FAIL, None, {}, {}, attributes)
        return self._trial(*self.outcome(record.result), record.params, attributes)

    def outcome(self, result: Outcome) -> tuple[TrialState, list[float] | None, dict[str, float]]:
        """State, values of the objectives, and amounts of the constraints; above zero is broken."""
        if isinstance(result, Failure):
            if result.kind not in INFEASIBLE:
                return TrialState.FAIL, None, {}
            return TrialState.PRUNED, None, self._amounts(overrun(result), {})
        assert isinstance(result, Measurement)
        derived = metrics.derive(result)
        if any(name not in derived for name in self._objectives):
            return TrialState.FAIL, None, {}
        return TrialState.COMPLETE, [derived[name] for name in self._objectives], self._amounts(0.0, derived)

    def _amounts(self, memory: float, derived: Mapping[str, float]) -> dict[str, float]:
        """Every constraint in one order; what was not measured breaks nothing by itself."""
        amounts = {MEMORY_CONSTRAINT: memory}
        for constraint in self._constraints:
            value = derived.get(constraint.metric)
            amounts[str(constraint)] = 0.0 if value is None else constraint.excess(value)
        return amounts

    def _trial(
        self,
        state: TrialState,
        values: list[float] | None,
        constraints: Mapping[str, float],
        params: Mapping[str, int | float | str],
        attributes: Mapping[str, str],
    ) -> FrozenTrial:
        return create_trial(
            state=state,
            values=values,
            params=dict(params),
            distributions={name: self._distributions.get(name, self._cut) for name in params},
            constraints=dict(constraints),
            user_attrs=dict(attributes),
        )
