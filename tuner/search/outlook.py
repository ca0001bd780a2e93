"""What the refitted model makes of the plans that may come next, and of those that ran: costs, chances, how surely.

Predicting thousands of plans takes longer than a step of the search may. So all are looked at whenever the observations
have doubled, and between that the most promising of them: what these are depends on the records alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from bench.spec import EffectivePlan, Plan
from tuner.config import Constraint
from tuner.planning.cost import CostModel
from tuner.planning.observation import Observation
from tuner.planning.predictor import Predictor
from tuner.search.acquisition import Floats, chance_kept, log_cost, ranges, tchebycheff
from tuner.search.candidates import Candidate
from tuner.search.history import History, PlanHistory, kinds_of
from tuner.search.resolver import Resolver
from tuner.search.space import Point, SearchSpace

Bools = npt.NDArray[np.bool_]

SHORTLIST, OF_EACH_KIND = 300, 12
MEMORY_METRICS = ("peak_memory_bytes", "peak_memory_fraction")
"""The cost model does not predict them: they follow from the accounting."""
_MEMORY_SD = 0.05
_STAND_IN, _STAND_IN_SD = "duration_s", 0.3
"""Of an objective that nothing predicts: what is faster is likelier to be better in it, too."""
_RATES = ("output_throughput", "total_token_throughput")
"""Predicted in any case, to be shown."""
_HOPELESS = 0.02
"""Plans that keep the constraints with less probability come last."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outlook:
    """Plans in order: the candidates looked at, then what ran and is none of them."""

    effective: tuple[EffectivePlan, ...]
    points: tuple[Point | None, ...]
    """None for what ran and is no candidate."""
    is_open: Bools
    """Whether a candidate may be proposed: it is new, and needs less than what ran out of memory."""
    was_measured: Bools
    costs: Floats
    """`[plan, objective]`, logs, less is better."""
    sds: Floats
    kept: Floats
    """Probability that every constraint is kept; of what ran, whether it is."""
    works: Floats
    """Probability that a run ends in a measurement; of use for comparing plans."""
    mean: Mapping[str, Floats]
    relative_sd: Mapping[str, Floats]
    predictor: Predictor

    @property
    def noise(self) -> float:
        """Relative standard deviation of a repeated run."""
        return self.predictor.noise

    @property
    def num_objectives(self) -> int:
        return self.costs.shape[1]

    @cached_property
    def _ranges(self) -> tuple[Floats, Floats]:
        return ranges(self.costs)

    @cached_property
    def _scaled(self) -> tuple[Floats, Floats]:
        least, spans = self._ranges
        return (self.costs - least) / spans, self.sds / spans

    def margin(self, weights: Floats | None) -> float:
        """The noise of a run, in the cost that `scalar` makes."""
        return self.noise if weights is None else self.noise * float(np.linalg.norm(weights / self._ranges[1]))

    def scalar(self, weights: Floats | None) -> tuple[Floats, Floats]:
        """One cost of each plan and its deviation; of a single objective the log itself.

        Args:
            weights: of the objectives; None for a single one.
        """
        return (self.costs[:, 0], self.sds[:, 0]) if weights is None else tchebycheff(*self._scaled, weights)

    def worth(self, cost: Floats) -> Floats:
        """What a run of each plan promises, doubt left aside: less where it may fail or break a constraint."""
        value: Floats = np.exp(np.min(cost) - cost) * self.kept * self.works
        return value

    def leader(self, cost: Floats) -> int | None:
        """Place of the best plan that was measured and keeps the constraints, its luck smoothed out by the model."""
        among = self.was_measured & (self.kept > 0.5)
        return int(np.argmin(np.where(among, cost, np.inf))) if among.any() else None

    def predicted(self, place: int) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of one plan, and their relative deviations."""
        return (
            {name: float(values[place]) for name, values in self.mean.items()},
            {name: float(values[place]) for name, values in self.relative_sd.items()},
        )


class Lookout:
    """Makes outlooks of histories."""

    def __init__(
        self,
        space: SearchSpace,
        model: CostModel,
        resolve: Resolver,
        candidates: Sequence[Candidate],
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint],
        prior: Sequence[Observation] = (),
    ) -> None:
        self._space, self._model, self._resolve = space, model, resolve
        self._candidates = tuple(candidates)
        self._objectives, self._constraints = tuple(objectives), tuple(constraints)
        self._prior = tuple(prior)
        self._keys = [candidate.effective.key for candidate in candidates]
        self._kinds = [kinds_of(candidate.effective.plan, len(space.devices)) for candidate in candidates]
        known = set(model.predict(*_pair(candidates[0].effective)).metrics) if candidates else set()
        wanted = dict.fromkeys((*self._objectives, *(limit.metric for limit in constraints), _STAND_IN, *_RATES))
        self.is_blind = any(name not in known and name not in MEMORY_METRICS for name in objectives)
        """Whether nothing predicts one of the objectives."""
        self._predicted = tuple(name for name in wanted if name in known)
        self._accounted = tuple(name for name in wanted if name in MEMORY_METRICS)
        self._needed: dict[str, dict[str, int]] = {}
        self._orders: dict[int, tuple[tuple[int, ...], ...]] = {}
        """By the number of observations, a power of two."""
        self._last: tuple[int, Predictor] | None = None

    @property
    def num_candidates(self) -> int:
        return len(self._candidates)

    def works(self, effective: EffectivePlan, history: History) -> float:
        """Probability that a run ends in a measurement; of use for comparing plans."""
        return history.chance_to_work(effective.plan) * self._chance_to_fit(effective, history)

    def predict(self, history: History, effective: EffectivePlan) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of one plan after these records, and their relative deviations."""
        found = self._predictor(history).predict([_pair(effective)])
        return (
            {name: float(values[0]) for name, values in found.mean.items()},
            {name: float(values[0]) for name, values in found.relative_sd.items()},
        )

    def forget(self) -> None:
        """Forgets what was made of other records."""
        self._orders.clear()
        self._last = None

    def needed(self, effective: EffectivePlan) -> dict[str, int]:
        """Accounted bytes by device."""
        key = effective.key
        if key not in self._needed:
            self._needed[key] = self._resolve.needed_bytes(effective)
        return self._needed[key]

    def look(self, history: History) -> Outlook:
        """What is to be thought of plans after these records."""
        predictor = self._predictor(history)
        count = len(history.observations)
        doubled = 1 << (count.bit_length() - 1) if count else 0
        if doubled not in self._orders:
            then = predictor if doubled == count else self._fit(history.observations[:doubled])
            self._orders[doubled] = self._order(then)
        return self._view(predictor, history, self._shortlist(self._orders[doubled], history))

    def _predictor(self, history: History) -> Predictor:
        count = len(history.observations)
        if self._last is None or self._last[0] != count:
            self._last = (count, self._fit(history.observations))
        return self._last[1]

    def _fit(self, observations: Sequence[Observation]) -> Predictor:
        return Predictor.fit(self._model, [*self._prior, *observations], metrics=self._predicted)

    def _order(self, predictor: Predictor) -> tuple[tuple[int, ...], ...]:
        """For each objective, all candidates from the best on, those last that hardly keep the constraints."""
        nothing = History(self._space, self._resolve)
        view = self._view(predictor, nothing, range(len(self._candidates)))
        return tuple(
            tuple(np.lexsort((view.costs[:, index], view.kept < _HOPELESS)).tolist())
            for index in range(view.num_objectives)
        )

    def _shortlist(self, orders: Sequence[Sequence[int]], history: History) -> list[int]:
        """Candidates that ran, and the most promising open ones: of all, and of each kind."""
        known = set(history.plans)
        chosen = {index for index, key in enumerate(self._keys) if key in known}
        for order in orders:
            room, kinds = SHORTLIST // len(orders), Counter[object]()
            for index in order:
                lacking = [kind for kind in self._kinds[index] if kinds[kind] < OF_EACH_KIND]
                if (room <= 0 and not lacking) or not self._is_open(index, history):
                    continue
                chosen.add(index)
                room -= 1
                kinds.update(self._kinds[index])
        return sorted(chosen)

    def _is_open(self, index: int, history: History) -> bool:
        if not history.is_open(self._keys[index]):
            return False
        return self._chance_to_fit(self._candidates[index].effective, history) > 0

    def _chance_to_fit(self, effective: EffectivePlan, history: History) -> float:
        return history.chance_to_fit(self.needed(effective)) if history.out_of_memory else 1.0

    def _view(self, predictor: Predictor, history: History, places: Sequence[int]) -> Outlook:
        """The outlook on some candidates, and on all else that was measured."""
        keys = [self._keys[index] for index in places]
        others = {
            key: known
            for key, known in history.plans.items()
            if known.runs and known.effective is not None and key not in set(keys)
        }
        effective = [self._candidates[index].effective for index in places]
        effective += [known.effective for known in others.values() if known.effective is not None]
        runs = [history.plans.get(key) for key in (*keys, *others)]
        found = predictor.predict([_pair(one) for one in effective])
        mean, sd = dict(found.mean), dict(found.relative_sd)
        for name in self._accounted:
            mean[name] = self._accounted_metric(name, effective, runs)
            sd[name] = np.full(len(effective), _MEMORY_SD)
        costs, sds = self._costs(mean, sd, runs, predictor.noise)
        return Outlook(
            effective=tuple(effective),
            points=(*(self._candidates[index].point for index in places), *([None] * len(others))),
            is_open=np.array([*(self._is_open(index, history) for index in places), *([False] * len(others))], bool),
            was_measured=np.array([self._is_measured(known) for known in runs], dtype=bool),
            costs=costs,
            sds=sds,
            kept=self._kept(mean, sd, runs),
            works=np.array([self.works(one, history) for one in effective]),
            mean=mean,
            relative_sd=sd,
            predictor=predictor,
        )

    def _is_measured(self, known: PlanHistory | None) -> bool:
        return known is not None and all(known.value(name) is not None for name in self._objectives)

    def _costs(
        self,
        mean: Mapping[str, Floats],
        sd: Mapping[str, Floats],
        runs: Sequence[PlanHistory | None],
        noise: float,
    ) -> tuple[Floats, Floats]:
        """What is predicted; of plans that ran without teaching the model anything, what was measured."""
        costs, sds = [], []
        for name in self._objectives:
            if name not in mean:
                costs.append(log_cost(_STAND_IN, mean[_STAND_IN]))
                sds.append(np.full_like(mean[_STAND_IN], _STAND_IN_SD))
                continue
            values, deviations = mean[name].copy(), sd[name].copy()
            for place, known in enumerate(runs):
                value = known.value(name) if known is not None else None
                if known is not None and value is not None and (not known.observed or name in self._accounted):
                    values[place], deviations[place] = value, noise / math.sqrt(len(known.runs))
            costs.append(log_cost(name, values))
            sds.append(deviations)
        return np.stack(costs, axis=1), np.stack(sds, axis=1)

    def _kept(self, mean: Mapping[str, Floats], sd: Mapping[str, Floats], runs: Sequence[PlanHistory | None]) -> Floats:
        kept = np.ones(len(runs))
        for limit in self._constraints:
            if limit.metric in mean:
                kept *= chance_kept(limit, mean[limit.metric], sd[limit.metric])
        for place, known in enumerate(runs):
            if known is not None and known.runs:
                values = [(limit, known.value(limit.metric)) for limit in self._constraints]
                kept[place] = float(all(value is not None and limit.excess(value) <= 0 for limit, value in values))
        return kept

    def _accounted_metric(
        self, name: str, effective: Sequence[EffectivePlan], runs: Sequence[PlanHistory | None]
    ) -> Floats:
        """Memory by the accounting, times what the measured plans needed of it."""
        values = np.array([self._account(name, one) for one in effective])
        ratios = []
        for place, known in enumerate(runs):
            value = known.value(name) if known is not None else None
            if value and values[place] > 0:
                ratios.append(value / values[place])
        return values * float(np.median(ratios)) if ratios else values

    def _account(self, name: str, effective: EffectivePlan) -> float:
        needed = self.needed(effective)
        if name == "peak_memory_bytes":
            return float(max(needed.values()))
        fractions = _fractions(effective.plan)
        return max(need / (fractions[device] * self._resolve.device_bytes[device]) for device, need in needed.items())


def _fractions(plan: Plan) -> dict[str, float]:
    """Share of each device's memory that its stage may take."""
    return {
        device: stage.memory_fraction
        for replica in range(plan.replicas)
        for device, stage in zip(plan.replica(replica).devices, plan.stages, strict=True)
    }


def _pair(effective: EffectivePlan) -> tuple[Plan, int]:
    return effective.plan, effective.in_flight
