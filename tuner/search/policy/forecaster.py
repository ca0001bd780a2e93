"""Makes forecasts: which plans to look at, what the refitted model says of them, and what was measured beside it.

Predicting thousands of plans takes longer than a step of the search may. So all are looked at whenever the observations
have doubled, and between that the most promising of them: what these are depends on the records alone. Where the space
does not list all partitions, the best ones by the refitted model join them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipetune.bench.spec import EffectivePlan, Plan
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.calibration.predictor import PredictedMetrics, Predictor
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.policy.acquisition import Floats, chance_kept, log_cost
from pipetune.tuner.search.policy.forecast import Forecast
from pipetune.tuner.search.policy.history import History, PlanHistory, kinds_of
from pipetune.tuner.search.policy.refine import Refiner
from pipetune.tuner.search.space.candidates import Candidate, candidates
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace

SHORTLIST, OF_EACH_KIND = 300, 12
REFINED_CLASSES, REFINEMENTS = 2, 24
"""Pairs of layout and sizes for which partitions are sought that the space does not list, and how many for each."""
MEMORY_METRICS = ("peak_memory_bytes", "peak_memory_fraction")
"""The cost model does not predict them: they follow from the accounting."""
_MEMORY_SD = 0.05
_PROXY, _PROXY_SD = "duration_s", 0.3
"""The metric that serves for an objective that nothing predicts: what is faster is likelier to be better in it, too."""
_RATES = ("output_throughput", "total_token_throughput")
"""Predicted in any case, to be shown."""
_HOPELESS = 0.02
"""Plans that keep the constraints with less probability come last."""


class Forecaster:
    """Makes forecasts of histories."""

    def __init__(
        self,
        space: SearchSpace,
        model: CostModel,
        resolve: Resolver,
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint],
        prior: Sequence[Observation] = (),
    ) -> None:
        self._space, self._model, self._resolve = space, model, resolve
        self._candidates = candidates(space, resolve)
        self._refiner = Refiner(space, resolve)
        self._objectives, self._constraints = tuple(objectives), tuple(constraints)
        self._prior = tuple(prior)
        self._keys = [candidate.effective.key for candidate in self._candidates]
        self._kinds = [kinds_of(one.effective.plan, len(space.devices)) for one in self._candidates]
        known = set(model.predict(*_pair(self._candidates[0].effective)).metrics) if self._candidates else set()
        wanted = dict.fromkeys((*self._objectives, *(limit.metric for limit in constraints), _PROXY, *_RATES))
        self.is_blind = any(name not in known and name not in MEMORY_METRICS for name in objectives)
        """Whether nothing predicts one of the objectives."""
        self._predicted = tuple(name for name in wanted if name in known)
        self._accounted = tuple(name for name in wanted if name in MEMORY_METRICS)
        self._needed: dict[str, dict[str, int]] = {}
        self._orders: dict[int, tuple[tuple[int, ...], ...]] = {}
        """Candidates from the best on for each objective, by the number of observations, a power of two."""
        self._last: tuple[int, Predictor] | None = None

    @property
    def num_candidates(self) -> int:
        """How many plans a search may choose among, further partitions apart."""
        return len(self._candidates)

    def needed(self, effective: EffectivePlan) -> dict[str, int]:
        """Accounted bytes by device."""
        key = effective.key
        if key not in self._needed:
            self._needed[key] = self._resolve.needed_bytes(effective)
        return self._needed[key]

    def works(self, effective: EffectivePlan, history: History) -> float:
        """Probability that a run ends in a measurement; of use for comparing plans."""
        fits = history.chance_to_fit(self.needed(effective)) if history.out_of_memory else 1.0
        return fits * history.chance_to_work(effective.plan) if fits else 0.0

    def predict(self, history: History, effective: EffectivePlan) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of one plan after these records, and their relative deviations."""
        return self._predictor(history).predict([_pair(effective)]).of(0)

    def forget(self) -> None:
        """Forgets what was made of other records."""
        self._orders.clear()
        self._last = None

    def look(self, history: History) -> Forecast:
        """What is to be thought of plans after these records."""
        predictor = self._predictor(history)
        count = len(history.observations)
        doubled = 1 << (count.bit_length() - 1) if count else 0
        if doubled not in self._orders:
            then = predictor if doubled == count else self._fit(history.observations[:doubled])
            self._orders[doubled] = self._order(then)
        chosen = [self._candidates[index] for index in self._shortlist(self._orders[doubled], history)]
        metrics = self._predict(predictor, [one.effective for one in chosen])
        if count:
            further = self._refine(predictor.model, chosen, metrics, history)
            metrics = metrics.joined(self._predict(predictor, [one.effective for one in further]))
            chosen += further
        keys = {one.effective.key for one in chosen}
        others = [
            known.effective
            for key, known in history.plans.items()
            if known.runs and known.effective is not None and key not in keys
        ]
        metrics = metrics.joined(self._predict(predictor, others))
        return self._forecast(predictor, history, chosen, others, metrics)

    def _predictor(self, history: History) -> Predictor:
        count = len(history.observations)
        if self._last is None or self._last[0] != count:
            self._last = (count, self._fit(history.observations))
        return self._last[1]

    def _fit(self, observations: Sequence[Observation]) -> Predictor:
        return Predictor.fit(self._model, [*self._prior, *observations], metrics=self._predicted)

    def _predict(self, predictor: Predictor, effective: Sequence[EffectivePlan]) -> PredictedMetrics:
        """What is predicted and accounted of plans, whatever ran."""
        found = predictor.predict([_pair(one) for one in effective])
        mean, sd = dict(found.mean), dict(found.relative_sd)
        for name in self._accounted:
            mean[name] = np.array([self._account(name, one) for one in effective])
            sd[name] = np.full(len(effective), _MEMORY_SD)
        return replace(found, mean=mean, relative_sd=sd)

    def _order(self, predictor: Predictor) -> tuple[tuple[int, ...], ...]:
        """For each objective, all candidates from the best on, those last that hardly keep the constraints."""
        metrics = self._predict(predictor, [one.effective for one in self._candidates])
        hopeless = self._chance_kept(metrics) < _HOPELESS
        costs = [self._cost(name, metrics)[0] for name in self._objectives]
        return tuple(tuple(np.lexsort((cost, hopeless)).tolist()) for cost in costs)

    def _shortlist(self, orders: Sequence[Sequence[int]], history: History) -> list[int]:
        """Candidates that ran, and the most promising open ones: of all, and of each kind."""
        chosen = {index for index, key in enumerate(self._keys) if key in history.plans}
        for order in orders:
            room, kinds = SHORTLIST // len(orders), Counter[object]()
            for index in order:
                lacking = any(kinds[kind] < OF_EACH_KIND for kind in self._kinds[index])
                if (room <= 0 and not lacking) or not self._is_open(self._candidates[index], history):
                    continue
                chosen.add(index)
                room -= 1
                kinds.update(self._kinds[index])
        return sorted(chosen)

    def _refine(
        self, model: CostModel, chosen: Sequence[Candidate], metrics: PredictedMetrics, history: History
    ) -> list[Candidate]:
        """Partitions that the space does not list, for the devices and sizes of the most promising candidates."""
        further: dict[str, Candidate] = {}
        kept = self._chance_kept(metrics)
        for name in self._objectives:
            cost = self._cost(name, metrics)[0]
            classes: set[object] = set()
            for place in np.lexsort((cost, kept < _HOPELESS)).tolist():
                kind = self._refiner.class_of(chosen[place])
                if kind in classes:
                    continue
                classes.add(kind)
                if len(classes) > max(1, REFINED_CLASSES // len(self._objectives)):
                    break
                if self._refiner.is_whole(chosen[place]):
                    continue
                for candidate in self._refiner.best(chosen[place], model, limit=REFINEMENTS):
                    further.setdefault(candidate.effective.key, candidate)
        known = set(self._keys)
        return [one for key, one in further.items() if key not in known and self._is_open(one, history)]

    def _is_open(self, candidate: Candidate, history: History) -> bool:
        return history.is_open(candidate.effective.key) and self.works(candidate.effective, history) > 0

    def _forecast(
        self,
        predictor: Predictor,
        history: History,
        chosen: Sequence[Candidate],
        others: Sequence[EffectivePlan],
        metrics: PredictedMetrics,
    ) -> Forecast:
        """Puts what was measured beside what is predicted."""
        effective = [*(one.effective for one in chosen), *others]
        runs = [history.plans.get(one.key) for one in effective]
        metrics = self._scaled_memory(metrics, runs)
        costs, sds = self._costs(metrics, runs, predictor.noise)
        return Forecast(
            effective=tuple(effective),
            points=(*(one.point for one in chosen), *([None] * len(others))),
            is_open=np.array([*(self._is_open(one, history) for one in chosen), *([False] * len(others))], dtype=bool),
            was_measured=np.array([self._is_measured(known) for known in runs], dtype=bool),
            costs=costs,
            sds=sds,
            kept=self._kept(metrics, runs),
            works=np.array([self.works(one, history) for one in effective]),
            metrics=metrics,
            predictor=predictor,
        )

    def _is_measured(self, known: PlanHistory | None) -> bool:
        return known is not None and all(known.value(name) is not None for name in self._objectives)

    def _cost(self, name: str, metrics: PredictedMetrics) -> tuple[Floats, Floats]:
        """Cost of one objective, as predicted, with its deviation."""
        if name not in metrics.mean:
            proxy = metrics.mean[_PROXY]
            return log_cost(_PROXY, proxy), np.full_like(proxy, _PROXY_SD)
        return log_cost(name, metrics.mean[name]), metrics.relative_sd[name].copy()

    def _costs(
        self, metrics: PredictedMetrics, runs: Sequence[PlanHistory | None], noise: float
    ) -> tuple[Floats, Floats]:
        """What is predicted; of plans that ran without teaching the model anything, what was measured."""
        costs, sds = [], []
        for name in self._objectives:
            cost, sd = self._cost(name, metrics)
            for place, known in enumerate(runs):
                value = known.value(name) if known is not None else None
                if known is None or value is None or name not in metrics.mean:
                    continue
                if not known.observed or name in self._accounted:
                    cost[place] = float(log_cost(name, np.array(value)))
                    sd[place] = noise / math.sqrt(len(known.runs))
            costs.append(cost)
            sds.append(sd)
        return np.stack(costs, axis=1), np.stack(sds, axis=1)

    def _chance_kept(self, metrics: PredictedMetrics) -> Floats:
        kept = np.ones(len(metrics.mean[_PROXY]))
        for limit in self._constraints:
            if limit.metric in metrics.mean:
                kept *= chance_kept(limit, metrics.mean[limit.metric], metrics.relative_sd[limit.metric])
        return kept

    def _kept(self, metrics: PredictedMetrics, runs: Sequence[PlanHistory | None]) -> Floats:
        kept = self._chance_kept(metrics)
        for place, known in enumerate(runs):
            if known is not None and known.runs:
                values = [(limit, known.value(limit.metric)) for limit in self._constraints]
                kept[place] = float(all(value is not None and limit.excess(value) <= 0 for limit, value in values))
        return kept

    def _scaled_memory(self, metrics: PredictedMetrics, runs: Sequence[PlanHistory | None]) -> PredictedMetrics:
        """Memory by the accounting, times what the measured plans needed of it."""
        mean = dict(metrics.mean)
        for name in self._accounted:
            ratios = []
            for place, known in enumerate(runs):
                value = known.value(name) if known is not None else None
                if value and mean[name][place] > 0:
                    ratios.append(value / mean[name][place])
            mean[name] = mean[name] * (float(np.median(ratios)) if ratios else 1.0)
        return replace(metrics, mean=mean)

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
