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


def test_copies_of_the_model_halve_the_work_and_have_no_bubble(cost: CostModel) -> None:
    one = cost.duration_s(Plan.from_layer_counts((30,), DEVICES, 16))
    two = cost.duration_s(Plan.from_layer_counts((30,), DEVICES, 16, replicas=2))
    assert two == pytest.approx(one / 2)
    assert two < seconds(cost, (16, 14), 16)
    # A share that is not whole is rounded up: the replica with most prompts decides.
    odd = CostModel(shape=make_shape(), num_prompts=5, prompt_len=64, output_len=16)
    three = CostModel(shape=make_shape(), num_prompts=3, prompt_len=64, output_len=16)
    assert seconds(three, (15, 15), 4) == odd.duration_s(Plan.from_layer_counts((15, 15), DEVICES, 4, replicas=2))


def test_chunks_fill_the_stages_with_one_long_prompt() -> None:
    cost = CostModel(shape=make_shape(), num_prompts=1, prompt_len=1024, output_len=2)

    def chunked(counts: tuple[int, ...], chunk: int | None) -> float:
        return cost.duration_s(Plan.from_layer_counts(counts, DEVICES, 1, prefill_chunk_size=chunk))

    assert chunked((15, 15), 256) < 0.8 * chunked((15, 15), None)
    assert chunked((15, 15), 256) < chunked((15, 15), 4)
    assert chunked((30,), 256) > chunked((30,), None)
    assert chunked((15, 15), 1024) == chunked((15, 15), None)


def test_scores_are_prefill_with_the_head_on_every_position() -> None:
    score, generate = (
        CostModel(shape=make_shape(), num_prompts=8, prompt_len=64, output_len=length) for length in (0, 1)
    )
    # No decode either way; the head meets 64 positions a row, and one.
    assert seconds(score, (30,), 8) > 1.05 * seconds(generate, (30,), 8)
    assert score.decode_s([("cpu:0", 0, 30)], 8) == 0


def test_routed_experts_are_read_as_far_as_tokens_choose_them() -> None:
    dense = make_shape()
    layer = dense.layers[0].model_copy(update={"active_params": dense.layers[0].active_params // 8})
    shape: ModelShape = dense.model_copy(update={"layers": (layer,) * 30})
    sparse = CostModel(shape=shape, num_prompts=1, prompt_len=4, output_len=64)
    full = CostModel(shape=dense, num_prompts=1, prompt_len=4, output_len=64)
    assert seconds(sparse, (30,), 1) < 0.6 * seconds(full, (30,), 1)
