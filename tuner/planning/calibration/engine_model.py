"""The cost model of another engine: its own way to form batches, with what steps are seen to take.

A stage of `layers` layers, shared by `width` workers, computes a step of some tokens in

    a + layers / width · (b + c · tokens + d · rows) + (e + f · rows) on the last stage, with the head and sampling

times a factor that plans with as many replicas, stages and shards have in common: they share the machine's memory.
Before anything is seen, rates are nominal; they tell which split is even, and not how long it takes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial

import numpy as np
from scipy.optimize import nnls

from pipetune.bench.spec import Plan
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.simulation.engine_steps import EngineSteps, engine_steps, served_steps
from pipetune.tuner.planning.simulation.load import LoadedRequest, LoadPrediction, prediction_of, simulate_load
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.planning.simulation.prediction import SimulatedRun
from pipetune.tuner.planning.simulation.schedule import Indices

Layout = tuple[int, int, int]
"""Replicas, stages, shards."""

_ENDLESS = 1 << 60
"""Tokens."""
_BYTES_A_SECOND, _FLOPS = 1e10, 1e11
_STEP_S, _GAP_S, _HOP_S = 1e-3, 3e-3, 1e-3
_PRIOR_WEIGHT = 1e-3
"""What each nominal rate counts, in steps seen."""
_FACTOR_WEIGHT = 0.5
"""What a factor of 1 counts, in tasks seen."""


@dataclass(frozen=True, kw_only=True)
class EngineModel(CostModel):
    """Predicts runs of one workload on an engine."""

    rates: tuple[float, ...] | None = None
    """`a` to `f`, seconds; None where nothing was seen."""
    factors: Mapping[Layout, float] = field(default_factory=dict)
    gap_s: float = _GAP_S
    """From known tokens to the begin of the next step."""
    hop_s: float = _HOP_S
    """From the end of a step on one stage to its begin on the next."""

    def refit(self, observations: Sequence[Observation]) -> "EngineModel":
        """The model with its rates, its factors and its delays by what was observed."""
        rows, seconds, layouts, weights = [], [], [], []
        for observation in observations:
            plan = observation.effective.plan
            counts = plan.layer_counts * plan.replicas
            for task in observation.tasks:
                is_last = task.stage % len(plan.stages) == len(plan.stages) - 1
                rows.append(_features(counts[task.stage] / plan.width, task.new_tokens, task.rows, is_last=is_last))
                seconds.append(task.seconds)
                layouts.append(layout_of(plan))
                weights.append(math.sqrt(task.count))
        if not rows:
            return self
        features, took, weight = np.array(rows), np.array(seconds), np.array(weights)
        factors: dict[Layout, float] = {}
        rates = self._nominal
        # Each is seen through the other: a few turns settle both.
        for _ in range(3):
            scale = np.array([factors.get(layout, 1.0) for layout in layouts])
            design = features * (scale / took * weight)[:, None] * self._nominal
            ridge = np.diag(np.full(len(rates), math.sqrt(_PRIOR_WEIGHT)))
            target = np.concatenate([weight, np.diag(ridge)])
            rates = nnls(np.vstack([design, ridge]), target)[0] * self._nominal
            factors = _factors(took / np.maximum(features @ rates, 1e-9), took * weight**2, layouts)
        gaps = [one.gap_s[0] for one in observations if one.gap_s and one.gap_s[0] is not None]
        hops = [gap for one in observations for gap in one.gap_s[1:] if gap is not None]
        return replace(
            self,
            rates=tuple(rates.tolist()),
            factors=factors,
            gap_s=float(np.median(gaps)) if gaps else self.gap_s,
            hop_s=float(np.median(hops)) if hops else self.hop_s,
        )

    @cached_property
    def _nominal(self) -> Floats:
        shape = self.shape
        layer = float(np.mean([one.weight_bytes for one in shape.layers]))
        params = float(np.mean([one.active_params for one in shape.layers]))
        head = shape.head_bytes or shape.embedding_bytes
        token_s = 2.0 * params / _FLOPS
        layer_s, head_s = layer / _BYTES_A_SECOND, head / _BYTES_A_SECOND
        sample_s = 2.0 * head / shape.kept_bytes / _FLOPS
        return np.array([_STEP_S, layer_s, token_s, token_s / 4, head_s, sample_s])

    def _room(self, plan: Plan) -> int:
        """Tokens that the KV cache of the fullest stage holds; without a limit where the engine takes what is left."""
        assert plan.engine is not None
        if plan.engine.kv_cache_memory_bytes is None:
            return _ENDLESS
        layers = [self.shape.layers[stage.first_layer : stage.end_layer] for stage in plan.stages]
        each = [sum(layer.kv_bytes_per_token for layer in own) for own in layers]
        return plan.engine.kv_cache_memory_bytes * plan.width // max(*each, 1)

    def limits(self, plan: Plan, prompt_lens: Sequence[int]) -> dict[str, int]:
        """What bounds the steps of a replica with these prompts; no limit where that is left to the engine."""
        assert plan.engine is not None
        return {
            "budget": plan.engine.max_num_batched_tokens or sum(prompt_lens),
            "most_rows": plan.engine.max_num_seqs or len(prompt_lens),
            "room": self._room(plan),
            "depth": len(plan.stages),
        }

    def step_s(self, plan: Plan, rows: int, tokens: int) -> list[float]:
        """Seconds of a step on each stage of a replica."""
        rates = self._nominal if self.rates is None else np.array(self.rates)
        factor, last = self.factors.get(layout_of(plan), 1.0), len(plan.stages) - 1
        counts = enumerate(plan.layer_counts)
        features = [_features(count / plan.width, tokens, rows, is_last=stage == last) for stage, count in counts]
        return [factor * float(rates @ own) for own in features]

    def _steps(self, plan: Plan, replica: int) -> EngineSteps:
        share = slice(replica, None, plan.replicas)
        prompt_lens = self.prompt_lens[share]
        return engine_steps(prompt_lens, self.output_lens[share], **self.limits(plan, prompt_lens))

    def _schedule_of(self, plan: Plan, in_flight: int | None) -> object:
        """Equal for plans that form the same batches."""
        return plan.replicas, len(plan.stages), plan.engine, self._room(plan)

    def _simulate_alike(self, plans: Sequence[Plan], in_flight: int | None) -> Sequence[SimulatedRun]:
        width, replicas = len(plans[0].stages), plans[0].replicas
        rates = self._nominal if self.rates is None else np.array(self.rates)
        factor = self.factors.get(layout_of(plans[0]), 1.0)
        runs = []
        for replica in range(min(replicas, self.num_prompts)):
            steps = self._steps(plans[0], replica)
            busy_s = np.empty((len(steps.rows), width, len(plans)))
            for place, plan in enumerate(plans):
                for stage, count in enumerate(plan.layer_counts):
                    features = _features(count / plan.width, steps.tokens, steps.rows, is_last=stage == width - 1)
                    busy_s[:, stage, place] = factor * np.tensordot(rates, features, axes=1)
            timeline = steps.timeline(busy_s, np.full(width - 1, self.hop_s), self.gap_s)
            runs.append(SimulatedRun(sequence=steps, timeline=timeline, busy_s=busy_s.sum(axis=0)))
        return runs


@simulate_load.register
def _simulate_engine_load(
    model: EngineModel,
    plan: Plan,
    in_flight: int,
    requests: Sequence[LoadedRequest],
    *,
    max_concurrency: int | None = None,
) -> LoadPrediction:
    """Serves the requests step by step, as they are dealt to the engine's replicas in turn."""
    # Rows and tokens come again and again.
    step_s = cache(partial(model.step_s, plan))
    limits = model.limits(plan, [one.prompt_len for one in requests])
    shares = [range(replica, len(requests), plan.replicas) for replica in range(min(plan.replicas, len(requests)))]
    served = [
        served_steps([requests[one] for one in share], step_s, hop_s=model.hop_s, gap_s=model.gap_s, **limits)
        for share in shares
    ]
    first_s, last_s = [0.0] * len(requests), [0.0] * len(requests)
    for share, own in zip(shares, served, strict=True):
        first_s[share.start :: plan.replicas], last_s[share.start :: plan.replicas] = own.first_s, own.last_s
    # As it is measured: time without a request is part of the bubble.
    return prediction_of(requests, first_s, last_s, [own.busy_s for own in served], idle_s=0.0)


def layout_of(plan: Plan) -> Layout:
    """What plans have in common that load the machine alike."""
    return plan.replicas, len(plan.stages), plan.width


def _features(layers: float, tokens: Floats | Indices | int, rows: Floats | Indices | int, *, is_last: bool) -> Floats:
    """`[rate]`, or `[rate, step]` of many steps."""
    one, last = np.ones_like(tokens, dtype=float), float(is_last)
    return np.array([one, layers * one, layers * tokens, layers * rows, last * one, last * rows])


def _factors(ratios: Floats, weights: Floats, layouts: Sequence[Layout]) -> dict[Layout, float]:
    """By layout, the mean of ratios of what steps took to what rates say, drawn to 1."""
    found = {}
    for layout in dict.fromkeys(layouts):
        among = np.array([other == layout for other in layouts])
        mean = float(np.average(np.log(ratios[among]), weights=weights[among]))
        found[layout] = math.exp(mean * among.sum() / (among.sum() + _FACTOR_WEIGHT))
    return found
