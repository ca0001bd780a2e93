"""The cost model of another engine: what steps are seen to take, and plans that were not seen."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from pipetune.bench.spec import EffectivePlan, EngineSettings, Plan, Workload
from pipetune.tuner.planning.calibration.engine_model import EngineModel
from pipetune.tuner.planning.calibration.observation import Observation, TaskSpan
from tests.record_factory import make_shape

SHAPE = make_shape()
WORKLOAD = Workload(num_prompts=12, input_len=32, output_len=8)
TRUE = dataclasses.replace(
    EngineModel.of_workload(SHAPE, WORKLOAD, (32,) * 12),
    rates=(2e-3, 3e-4, 4e-6, 2e-5, 3e-3, 1e-4),
    gap_s=4e-3,
    hop_s=2e-3,
)


def plan_of(first: int, budget: int | None, seqs: int | None = None, *, replicas: int = 1) -> Plan:
    counts = (first, SHAPE.num_layers - first) if first < SHAPE.num_layers else (first,)
    devices = tuple(f"cpu:{place}" for place in range(len(counts) * replicas))
    plan = Plan.from_layer_counts(counts, devices, 1, replicas=replicas)
    return plan.model_copy(update={"engine": EngineSettings(max_num_batched_tokens=budget, max_num_seqs=seqs)})


def observed(model: EngineModel, plan: Plan) -> Observation:
    """What a run of the plan would show."""
    assert model.rates is not None
    steps, tasks = model._steps(plan, 0), []
    for stage, layers in enumerate(plan.layer_counts):
        last = float(stage == len(plan.stages) - 1)
        for rows, tokens in zip(steps.rows.tolist(), steps.tokens.tolist(), strict=True):
            parts = (1.0, layers, layers * tokens, layers * rows, last, last * rows)
            seconds = float(np.dot(model.rates, parts))
            tasks.append(TaskSpan(stage=stage, rows=rows, new_tokens=tokens, past_tokens=0, seconds=seconds, count=1))
    return Observation(
        effective=EffectivePlan(plan=plan, in_flight=len(plan.stages)),
        tasks=tuple(tasks),
        gap_s=(model.gap_s, *[model.hop_s] * (len(plan.stages) - 1)),
        metrics=model.predict(plan).metrics,
    )


def test_a_few_plans_teach_what_all_others_take() -> None:
    half = SHAPE.num_layers // 2
    seen = [
        observed(TRUE, plan_of(half, None)),
        observed(TRUE, plan_of(half - 1, 64, 8)),
        observed(TRUE, plan_of(half, 128)),
    ]
    learnt = EngineModel.of_workload(SHAPE, WORKLOAD, (32,) * 12).refit(seen)
    for first, budget in itertools.product((half - 2, half, half + 2), (32, 96, 256, None)):
        plan = plan_of(first, budget)
        assert learnt.predict(plan).duration_s == pytest.approx(TRUE.predict(plan).duration_s, rel=0.02)


def test_a_budget_below_the_whole_batch_overlaps_two_stages() -> None:
    half = SHAPE.num_layers // 2
    whole, some = TRUE.predict(plan_of(half, None)), TRUE.predict(plan_of(half, 12 * 32 // 4))
    assert whole.metrics["bubble_ratio"] > 0.45
    assert some.metrics["bubble_ratio"] < whole.metrics["bubble_ratio"] - 0.1


def test_what_a_layout_has_of_its_own_is_learnt_for_that_layout_alone() -> None:
    half = SHAPE.num_layers // 2
    slow = dataclasses.replace(TRUE, rates=tuple(1.5 * rate for rate in TRUE.rates or ()))
    seen = [observed(TRUE, plan_of(half, budget)) for budget in (None, 64, 128)]
    seen += [observed(slow, plan_of(SHAPE.num_layers, budget)) for budget in (None, 64, 128)]
    learnt = EngineModel.of_workload(SHAPE, WORKLOAD, (32,) * 12).refit(seen)
    pipeline, single = learnt.factors[1, 2, 1], learnt.factors[1, 1, 1]
    assert single / pipeline == pytest.approx(1.5, rel=0.1)


def test_plans_together_and_alone_are_predicted_alike() -> None:
    plans = [(plan_of(first, budget), None) for first in (3, 5) for budget in (32, None)]
    for one, (plan, _) in zip(TRUE.predict_many(plans), plans, strict=True):
        assert one.metrics == pytest.approx(TRUE.predict(plan).metrics)


def test_a_small_kv_cache_lets_fewer_run_at_once() -> None:
    plan = plan_of(SHAPE.num_layers // 2, None)
    assert plan.engine is not None
    tokens = max(sum(one.kv_bytes_per_token for one in SHAPE.layers[s.first_layer : s.end_layer]) for s in plan.stages)
    small = plan.engine.model_copy(update={"kv_cache_memory_bytes": 3 * 40 * tokens})
    tight = plan.model_copy(update={"engine": small})
    assert TRUE._steps(tight, 0).rows.max() == 3
    assert TRUE.predict(tight).duration_s > TRUE.predict(plan).duration_s
