"""The predictor: the model where nothing is known, what was measured where it is, and how sure of which."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from pipetune.bench.profile import TaskKind
from pipetune.bench.spec import Arrivals, Goodput, Plan
from pipetune.tuner.planning.calibration.observation import Observation, TaskSpan, observe
from pipetune.tuner.planning.calibration.predictor import (
    LEAST_NOISE,
    NOISE_SD,
    Predictor,
    noise_of,
)
from pipetune.tuner.planning.calibration.residual_gp import PRIOR_SD, Features, Process
from pipetune.tuner.planning.simulation.load import under_load
from pipetune.tuner.planning.simulation.model import CostModel
from tests.record_factory import make_effective, make_measurement, make_plan, make_record
from tests.tuner.planning.factory_costs import FactoryCosts, make_model

METRICS = ("output_throughput", "p90_ttft_ms", "bubble_ratio")


def learn(plan: Plan, seed: int = 0, *, drift: float = 1.0, noise: float = 0.01) -> Observation:
    observation = observe(make_record(0, "trial", plan, make_measurement(plan, seed=seed, drift=drift, noise=noise)))
    assert observation is not None
    return observation


def asked(*plans: Plan) -> list[tuple[Plan, int]]:
    return [(plan, make_effective(plan).in_flight) for plan in plans]


def test_without_observations_it_says_what_the_model_says() -> None:
    model, plans = make_model(), asked(make_plan((16, 14), 16), make_plan((10, 20), 8))
    predicted = Predictor(model, [], metrics=METRICS).predict(plans)
    for metric in METRICS:
        expected = [one.metrics[metric] for one in model.predict_many(plans)]
        assert predicted.mean[metric] == pytest.approx(expected)
    assert predicted.relative_sd["output_throughput"] == pytest.approx(PRIOR_SD)
    assert predicted.relative_sd["bubble_ratio"][0] > PRIOR_SD


def test_a_plan_run_often_gives_what_it_gave_and_is_known_best() -> None:
    plan, other = make_plan((16, 14), 16), make_plan((10, 20), 4)
    observations = [learn(plan, seed) for seed in range(6)]
    predictor = Predictor(make_model(FactoryCosts(prefill=1.2)), observations, metrics=METRICS)
    predicted = predictor.predict(asked(plan, other))
    for metric in METRICS:
        measured = np.mean([one.metrics[metric] for one in observations])
        assert predicted.mean[metric][0] == pytest.approx(measured, rel=0.03)
    sd = predicted.relative_sd["output_throughput"]
    assert 0.0 < sd[0] < sd[1]


def test_it_is_deterministic() -> None:
    observations = [learn(make_plan((first, 30 - first), 16), first) for first in (14, 16, 18)]
    plans = asked(*(make_plan((first, 30 - first), 8) for first in range(2, 29, 3)))
    one, again = (Predictor(make_model(), observations, metrics=METRICS).predict(plans) for _ in range(2))
    for metric in METRICS:
        assert one.mean[metric].tolist() == again.mean[metric].tolist()


def test_layouts_and_switches_are_told_apart() -> None:
    observations = [learn(make_plan((16, 14), 16), seed) for seed in range(3)]
    observations += [learn(make_plan((16, 14), 16, compile=True), drift=0.7)]
    predictor = Predictor(make_model(), observations, metrics=METRICS[:1])
    eager, compiled, replicas = (
        float(predictor.predict(asked(plan)).mean[METRICS[0]][0])
        for plan in (
            make_plan((17, 13), 16),
            make_plan((17, 13), 16, compile=True),
            make_plan((30,), 16, replicas=2),
        )
    )
    assert compiled / eager == pytest.approx(1 / 0.7, rel=0.06)
    exact = make_model().predict_many(asked(make_plan((30,), 16, replicas=2)))[0]
    assert replicas == pytest.approx(exact.metrics[METRICS[0]], rel=0.06)


def test_metrics_that_were_not_measured_are_left_to_the_model() -> None:
    observation = learn(make_plan((16, 14), 16))
    bare = observation.model_copy(update={"metrics": {"duration_s": observation.metrics["duration_s"]}})
    predicted = Predictor(make_model(), [bare], metrics=METRICS).predict(asked(make_plan((16, 14), 16)))
    assert predicted.relative_sd["p90_ttft_ms"][0] == pytest.approx(PRIOR_SD)


def test_noise_comes_from_repeats_and_starts_from_a_guess() -> None:
    assert noise_of([]) == NOISE_SD
    plan = make_plan((16, 14), 16)
    quiet = [learn(plan, noise=0.0).model_copy(update={"spread": 0.0})] * 150
    assert LEAST_NOISE <= noise_of(quiet) < 0.005
    drifts = [math.exp(0.06 * (-1) ** seed) for seed in range(30)]
    loud = [learn(plan, seed, drift=drift, noise=0.0) for seed, drift in enumerate(drifts)]
    assert noise_of(loud) == pytest.approx(0.06, rel=0.15)
    uneven = [learn(plan, seed).model_copy(update={"spread": 0.1}) for seed in range(3)]
    assert noise_of(uneven) == pytest.approx(0.125 / math.sqrt(3), rel=0.01)
    disturbed = [one.model_copy(update={"disturbed": True}) for one in loud]
    assert noise_of(disturbed) == NOISE_SD


def test_errors_are_learnt_from_neighbours_and_forgotten_far_away() -> None:
    plans = asked(*(make_plan((first, 30 - first), 16) for first in range(2, 29)))
    shares = [[one.layer_counts[0], one.layer_counts[1]] for one, _ in plans]
    features = Features.of(plans, shares, longest=64)
    seen = [12, 13, 14, 15]
    process = Process(features.take(seen), np.full(4, 0.06), np.full(4, 1e-5))
    mean, sd = process.predict(features)
    assert mean[13] == pytest.approx(0.06, abs=0.01)
    assert abs(mean[0]) < mean[13]
    assert sd[13] < 0.01 < sd[0]


def arriving(costs: FactoryCosts, *, joins: bool = False) -> CostModel:
    """The factory's requests, one by one."""
    arrivals, goodput = Arrivals(request_rate=9.0), Goodput(ttft=1300)
    model = make_model(costs)
    shape = model.shape.model_copy(update={"joins": joins})
    return dataclasses.replace(model, shape=shape, arrivals=arrivals, goodput=goodput)


def learn_load(truth: CostModel, plan: Plan) -> Observation:
    effective = make_effective(plan)
    steps = [TaskKind(rows, 1, past) for rows in (1, 2, 4, 8) for past in (64, 72)]
    prefills = [TaskKind(rows, 64, 0) for rows in (1, 2, 4, 8)]
    # Where a model's passes are joined no prefill is ever by itself.
    joins = truth.shape.joins
    tasks = [[kind] for kind in steps]
    tasks += [[kind, *steps[2 * place :][:joins]] for place, kind in enumerate(prefills)]
    spans = [
        TaskSpan(
            stage=stage,
            rows=kind.rows,
            new_tokens=kind.new_tokens,
            past_tokens=kind.past_tokens,
            decode_rows=sum(one.rows for one in beside),
            decode_past=sum(one.past_tokens for one in beside),
            others=1.0,
            seconds=seconds,
            count=50,
        )
        for kind, *beside in tasks
        for stage, seconds in enumerate(truth.joined_s(plan, (kind, *beside))[0])
    ]
    metrics = under_load(truth, plan, effective.in_flight)
    return Observation(effective=effective, tasks=tuple(spans), gap_s=(None, None), metrics=metrics)


@pytest.mark.parametrize("joins", [False, True])
def test_runs_under_arrivals_teach_what_other_plans_give_under_them(*, joins: bool) -> None:
    metrics = ("p90_ttft_ms", "mean_tpot_ms", "request_goodput", "slo_attainment")
    truth, model = (arriving(own, joins=joins) for own in (FactoryCosts(), FactoryCosts(prefill=1.6, decode=0.7)))
    observations = [learn_load(truth, make_plan(counts, 8)) for counts in ((20, 10), (16, 14))]
    ((plan, in_flight),) = other = asked(make_plan((12, 18), 4))
    expected = under_load(truth, plan, in_flight)
    assert 0.1 < expected["slo_attainment"] < 0.99
    before, after = (Predictor(model, seen, metrics=metrics).predict(other).of(0)[0] for seen in ([], observations))
    assert before["p90_ttft_ms"] == pytest.approx(under_load(model, plan, in_flight)["p90_ttft_ms"])
    assert abs(math.log(before["p90_ttft_ms"] / expected["p90_ttft_ms"])) > 0.2
    for name in metrics:
        assert after[name] == pytest.approx(expected[name], rel=0.1)


def test_good_requests_that_there_are_none_of_spoil_nothing() -> None:
    model = dataclasses.replace(arriving(FactoryCosts()), goodput=Goodput(ttft=0.1))
    observations = [learn_load(model, make_plan((16, 14), 8))]
    predicted = Predictor(model, observations, metrics=("request_goodput",)).predict(asked(make_plan((10, 20), 8)))
    assert 0 < predicted.mean["request_goodput"][0] < 0.2
