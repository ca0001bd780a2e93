"""The analytic cost: right about what moves which way, and near to a machine whose times are known."""

from __future__ import annotations

import pytest

from bench.memory import ModelShape
from bench.spec import Plan
from tests.record_factory import make_shape
from tuner.planning.cost import CostModel

DEVICES = ("cpu:0", "cpu:1", "cpu:2", "cpu:3")


@pytest.fixture
def cost() -> CostModel:
    return CostModel(shape=make_shape(), num_prompts=32, prompt_len=64, output_len=16)


def seconds(cost: CostModel, counts: tuple[int, ...], micro_batch: int, prefill: int | None = None) -> float:
    return cost.duration_s(Plan.from_layer_counts(counts, DEVICES, micro_batch, prefill_micro_batch_size=prefill))


@pytest.mark.parametrize(
    ("counts", "micro_batch", "measured_s"),
    [((30,), 32, 9.7), ((30,), 16, 14.5), ((30,), 8, 20.1), ((17, 13), 16, 7.5), ((17, 13), 8, 9.7)],
)
def test_it_is_near_to_a_measured_machine(
    cost: CostModel, counts: tuple[int, ...], micro_batch: int, measured_s: float
) -> None:
    """SmolLM2-135M in fp32, one core a stage; the machine itself varies by 10–20 %."""
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
    assert cost.duration_s(plan, 4) < cost.duration_s(plan, 1)


def test_routed_experts_are_read_as_far_as_tokens_choose_them() -> None:
    dense = make_shape()
    layer = dense.layers[0].model_copy(update={"active_params": dense.layers[0].active_params // 8})
    shape: ModelShape = dense.model_copy(update={"layers": (layer,) * 30})
    sparse = CostModel(shape=shape, num_prompts=1, prompt_len=4, output_len=64)
    full = CostModel(shape=dense, num_prompts=1, prompt_len=4, output_len=64)
    assert seconds(sparse, (30,), 1) < 0.6 * seconds(full, (30,), 1)
