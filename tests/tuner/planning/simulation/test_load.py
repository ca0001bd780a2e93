"""Plans under arrivals: what must hold of any load, and agreement with the schedule where all prompts come at once."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.load.arrivals import unit_trace
from pipetune.bench.load.rates import RateSearch
from pipetune.bench.profile import TaskKind
from pipetune.bench.spec import Goodput, Lane, Plan
from pipetune.tuner.planning.costs.contention import Contention
from pipetune.tuner.planning.simulation.load import LoadedRequest, simulate_load
from pipetune.tuner.planning.simulation.model import CostModel
from tests.tuner.planning.factory_costs import make_model

DEVICES = ("cpu:0", "cpu:1")
MODEL = make_model()
JOINING = dataclasses.replace(MODEL, shape=MODEL.shape.model_copy(update={"joins": True}))
LAYERS = len(MODEL.shape.layers)


def plan_of(first: int, rows: int = 4, *, prefill: int | None = None, chunk: int | None = None) -> Plan:
    plan = Plan.from_layer_counts((first, LAYERS - first), DEVICES, rows)
    return plan.model_copy(update={"prefill_micro_batch_size": prefill, "prefill_chunk_size": chunk})


def doubled(rows: int) -> Plan:
    whole = Plan.from_layer_counts((LAYERS,), DEVICES[:1], rows)
    return whole.model_copy(update={"replicas": 2, "replica_devices": (("cpu:1",),)})


def requests(count: int, rate: float, *, prompt_len: int = 16, output_len: int = 6) -> list[LoadedRequest]:
    return [
        LoadedRequest(at_s=at / rate, prompt_len=prompt_len, output_len=output_len) for at in unit_trace(count, 1.0, 0)
    ]


@given(
    st.integers(1, LAYERS - 1),
    st.integers(1, 6),
    st.none() | st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 60), st.integers(1, 8)), min_size=1, max_size=30),
    st.sampled_from([(Lane(),), (Lane(up_to_tokens=20, weight=4), Lane())]),
    st.sampled_from([MODEL, JOINING]),
)
def test_what_holds_of_any_load(
    first: int,
    rows: int,
    chunk: int | None,
    given_: list[tuple[float, int, int]],
    lanes: tuple[Lane, ...],
    model: CostModel,
) -> None:
    load = [LoadedRequest(at_s=at, prompt_len=inputs, output_len=outputs) for at, inputs, outputs in sorted(given_)]
    plan = plan_of(first, rows, chunk=chunk).model_copy(update={"lanes": lanes})
    found = simulate_load(model, plan, 2, load)
    for ttft, tpot, e2el, request in zip(
        *(found.times_s[name] for name in ("ttft", "tpot", "e2el")), load, strict=True
    ):
        assert 0 < ttft <= e2el
        assert e2el == pytest.approx(ttft + tpot * (request.output_len - 1))
    metrics = found.metrics()
    area = 2 * found.duration_s
    assert sum(found.busy_s) + found.idle_s + metrics["bubble_ratio"] * area == pytest.approx(area, abs=1e-9)
    assert min(metrics["bubble_ratio"], metrics["idle_ratio"]) >= -1e-9
    assert found.idle_s >= 2 * load[0].at_s - 1e-9


def test_a_step_within_a_prefill_costs_less_than_beside_it() -> None:
    plan, kinds = plan_of(LAYERS // 2), (TaskKind(2, 20, 0), TaskKind(4, 1, 24))
    (prefill, _, _), (step, _, _) = (MODEL.task_s(plan, kind) for kind in kinds)
    joined, _, _ = MODEL.joined_s(plan, kinds)
    (few, _, _), (twice, _, _) = (MODEL.task_s(plan, TaskKind(1, tokens, 0)) for tokens in (16, 32))
    for stage, seconds in enumerate(joined):
        assert prefill[stage] <= seconds < prefill[stage] + step[stage]
        # What a pass takes whatever its tokens is in both.
        once = min(2 * few[stage] - twice[stage], step[stage])
        assert seconds == pytest.approx(prefill[stage] + step[stage] - once)
    rest = MODEL.task_s(plan, kinds[0])
    assert MODEL.joined_s(plan, kinds[:1]) == rest


def test_joined_passes_serve_a_burst_sooner() -> None:
    load = [LoadedRequest(at_s=0.01 * number, prompt_len=5 + number % 30, output_len=8) for number in range(60)]
    apart, joined = (simulate_load(model, plan_of(LAYERS // 2), 2, load) for model in (MODEL, JOINING))
    assert joined.duration_s < apart.duration_s
    assert sum(joined.busy_s) < sum(apart.busy_s)


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 60), st.integers(1, 8)), min_size=1, max_size=30),
    st.none() | st.integers(1, 20),
)
def test_prefills_a_step_change_nothing_where_each_takes_the_only_slot_along(
    given_: list[tuple[float, int, int]], chunk: int | None
) -> None:
    load = [LoadedRequest(at_s=at, prompt_len=inputs, output_len=outputs) for at, inputs, outputs in sorted(given_)]
    plan = Plan.from_layer_counts((LAYERS,), DEVICES[:1], 4).model_copy(update={"prefill_chunk_size": chunk})
    steady = plan.model_copy(update={"lanes": (Lane(prefills_per_decode=1),)})
    assert simulate_load(JOINING, steady, 1, load) == simulate_load(JOINING, plan, 1, load)


def test_a_request_alone_takes_what_its_tasks_take() -> None:
    plan = plan_of(LAYERS // 2)
    alone = dataclasses.replace(MODEL, prompt_lens=(16,), output_lens=(6,))
    found = simulate_load(alone, plan, 1, [LoadedRequest(at_s=2.0, prompt_len=16, output_len=6)])
    predicted = alone.predict(plan, 1)
    assert found.times_s["e2el"][0] == pytest.approx(predicted.duration_s)
    assert found.times_s["ttft"][0] == pytest.approx(predicted.metrics["mean_ttft_ms"] / 1e3)
    assert found.busy_s == pytest.approx(predicted.stage_busy_s)
    assert found.idle_s == pytest.approx(4.0)


@pytest.mark.parametrize("plan", [plan_of(LAYERS // 2), plan_of(LAYERS // 3, prefill=2), doubled(4)])
def test_all_at_once_takes_as_long_as_the_schedule_of_a_batch(plan: Plan) -> None:
    batch = dataclasses.replace(MODEL, prompt_lens=(16,) * 32, output_lens=(6,) * 32)
    found = simulate_load(batch, plan, 2, [LoadedRequest(at_s=0.0, prompt_len=16, output_len=6)] * 32)
    assert found.duration_s == pytest.approx(batch.predict(plan, 2).duration_s, rel=0.05)
    assert found.idle_s == pytest.approx(0.0, abs=0.1 * found.duration_s if plan.replicas > 1 else 1e-9)


def test_the_same_load_gives_the_same_times_and_more_load_longer_ones() -> None:
    plan = plan_of(LAYERS // 2)
    means = [
        simulate_load(MODEL, plan, 2, requests(100, rate)).metrics()["mean_ttft_ms"] for rate in (1.0, 1.0, 8.0, 50.0)
    ]
    assert means[0] == means[1] < means[2] < means[3]


def test_what_is_beyond_the_concurrency_waits_and_its_latency_counts_that() -> None:
    plan, load = plan_of(LAYERS // 2), [LoadedRequest(at_s=0.0, prompt_len=16, output_len=6)] * 3
    (alone,) = simulate_load(MODEL, plan, 2, load[:1]).times_s["e2el"]
    found = simulate_load(MODEL, plan, 2, load, max_concurrency=1).times_s["e2el"]
    # The first stage knows a token a hop later than the last.
    assert found == pytest.approx([alone, 2 * alone, 3 * alone], rel=0.01)
    (alone,) = simulate_load(MODEL, doubled(4), 2, load[:1]).times_s["e2el"]
    shared = simulate_load(MODEL, doubled(4), 2, load, max_concurrency=2)
    assert shared.times_s["e2el"] == pytest.approx([alone, alone, 2 * alone])
    assert shared.idle_s == pytest.approx(alone)
    one_place = simulate_load(MODEL, doubled(4), 2, load, max_concurrency=1)
    assert one_place.times_s["e2el"] == pytest.approx([alone, 2 * alone, 3 * alone])
    assert one_place.idle_s == pytest.approx(one_place.duration_s)


def test_a_stage_that_computes_alone_takes_less() -> None:
    contended = dataclasses.replace(MODEL, contention=Contention(prefill=0.5, decode=0.5, devices=2))
    load = [LoadedRequest(at_s=0.0, prompt_len=16, output_len=6)]
    alone, together = (simulate_load(model, plan_of(LAYERS // 2), 1, load) for model in (contended, MODEL))
    assert sum(alone.busy_s) == pytest.approx(sum(together.busy_s) * 2.718281828**-0.5)
    # Of replicas the one that has nothing to do slows nobody down.
    alone, together = (simulate_load(model, doubled(4), 1, load) for model in (contended, MODEL))
    assert sum(alone.busy_s) == pytest.approx(sum(together.busy_s) * 2.718281828**-0.5)


def test_limits_are_kept_up_to_a_rate() -> None:
    plan, goodput = plan_of(LAYERS // 2), Goodput(ttft=400)
    asked = []

    def attainment(rate: float) -> float:
        asked.append(rate)
        return simulate_load(MODEL, plan, 2, requests(200, rate)).metrics(goodput)["slo_attainment"]

    search = RateSearch(wanted=0.9, guess=1.0, tolerance=0.01, most=30, lowest=2**12)
    rate = search.run(attainment)
    assert attainment(search.sustained) >= 0.9 > attainment(rate * 1.05)
    assert rate < search.sustained * 1.01
    assert len(asked) < 20
