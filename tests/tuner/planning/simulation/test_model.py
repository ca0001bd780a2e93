"""The cost model: right about what moves which way, the same for one plan and for many, near to a known machine."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipetune.bench.metrics import metric_names
from pipetune.bench.spec import Plan, Workload
from pipetune.tuner.planning.costs.nominal import RATES, NominalCosts
from pipetune.tuner.planning.simulation import model as simulation
from pipetune.tuner.planning.simulation.model import CostModel
from tests.record_factory import make_shape

DEVICES = ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
SHAPE = make_shape()


def model(num_prompts: int = 32, prompt_len: int = 64, output_len: int = 16, **changes: object) -> CostModel:
    values = {"num_prompts": num_prompts, "input_len": prompt_len, "output_len": max(1, output_len)}
    workload = Workload.model_validate(values | {"kind": "generate" if output_len else "score"})
    own = CostModel.of_workload(SHAPE, workload, [prompt_len] * num_prompts)
    return dataclasses.replace(own, **changes)  # type: ignore[arg-type]


@pytest.fixture
def cost() -> CostModel:
    return model()


def seconds(cost: CostModel, counts: tuple[int, ...], micro_batch: int, prefill: int | None = None) -> float:
    plan = Plan.from_layer_counts(counts, DEVICES, micro_batch, prefill_micro_batch_size=prefill)
    return cost.predict(plan).duration_s


@pytest.mark.parametrize(
    ("counts", "micro_batch", "measured_s"),
    [((30,), 32, 9.7), ((30,), 16, 14.5), ((30,), 8, 20.1), ((17, 13), 16, 7.5), ((17, 13), 8, 9.7)],
)
def test_it_is_near_to_a_measured_machine(
    cost: CostModel, counts: tuple[int, ...], micro_batch: int, measured_s: float
) -> None:
    """SmolLM2-135M in fp32, one core a stage, weights not packed; the machine itself varies by 10–20 %."""
    unpacked = dataclasses.replace(
        RATES["cpu"], flops_per_s=9e10, bytes_per_s=3e9, head_bytes_per_s=1e10, layer_overhead_s=6e-4
    )
    cost = dataclasses.replace(cost, costs=NominalCosts(SHAPE, {"cpu": unpacked}))
    assert seconds(cost, counts, micro_batch) == pytest.approx(measured_s, rel=0.25)


def test_unbalanced_stages_cost_more(cost: CostModel) -> None:
    assert seconds(cost, (16, 14), 16) < seconds(cost, (20, 10), 16) < seconds(cost, (25, 5), 16)


def test_the_head_wants_fewer_layers_beside_it(cost: CostModel) -> None:
    assert seconds(cost, (16, 14), 8) < seconds(cost, (14, 16), 8)


def test_one_micro_batch_leaves_stages_idle(cost: CostModel) -> None:
    assert seconds(cost, (15, 15), 16) < seconds(cost, (15, 15), 32)


def test_small_prefill_pieces_fill_the_pipeline_until_they_are_too_small(cost: CostModel) -> None:
    assert seconds(cost, (16, 14), 32, prefill=8) < seconds(cost, (16, 14), 32)
    assert seconds(cost, (16, 14), 32, prefill=8) < seconds(cost, (16, 14), 32, prefill=1)


def test_fewer_in_flight_are_slower(cost: CostModel) -> None:
    plan = Plan.from_layer_counts((16, 14), DEVICES, 8)
    assert cost.predict(plan).duration_s == cost.predict(plan, 4).duration_s < cost.predict(plan, 1).duration_s


def test_copies_of_the_model_halve_the_work_and_have_no_bubble(cost: CostModel) -> None:
    one = cost.predict(Plan.from_layer_counts((30,), DEVICES, 16)).duration_s
    two = cost.predict(Plan.from_layer_counts((30,), DEVICES, 16, replicas=2)).duration_s
    assert two == pytest.approx(one / 2)
    assert two < seconds(cost, (16, 14), 16)
    # The replica with most prompts decides.
    odd, three = model(num_prompts=5), model(num_prompts=3)
    two_replicas = Plan.from_layer_counts((15, 15), DEVICES, 4, replicas=2)
    assert seconds(three, (15, 15), 4) == odd.predict(two_replicas).duration_s


def test_the_slower_replica_decides() -> None:
    slow = dataclasses.replace(RATES["cpu"], flops_per_s=RATES["cpu"].flops_per_s / 2)
    cost = model(costs=NominalCosts(SHAPE, {"cpu": RATES["cpu"], "cpu:1": slow}))
    plan = Plan.from_layer_counts((30,), DEVICES, 16, replicas=2)
    prediction = cost.predict(plan)
    assert prediction.limiting_stage == 1
    assert prediction.duration_s == pytest.approx(prediction.stage_busy_s[1])
    assert prediction.stage_busy_s[1] > prediction.stage_busy_s[0]


def test_chunks_fill_the_stages_with_one_long_prompt() -> None:
    cost = model(num_prompts=1, prompt_len=1024, output_len=2)

    def chunked(counts: tuple[int, ...], chunk: int | None) -> float:
        return cost.predict(Plan.from_layer_counts(counts, DEVICES, 1, prefill_chunk_size=chunk)).duration_s

    assert chunked((15, 15), 256) < 0.8 * chunked((15, 15), None)
    assert chunked((15, 15), 256) < chunked((15, 15), 4)
    assert chunked((30,), 256) > chunked((30,), None)
    assert chunked((15, 15), 1024) == chunked((15, 15), None)


def test_scores_are_prefill_with_the_head_on_every_position() -> None:
    score, generate = model(num_prompts=8, output_len=0), model(num_prompts=8, output_len=1)
    # No decode either way; the head meets 64 positions a row, and one.
    assert seconds(score, (30,), 8) > 1.05 * seconds(generate, (30,), 8)
    plan = Plan.from_layer_counts((30,), DEVICES, 8, prefill_chunk_size=16)
    assert not any(kind.is_decode for kind in score.kinds(plan))
    assert all(kind.samples for kind in score.kinds(plan))
    assert sum(kind.samples for kind in generate.kinds(plan)) == 1


def test_unlike_prompts_are_padded_to_the_longest_of_their_micro_batch() -> None:
    lens = (8, 64, 16, 64, 8, 32, 16, 32)
    cost = CostModel.of_workload(SHAPE, Workload(num_prompts=8, output_len=2), lens)
    kinds = cost.kinds(Plan.from_layer_counts((15, 15), DEVICES, 2))
    assert {kind.new_tokens: count for kind, count in kinds.items() if not kind.is_decode} == {
        64: 1,
        32: 1,
        16: 1,
        8: 1,
    }
    # Each replica has of every length its part.
    halves = cost.kinds(Plan.from_layer_counts((30,), DEVICES, 2, replicas=2))
    assert {kind.new_tokens: count for kind, count in halves.items() if not kind.is_decode} == {64: 1, 16: 1}


def test_many_plans_are_predicted_as_each_alone(cost: CostModel) -> None:
    orders = (DEVICES, DEVICES[::-1])
    plans = [
        (Plan.from_layer_counts(counts, order, size, prefill_micro_batch_size=size // 2, replicas=replicas), in_flight)
        for order in orders
        for counts, replicas in (((16, 14), 1), ((10, 20), 1), ((16, 14), 2), ((8, 8, 8, 6), 1), ((30,), 3))
        for size in (4, 8)
        for in_flight in (2, None)
    ]
    for (plan, in_flight), together in zip(plans, cost.predict_many(plans), strict=True):
        alone = cost.predict(plan, in_flight)
        assert together.metrics == pytest.approx(alone.metrics, abs=1e-9)
        assert together.stage_busy_s == pytest.approx(alone.stage_busy_s)
        assert (together.limiting_stage, together.limited_by) == (alone.limiting_stage, alone.limited_by)
    assert cost.predict_many([]) == ()


def test_stages_compute_what_their_tasks_cost(cost: CostModel) -> None:
    plan = Plan.from_layer_counts((12, 10, 8), DEVICES, 8, prefill_micro_batch_size=4)
    kinds = cost.kinds(plan, 3)
    assert sum(kinds.values()) == 32 // 4 + 15 * 32 // 8
    busy = [
        sum(
            count
            * (
                float(cost.costs.layers_s(stage.device, kind)[stage.first_layer : stage.end_layer].sum())
                + cost.costs.ends_s(stage.device, kind, is_first=index == 0, is_last=index == 2)
            )
            for kind, count in kinds.items()
        )
        for index, stage in enumerate(plan.stages)
    ]
    assert cost.predict(plan, 3).stage_busy_s == pytest.approx(busy)


def test_metrics_are_those_that_a_run_yields() -> None:
    unknown = {"peak_memory_bytes", "peak_memory_fraction"}
    for output_len in (0, 1, 4):
        prediction = model(num_prompts=10, output_len=output_len).predict(Plan.from_layer_counts((15, 15), DEVICES, 2))
        assert set(prediction.metrics) == set(metric_names(10, output_len)) - unknown
        assert all(math.isfinite(value) for value in prediction.metrics.values())


def test_hand_overs_and_stalls_cost_time_between_stages_alone(cost: CostModel) -> None:
    without = dataclasses.replace(cost, gaps_s={}, stalls_s={})
    assert seconds(without, (30,), 8) == seconds(cost, (30,), 8)
    gaps = dataclasses.replace(cost, stalls_s={})
    assert seconds(without, (15, 15), 8) < seconds(gaps, (15, 15), 8) < seconds(cost, (15, 15), 8)
    # A device's own comes before that of its kind.
    slower = dataclasses.replace(cost, gaps_s={"cpu": 3e-4, "cpu:1": 0.1})
    assert seconds(slower, (15, 15), 8) > 1.1 * seconds(cost, (15, 15), 8)


class Cards(NominalCosts):
    """Nominal costs and slow links between hosts."""

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        between = HOSTS[source] != HOSTS[target]
        return 1e-3 + num_bytes / RATE if between else super().hop_s(source, target, num_bytes)


RATE = 1e6
HOSTS: dict[str, str] = {}


@given(hosts=st.lists(st.sampled_from("abc"), min_size=4, max_size=4), replicas=st.sampled_from((1, 2)))
@example(hosts=["a", "b", "a", "b"], replicas=1)
@example(hosts=["a", "b", "a", "b"], replicas=2)
@example(hosts=["a", "b", "a", "c"], replicas=1)
@settings(deadline=None)
def test_what_goes_through_a_network_card_takes_as_long_as_its_bytes(hosts: list[str], replicas: int) -> None:
    HOSTS.update(zip(DEVICES, hosts, strict=True))
    own = model(num_prompts=12, output_len=1, costs=Cards(SHAPE))
    plan = Plan.from_layer_counts((8, 8, 7, 7) if replicas == 1 else (15, 15), DEVICES, 1, replicas=replicas)
    message_s = 64 * SHAPE.crossing_bytes / RATE
    width = 4 // replicas
    edges = [ends for stage, ends in enumerate(itertools.pairwise(hosts), start=1) if stage % width]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "device_host", HOSTS.__getitem__)
        duration_s = own.predict(plan).duration_s
    for host, end in itertools.product("abc", (0, 1)):
        messages = 12 // replicas * sum(ends[end] == host and ends[0] != ends[1] for ends in edges)
        # Replicas are simulated alone, so that their last messages are thought to go at once.
        assert duration_s >= (messages - (replicas - 1)) * message_s
