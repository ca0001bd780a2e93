"""The search space: every point a plan, ranks that stay, caps that matter only when they change something."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import ConfigError, NothingFeasibleError
from bench.memory import ModelShape, check_plan
from bench.record import Failure
from bench.spec import EffectivePlan, Workload
from tests.record_factory import make_shape
from tuner.config import SpaceConfig
from tuner.planning.cost import CostModel
from tuner.search import space as sp

SHAPE = make_shape()
GIB = 2**30
MIB = 2**20


def build(
    num_devices: int = 2,
    *,
    num_prompts: int = 32,
    memory: int = 4 * GIB,
    shape: ModelShape = SHAPE,
    **bounds: Any,
) -> tuple[sp.SearchSpace, CostModel, sp.Resolver]:
    devices = tuple(f"cpu:{index}" for index in range(num_devices))
    workload = Workload(num_prompts=num_prompts, output_len=16)
    lens = [64] * num_prompts
    cost = CostModel.of_workload(shape, workload, lens)
    resolve = sp.Resolver.of_workload(shape, workload, lens, dict.fromkeys(devices, memory))
    return sp.build_space(SpaceConfig.model_validate(bounds), devices, shape, cost, resolve), cost, resolve


SPACES = [
    build(num_devices, num_prompts=num_prompts) for num_devices, num_prompts in ((1, 1), (2, 7), (3, 32), (4, 70))
]


@given(data=st.data())
def test_every_point_is_a_plan_of_the_model(data: st.DataObject) -> None:
    space, cost, resolve = data.draw(st.sampled_from(SPACES))
    point = {name: data.draw(st.integers(low, high), label=name) for name, (low, high, _) in space.dimensions().items()}
    plan = space.plan(point)
    check_plan(SHAPE, plan)
    assert plan.micro_batch_size <= cost.num_prompts
    assert plan.prefill_size <= plan.micro_batch_size
    assert isinstance(resolve(plan), EffectivePlan)


def test_a_space_reads_back_as_it_was() -> None:
    space, *_ = build()
    assert sp.SearchSpace.model_validate_json(space.model_dump_json()) == space


def test_good_partitions_have_low_ranks() -> None:
    space, *_ = build(4)
    assert len(space.partitions) == sp.MAX_PARTITIONS
    best = space.partitions[0]
    assert len(best) == 4
    assert max(best) - min(best) <= 2


def test_caps_that_make_no_difference_are_no_dimension() -> None:
    roomy, *_ = build(memory=64 * GIB)
    assert "memory_index" not in roomy.dimensions()
    assert roomy.plan(next(roomy.points())).stages[0].memory_fraction == 0.9
    tight, _, resolve = build(memory=500 * MIB)
    assert tight.dimensions()["memory_index"] == (0, 2, False)
    outcomes = {
        resolved.in_flight
        if isinstance(resolved := resolve(tight.plan({**point, "memory_index": index})), EffectivePlan)
        else 0
        for point in tight.points()
        for index in range(3)
    }
    assert len(outcomes) > 1


def test_partitions_that_fit_nowhere_are_left_out() -> None:
    whole = 30 * SHAPE.layers[0].weight_bytes + SHAPE.embedding_bytes
    space, *_ = build(memory=int(0.75 * whole / 0.9))
    assert space.partitions
    assert all(len(counts) == 2 and max(counts) < 28 for counts in space.partitions)


def test_nothing_fits_is_said_with_the_nearest_plan() -> None:
    with pytest.raises(NothingFeasibleError, match=r"no plan fits into memory; .* needs .* MiB"):
        build(memory=50 * MIB)


@pytest.mark.parametrize(("bounds", "named"), [({"min_stages": 31}, "min_stages=31"), ({"max_stages": 40}, "40")])
def test_more_stages_than_layers_are_refused(bounds: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named}.* has 30 layers"):
        build(40, **bounds)


def test_forbidden_cuts_are_never_proposed() -> None:
    shape = SHAPE.model_copy(update={"forbidden_cuts": tuple(range(12, 19))})
    space, *_ = build(shape=shape)
    assert all(counts[0] not in shape.forbidden_cuts for counts in space.partitions if len(counts) > 1)


def test_given_sizes_are_kept_to_what_the_workload_has() -> None:
    space, *_ = build(num_prompts=10, micro_batch_sizes=(2, 8, 64), prefill_micro_batch_sizes=(4, 99))
    assert space.micro_batch_sizes == (2, 8, 10)
    assert space.prefill_sizes == (4, 10)


def test_the_head_is_new_feasible_and_varied() -> None:
    space, cost, resolve = build(memory=500 * MIB)
    points = sp.head(space, cost, resolve, 20)
    assert len(points) == 14
    resolved = [resolve(space.plan(point)) for point in points]
    assert all(isinstance(one, EffectivePlan) for one in resolved)
    assert len({sp.identity(space.plan(point), one) for point, one in zip(points, resolved, strict=True)}) == 14
    assert len({point["micro_batch_index"] for point in points[:6]}) > 1
    first = space.plan(points[0])
    assert len(first.stages) == 2
    assert abs(first.layer_counts[0] - 16) <= 1


def test_a_space_within_the_budget_is_tried_whole() -> None:
    space, cost, resolve = build(
        min_stages=2, micro_batch_sizes=(8, 16), prefill_micro_batch_sizes=(8,), memory_fractions=(0.9,)
    )
    points = sp.head(space, cost, resolve, 100)
    assert len(points) == 29 * 2
    assert cost.duration_s(space.plan(points[0])) <= cost.duration_s(space.plan(points[-1]))


def test_overrun_is_graded() -> None:
    def failure(wanted: int | None, had: int | None) -> Failure:
        return Failure(kind="over_memory_cap", message="", bytes_wanted=wanted, bytes_had=had)  # type: ignore[arg-type]

    assert sp.overrun(failure(300, 100)) == pytest.approx(2.0)
    assert sp.overrun(failure(101, 100)) < sp.overrun(failure(150, 100)) < sp.overrun(failure(None, None))
