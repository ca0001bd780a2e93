"""What is tried first: new, feasible, varied, and one of every kind."""

from __future__ import annotations

from bench.spec import EffectivePlan
from tests.tuner.search.space_factory import MIB, build
from tuner.search.head import head
from tuner.search.resolver import identity


def test_the_head_is_new_feasible_and_varied() -> None:
    space, cost, resolve = build(memory=500 * MIB)
    points = head(space, cost, resolve, 20)
    assert len(points) == 14
    resolved = [resolve(space.plan(point)) for point in points]
    assert all(isinstance(one, EffectivePlan) for one in resolved)
    assert len({identity(space.plan(point), one) for point, one in zip(points, resolved, strict=True)}) == 14
    assert len({point["micro_batch_index"] for point in points[:6]}) > 1
    first = space.plan(points[0])
    assert len(first.stages) == 2
    assert abs(first.layer_counts[0] - 16) <= 1


def test_a_space_within_the_budget_is_tried_whole() -> None:
    space, cost, resolve = build(
        min_stages=2, micro_batch_sizes=(8, 16), prefill_micro_batch_sizes=(8,), memory_fractions=(0.9,)
    )
    points = head(space, cost, resolve, 100)
    assert len(points) == 29 * 2
    assert cost.duration_s(space.plan(points[0])) <= cost.duration_s(space.plan(points[-1]))


def test_what_the_model_knows_least_of_is_tried_once_at_least() -> None:
    space, cost, resolve = build(4, num_prompts=16, input_len=512, min_stages=1, max_stages=2, compile="search")
    plans = [space.plan(point) for point in head(space, cost, resolve, 12)]
    assert len(plans) == 8
    assert {plan.replicas for plan in plans} == {1, 2, 4}
    assert {plan.compile for plan in plans} == {False, True}
    assert any(plan.prefill_chunk_size is not None for plan in plans)
    assert any(plan.prefill_chunk_size is None for plan in plans)


def test_a_small_budget_is_kept() -> None:
    space, cost, resolve = build(2, compile="search")
    assert len(head(space, cost, resolve, 1)) == 1
    assert len(head(space, cost, resolve, 3)) == 2
