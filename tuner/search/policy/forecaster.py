"""Makes forecasts: which plans to look at, what the refitted model says of them, and what was measured beside it.

Predicting thousands of plans takes longer than a step of the search may. So all are looked at whenever the observations
have doubled, and between that the most promising of them: what these are depends on the records alone. Where the space
does not list all partitions, the best ones by the refitted model join them.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.bench.spec import EffectivePlan, Plan
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.calibration.predictor import PredictedMetrics, Predictor
from pipetune.tuner.planning.simulation.load import ENOUGH, under_load
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.policy.acquisition import chance_kept, log_cost, ranges, tchebycheff
from pipetune.tuner.search.policy.history import History, PlanHistory, kinds_of
from pipetune.tuner.search.policy.refine import Refiner
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Candidate, Point, SearchSpace, candidates

Bools = npt.NDArray[np.bool_]

SHORTLIST, OF_EACH_KIND = 300, 12
REFINED_CLASSES, REFINEMENTS = 2, 24
"""Pairs of layout and sizes for which partitions are sought that the space does not list, and how many for each."""
MEMORY_METRICS = ("peak_memory_bytes", "peak_memory_fraction")
"""The cost model does not predict them: they follow from the accounting."""
_MEMORY_SD = 0.05
_PROXY_SD = 0.3
"""Log deviation of an objective that nothing predicts: what is faster is likelier to be better in it, too."""
_ALWAYS = ("duration_s", "output_throughput", "total_token_throughput")
"""Predicted in any case, to be shown."""
_SIMULATED, _FEWEST, _ROUGH = 8000, 12, 30
"""Requests that are simulated for one look under arrivals; but so many plans at least, and roughly so many requests."""
_HOPELESS = 0.02
"""Plans that keep the constraints with less probability come last."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecast:
    """What the refitted model makes of plans: the candidates looked at, then what ran and is none of them."""

    effective: tuple[EffectivePlan, ...]
    points: tuple[Point | None, ...]
    """None for what ran and is no candidate."""
    is_open: Bools
    """Whether a candidate may be proposed: it is new, and nothing that happened to plans like it rules it out."""
    was_measured: Bools
    costs: Floats
    """`[plan, objective]`, logs, less is better."""
    sds: Floats
    """`[plan, objective]`, standard deviations of the costs."""
    kept: Floats
    """Probability that every constraint is kept; 1 or 0 for what ran."""
    works: Floats
    """Probability that a run ends in a measurement; of use for comparing plans."""
    metrics: PredictedMetrics
    noise: float
    """Relative standard deviation of a repeated run."""

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
        """One cost of each plan and its deviation; the log itself, and no weights, for a single objective."""
        return (self.costs[:, 0], self.sds[:, 0]) if weights is None else tchebycheff(*self._scaled, weights)

    def worth(self, cost: Floats) -> Floats:
        """What a run of each plan promises, doubt left aside: less where it may fail or break a constraint."""
        return np.exp(np.min(cost) - cost) * self.kept * self.works

    def incumbent(self, cost: Floats) -> int | None:
        """Place of the best plan that was measured and keeps the constraints, its luck smoothed out by the model."""
        among = self.was_measured & (self.kept > 0.5)
        return int(np.argmin(np.where(among, cost, np.inf))) if among.any() else None


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
        known, first = set[str](), next((_pair(one.effective) for one in self._candidates), None)
        self._most, self._refinements, self._proxy = SHORTLIST, REFINEMENTS, "duration_s"
        if first is not None and model.arrivals is None:
            known = set(model.predict(*first).metrics)
        elif first is not None:
            known = set(under_load(model, *first, most=_ROUGH))
            # How long a run takes is the trace's affair.
            self._most, self._refinements = max(_FEWEST, _SIMULATED // max(ENOUGH, model.num_prompts)), _FEWEST
            self._proxy = "mean_e2el_ms"
        wanted = dict.fromkeys((*self._objectives, *(limit.metric for limit in constraints), self._proxy, *_ALWAYS))
        self.is_blind = any(name not in known and name not in MEMORY_METRICS for name in objectives)
        """Whether nothing predicts one of the objectives."""
        self._predicted = tuple(name for name in wanted if name in known)
        self._accounted = tuple(name for name in wanted if name in MEMORY_METRICS)
        self._orders: dict[int, list[list[int]]] = {}
        """Candidates from the best on for each objective, by the number of observations, a power of two."""
        self._last: tuple[int, Predictor] | None = None

    @property
    def num_candidates(self) -> int:
        """How many plans a search may choose among, further partitions apart."""
        return len(self._candidates)

    def works(self, effective: EffectivePlan, history: History) -> float:
        """Probability that a run ends in a measurement; of use for comparing plans."""
        fits = history.chance_to_fit(self._resolve.needed_bytes(effective)) if history.out_of_memory else 1.0
        return fits * history.chance_to_work(effective.plan) if fits else 0.0

    def predict(self, history: History, effective: EffectivePlan) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of one plan after these records, and their relative deviations."""
        return self._predictor(history).predict([_pair(effective)]).of(0)

    def look(self, history: History) -> Forecast:
        """What is to be thought of plans after these records, with what was measured of them beside it."""
        predictor = self._predictor(history)
        chosen, metrics = self._choose(predictor, history)
        keys = {one.effective.key for one in chosen}
        ran = [known.effective for key, known in history.plans.items() if known.runs and key not in keys]
        others = [one for one in ran if one is not None]
        effective = [*(one.effective for one in chosen), *others]
        runs = [history.plans.get(one.key) or PlanHistory(effective=one) for one in effective]
        metrics = self._scaled_memory(metrics.joined(self._predict(predictor, others)), runs)
        costs, sds = self._costs(metrics, runs, predictor.noise)
        return Forecast(
            effective=tuple(effective),
            points=(*(one.point for one in chosen), *([None] * len(others))),
            is_open=np.array([*(self._is_open(one, history) for one in chosen), *([False] * len(others))], dtype=bool),
            was_measured=np.array(
                [all(known.value(name) is not None for name in self._objectives) for known in runs], dtype=bool
            ),
            costs=costs,
            sds=sds,
            kept=self._kept(metrics, runs),
            works=np.array([self.works(one, history) for one in effective]),
            metrics=metrics,
            noise=predictor.noise,
        )

    def _choose(self, predictor: Predictor, history: History) -> tuple[list[Candidate], PredictedMetrics]:
        """Candidates to look at, and what is predicted of them."""
        count = len(history.observations)
        doubled = 1 << (count.bit_length() - 1) if count else 0
        if doubled not in self._orders:
            then = predictor if doubled == count else self._fit(history.observations[:doubled])
            self._orders[doubled] = self._best_first(self._roughly(then))
        chosen = [self._candidates[index] for index in self._shortlist(self._orders[doubled], history)]
        metrics = self._predict(predictor, [one.effective for one in chosen])
        if count and self._space.engine is None:
            further = self._refine(predictor.model, chosen, metrics, history)
            metrics = metrics.joined(self._predict(predictor, [one.effective for one in further]))
            chosen += further
        return chosen, metrics

    def _predictor(self, history: History) -> Predictor:
        count = len(history.observations)
        if self._last is None or self._last[0] != count:
            self._last = (count, self._fit(history.observations))
        return self._last[1]

    def _fit(self, observations: Sequence[Observation]) -> Predictor:
        return Predictor(self._model, [*self._prior, *observations], metrics=self._predicted)

    def _predict(
        self, predictor: Predictor, effective: Sequence[EffectivePlan], *, most_requests: int | None = None
    ) -> PredictedMetrics:
        """What is predicted and accounted of plans, whatever ran."""
        found = predictor.predict([_pair(one) for one in effective], most_requests=most_requests)
        mean, sd = dict(found.mean), dict(found.relative_sd)
        for name in self._accounted:
            mean[name] = np.array([self._account(name, one) for one in effective])
            sd[name] = np.full(len(effective), _MEMORY_SD)
        return replace(found, mean=mean, relative_sd=sd)

    def _roughly(self, predictor: Predictor) -> PredictedMetrics:
        """What is predicted of all candidates; under arrivals of the fastest of each size, by few requests, and of
        others that they are worse by as much as they are slower with a batch."""
        every = [one.effective for one in self._candidates]
        if self._model.arrivals is None:
            return self._predict(predictor, every)
        seconds = [one.duration_s for one in predictor.model.predict_many([_pair(one) for one in every])]
        sizes = [self._refiner.class_of(one) for one in self._candidates]
        fastest: dict[object, int] = {}
        for index in sorted(range(len(every)), key=lambda index: (seconds[index], index)):
            fastest.setdefault(sizes[index], index)
        firsts = list(fastest.values())
        most = max(_ROUGH, _SIMULATED // len(firsts))
        found = self._predict(predictor, [every[index] for index in firsts], most_requests=most)
        place = {index: row for row, index in enumerate(firsts)}
        rows = [place[fastest[size]] for size in sizes]
        slower = np.array(seconds) / np.array(seconds)[[fastest[size] for size in sizes]]
        return PredictedMetrics(
            mean={
                name: values[rows] * slower ** (-1.0 if name in HIGHER_IS_BETTER else 1.0)
                for name, values in found.mean.items()
            },
            relative_sd={name: values[rows] for name, values in found.relative_sd.items()},
            predictions=(),
        )

    def _best_first(self, metrics: PredictedMetrics) -> list[list[int]]:
        """For each objective, places from the best on, those last that hardly keep the constraints."""
        hopeless = self._chance_kept(metrics) < _HOPELESS
        return [np.lexsort((self._cost(name, metrics)[0], hopeless)).tolist() for name in self._objectives]

    def _shortlist(self, orders: Sequence[Sequence[int]], history: History) -> list[int]:
        """Candidates that ran, and the most promising open ones: of all, and of each kind."""
        chosen = {index for index, key in enumerate(self._keys) if key in history.plans}
        for order in orders:
            room, kinds = self._most // len(orders), Counter[object]()
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
        for order in self._best_first(metrics):
            firsts: dict[object, Candidate] = {}
            for place in order:
                firsts.setdefault(self._refiner.class_of(chosen[place]), chosen[place])
            for first in list(firsts.values())[: max(1, REFINED_CLASSES // len(self._objectives))]:
                if not self._refiner.is_whole(first):
                    for candidate in self._refiner.best(first, model, limit=self._refinements):
                        further.setdefault(candidate.effective.key, candidate)
        known = set(self._keys)
        return [one for key, one in further.items() if key not in known and self._is_open(one, history)]

    def _is_open(self, candidate: Candidate, history: History) -> bool:
        return history.is_open(candidate.effective.key) and self.works(candidate.effective, history) > 0

    def _cost(self, name: str, metrics: PredictedMetrics) -> tuple[Floats, Floats]:
        """Cost of one objective, as predicted, with its deviation."""
        if name not in metrics.mean:
            proxy = metrics.mean[self._proxy]
            return log_cost(self._proxy, proxy), np.full_like(proxy, _PROXY_SD)
        return log_cost(name, metrics.mean[name]), metrics.relative_sd[name].copy()

    def _costs(self, metrics: PredictedMetrics, runs: Sequence[PlanHistory], noise: float) -> tuple[Floats, Floats]:
        """What is predicted; of plans that ran without teaching the model anything, what was measured."""
        costs, sds = [], []
        for name in self._objectives:
            cost, sd = self._cost(name, metrics)
            for place, known in enumerate(runs):
                value = known.value(name)
                is_seen = known.observed and name not in self._accounted
                if value is not None and name in metrics.mean and not is_seen:
                    cost[place] = float(log_cost(name, np.array(value)))
                    sd[place] = noise / math.sqrt(len(known.runs))
            costs.append(cost)
            sds.append(sd)
        return np.stack(costs, axis=1), np.stack(sds, axis=1)

    def _chance_kept(self, metrics: PredictedMetrics) -> Floats:
        kept = np.ones(len(metrics.mean[self._proxy]))
        for limit in self._constraints:
            if limit.metric in metrics.mean:
                kept *= chance_kept(limit, metrics.mean[limit.metric], metrics.relative_sd[limit.metric])
        return kept

    def _kept(self, metrics: PredictedMetrics, runs: Sequence[PlanHistory]) -> Floats:
        kept = self._chance_kept(metrics)
        for place, known in enumerate(runs):
            if known.runs:
                values = [(limit, known.value(limit.metric)) for limit in self._constraints]
                kept[place] = float(all(value is not None and limit.excess(value) <= 0 for limit, value in values))
        return kept

    def _scaled_memory(self, metrics: PredictedMetrics, runs: Sequence[PlanHistory]) -> PredictedMetrics:
        """Memory by the accounting, times what the measured plans needed of it."""
        mean = dict(metrics.mean)
        for name in self._accounted:
            pairs = zip((known.value(name) for known in runs), mean[name], strict=True)
            ratios = [value / accounted for value, accounted in pairs if value and accounted > 0]
            mean[name] = mean[name] * (float(np.median(ratios)) if ratios else 1.0)
        return replace(metrics, mean=mean)

    def _account(self, name: str, effective: EffectivePlan) -> float:
        needed, plan = self._resolve.needed_bytes(effective), effective.plan
        if name == "peak_memory_bytes":
            return float(max(needed.values()))
        caps = {
            device: stage.cap_bytes(self._resolve.device_bytes[device])
            for replica in range(plan.replicas)
            for device, stage in zip(plan.replica(replica).devices, plan.stages, strict=True)
        }
        return max(need / caps[device] for device, need in needed.items())


def _pair(effective: EffectivePlan) -> tuple[Plan, int]:
    return effective.plan, effective.in_flight
