"""What plans will give: the refitted cost model times what it is seen to miss, with how sure one can be of it.

A model is refitted by the times of tasks (`regression`), and in what lies between these by what records show of each:
messages, gaps, stalls and contention.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipetune.bench.spec import Plan
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.calibration.corrected_costs import RefittedCosts, between_hosts
from pipetune.tuner.planning.calibration.engine_model import EngineModel
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.calibration.regression import Rows
from pipetune.tuner.planning.calibration.residual_gp import PRIOR_SD, Features, Process
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.simulation.load import under_load
from pipetune.tuner.planning.simulation.model import TOKEN_BYTES, CostModel, of_device
from pipetune.tuner.planning.simulation.prediction import Prediction

NOISE_SD, NOISE_WEIGHT, LEAST_NOISE = 0.02, 3.0, 0.003
"""Relative standard deviation of repeated runs before any are seen, what that counts in repeats, and its floor."""
_NOT_COSTS = ("drift", "switches", "contention")
_JOINED_FITS = 4
"""Where no prefill was seen by itself: each halves what is left of the error."""
_HOP_SD = 0.3
"""Standard deviation of the logarithm of a hand-over's median."""
_HOP_WIDTHS = (1.0, 0.1)
"""Standard deviations before anything is seen: of the log factor on messages, and of its slope over doublings."""
_LEAST_GOOD = 0.02
"""Shares of good requests below it are not told apart."""
_HUBER = 2.0
"""Runs of one plan further from their median than so many times the noise count for less."""
_DISTURBED = 0.25
"""What a disturbed run counts."""


@dataclass(frozen=True, kw_only=True)
class PredictedMetrics:
    """Predicted metrics of the plans asked for, with their errors."""

    mean: Mapping[str, Floats]
    """Mean of each metric, by its name: one value a plan."""
    relative_sd: Mapping[str, Floats]
    """By metric: how far the mean over many runs of a plan may be from that; a single run's noise comes on top."""
    predictions: tuple[Prediction, ...]
    """Predictions of the refitted model alone, without the residual."""

    def of(self, place: int) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of one plan, and their relative deviations."""
        means, sds = ({name: float(own[place]) for name, own in of.items()} for of in (self.mean, self.relative_sd))
        return means, sds

    def joined(self, other: "PredictedMetrics") -> "PredictedMetrics":
        """The metrics of these plans and then of others."""
        pairs = (self.mean, other.mean), (self.relative_sd, other.relative_sd)
        means, sds = ({name: np.concatenate([own, more[name]]) for name, own in of.items()} for of, more in pairs)
        return PredictedMetrics(mean=means, relative_sd=sds, predictions=self.predictions + other.predictions)


class Predictor:
    """A refitted cost model and what it is seen to miss, metric by metric."""

    def __init__(self, model: CostModel, observations: Sequence[Observation], *, metrics: Sequence[str]) -> None:
        """Learns from what was observed; from nothing, it predicts what the model, over uncorrected costs, says of the
        metrics."""
        self.model = refit(model, observations)
        self._loads: dict[tuple[Plan, int, int | None], Prediction] = {}
        # Under arrivals it is mostly the trace that says how long a run takes.
        if model.arrivals is None:
            metric = "duration_s"
        else:
            metric = "mean_e2el_ms" if model.arrivals.slo_attainment is None else "max_request_rate"
        self.noise = noise_of(observations, metric=metric)
        """Relative standard deviation of a repeated run."""
        self.metrics = tuple(metrics)
        self._processes: dict[str, Process] = {}
        groups: dict[str, list[Observation]] = defaultdict(list)
        for observation in observations:
            groups[observation.effective.key].append(observation)
        if groups:
            self._learn(list(groups.values()))

    def _learn(self, groups: Sequence[Sequence[Observation]]) -> None:
        plans = [(group[0].effective.plan, group[0].effective.in_flight) for group in groups]
        predictions = self._predictions(plans)
        features = self._features(plans, predictions)
        for metric in self.metrics:
            modelled = _logs(predictions, metric)
            rows, errors, variances = [], [], []
            for row, group in enumerate(groups):
                runs = [one for one in group if metric in one.metrics]
                if runs and math.isfinite(modelled[row]):
                    mean, weight = _mean(runs, metric, self.noise)
                    rows.append(row)
                    errors.append(mean - modelled[row])
                    variances.append(self.noise**2 / weight)
            if rows:
                self._processes[metric] = Process(features.take(rows), np.array(errors), np.array(variances))

    def predict(self, plans: Sequence[tuple[Plan, int]], *, most_requests: int | None = None) -> PredictedMetrics:
        """What plans will give, each with its micro-batches in flight; under arrivals by `most_requests` alone, where a
        rough guess will do. KeyError for a metric that the model does not predict."""
        predictions = self._predictions(plans, most_requests)
        features = self._features(plans, predictions)
        means, sds = {}, {}
        for metric in self.metrics:
            error, sd = np.zeros(len(plans)), np.full(len(plans), PRIOR_SD)
            if metric in self._processes:
                error, sd = self._processes[metric].predict(features)
            means[metric], sds[metric] = _back(_logs(predictions, metric) + error, sd, metric)
        return PredictedMetrics(mean=means, relative_sd=sds, predictions=predictions)

    def _predictions(
        self, plans: Sequence[tuple[Plan, int]], most_requests: int | None = None
    ) -> tuple[Prediction, ...]:
        """The model's; under arrivals with the metrics of these."""
        batches = self.model.predict_many(plans)
        if self.model.arrivals is None:
            return batches
        keys = [(plan, in_flight, most_requests) for plan, in_flight in plans]
        for (plan, in_flight, most), batch in zip(keys, batches, strict=True):
            if (plan, in_flight, most) not in self._loads:
                metrics = under_load(self.model, plan, in_flight, most=most)
                self._loads[plan, in_flight, most] = replace(batch, metrics=metrics)
        return tuple(self._loads[key] for key in keys)

    def _features(self, plans: Sequence[tuple[Plan, int]], predictions: Sequence[Prediction]) -> Features:
        shares = [one.stage_busy_s[: len(plan.stages)] for (plan, _), one in zip(plans, predictions, strict=True)]
        return Features.of(plans, shares, longest=max(self.model.prompt_lens))


def noise_of(observations: Sequence[Observation], *, metric: str = "duration_s") -> float:
    """Relative standard deviation of the duration of a repeated run, or of another metric. Pooled over the repeats of
    each plan, with a prior; and no less than runs differ within themselves: the median of n iterations has about 1.25 /
    √n of an iteration's. Disturbed runs tell nothing."""
    groups: dict[str, list[float]] = defaultdict(list)
    within: list[float] = []
    for observation in observations:
        if observation.disturbed or metric not in observation.metrics:
            continue
        groups[observation.effective.key].append(math.log(observation.metrics[metric]))
        if observation.spread is not None:
            within.append(observation.spread**2 / observation.iterations)
    squares, weight = NOISE_WEIGHT * NOISE_SD**2, NOISE_WEIGHT
    for logs in groups.values():
        if len(logs) > 1:
            squares += (len(logs) - 1) * float(np.var(logs, ddof=1))
            weight += len(logs) - 1
    floor = 1.25 * math.sqrt(float(np.mean(within))) if within else 0.0
    return max(LEAST_NOISE, floor, math.sqrt(squares / weight))


def _is_share(metric: str) -> bool:
    """Shares that may be nought: what is left of one is the product that a cost model gets wrong by a factor."""
    return metric.startswith("bubble_")


def _logs(runs: Sequence[Prediction | Observation], metric: str) -> Floats:
    values = np.array([one.metrics[metric] for one in runs])
    least: Floats | float = 1e-12
    if metric in ("slo_attainment", "request_goodput"):
        # Of requests none of which is good a factor says nothing.
        rates = [one.metrics["request_throughput"] for one in runs]
        least = _LEAST_GOOD * np.array(rates if metric == "request_goodput" else [1.0] * len(rates))
    return np.log(np.maximum(1.0 - values if _is_share(metric) else values, least))


def _back(logs: Floats, sd: Floats, metric: str) -> tuple[Floats, Floats]:
    """Mean and relative standard deviation of the metric itself."""
    values = np.exp(logs)
    if not _is_share(metric):
        return values, sd
    shares = np.maximum(1.0 - values, 1e-6)
    return shares, sd * values / shares


def _mean(runs: Sequence[Observation], metric: str, noise: float) -> tuple[float, float]:
    """Mean of the logs of a plan's runs and what it weighs in runs; odd and disturbed ones count for less."""
    logs = _logs(runs, metric)
    far = np.abs(logs - np.median(logs)) / (_HUBER * noise)
    weights = np.where([one.disturbed for one in runs], _DISTURBED, 1.0) / np.maximum(far, 1.0)
    return float(weights @ logs / weights.sum()), float(weights.sum())


def refit(model: CostModel, observations: Sequence[Observation]) -> CostModel:
    """A model over uncorrected costs, with these corrected by what was observed; itself if that teaches nothing. Tasks
    of one kind teach first; what prefills with a step beside them would take alone is then known by those costs."""
    if isinstance(model, EngineModel):
        return model.refit(observations)
    lone = [_without_joined(observation) for observation in observations]
    refitted = _refit(model, lone, model.costs)
    fits = 1 if any(not one.kind.is_decode for own in lone for one in own.tasks) else _JOINED_FITS
    for _ in range(fits if lone != [*observations] else 0):
        refitted = _refit(model, observations, refitted.costs)
    return refitted


def _refit(model: CostModel, observations: Sequence[Observation], joined_by: Costs) -> CostModel:
    if not any(observation.tasks for observation in observations):
        return model
    # Layers of equal shape share a group.
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(model.shape.layers))}
    groups = tuple(numbers[layer] for layer in model.shape.layers)
    rows = Rows(model.costs, groups, observations, model.contention, joined_by)
    terms = rows.fit()
    costs = RefittedCosts(
        base=model.costs,
        terms={term: value for term, value in terms.items() if term[0] not in _NOT_COSTS},
        groups=groups,
        middles=rows.middles,
        hops={between: _fit_hops(model, observations, between=between) for between in (False, True)},
    )
    return replace(
        model,
        costs=costs,
        gaps_s=_by_device(model.gaps_s, observations, "gap_s"),
        stalls_s=_by_device(model.stalls_s, observations, "stall_s"),
        contention=rows.contention(terms),
    )


def _without_joined(observation: Observation) -> Observation:
    return observation.model_copy(update={"tasks": tuple(one for one in observation.tasks if not one.decode_rows)})


def _fit_hops(model: CostModel, observations: Sequence[Observation], *, between: bool) -> tuple[float, float, float]:
    """Log factor on messages between hosts or within one, its slope over doublings of the bytes, and the bytes where
    the factor holds."""
    rows = []
    for observation in observations:
        devices = observation.effective.plan.devices
        for hand_over in observation.hand_overs:
            ends = devices[hand_over.source], devices[hand_over.target]
            if between_hosts(*ends) != between:
                continue
            positions = hand_over.rows * hand_over.new_tokens
            num_bytes = positions * model.shape.crossing_bytes or hand_over.rows * TOKEN_BYTES
            base = model.costs.hop_s(*ends, num_bytes)
            if base > 0 and hand_over.seconds > 0:
                rows.append((math.log(hand_over.seconds / base), math.log2(max(num_bytes, 1)), hand_over.count))
    if not rows:
        return 0.0, 0.0, 1.0
    ratio, doublings, count = np.array(rows).T
    centre = float(doublings.mean())
    design = np.stack([np.ones_like(doublings), doublings - centre], axis=1)
    weights = 1.0 / (_HOP_SD**2 * (1.0 + 1.0 / count))
    normal = design.T @ (weights[:, None] * design) + np.diag(1.0 / np.square(_HOP_WIDTHS))
    values = np.linalg.solve(normal, design.T @ (weights * ratio))
    return float(values[0]), float(values[1]), 2.0**centre


def _by_device(known: Mapping[str, float], observations: Sequence[Observation], name: str) -> dict[str, float]:
    """What is known, and by device the median over records and one that saw what was known before."""
    seen: dict[str, list[float]] = {}
    for observation in observations:
        for device, seconds in zip(observation.effective.plan.devices, getattr(observation, name), strict=False):
            if seconds is not None and len(observation.effective.plan.stages) > 1:
                seen.setdefault(device, [of_device(known, device)]).append(seconds)
    return {**known, **{device: float(np.median(found)) for device, found in seen.items()}}
