"""How a space is laid out: partitions that fit, replicas that the devices give, caps and chunks that matter."""

from __future__ import annotations

from typing import Any

import pytest

from bench.errors import ConfigError, NothingFeasibleError
from bench.spec import EffectivePlan
from tests.tuner.search.space_factory import GIB, MIB, SHAPE, build
from tuner.config import SpaceConfig
from tuner.search import build as b
from tuner.search.space import SearchSpace


def layouts(space: SearchSpace) -> set[tuple[int, int]]:
    """Pairs of replicas and stages."""
    counts = space.replicas or (1,) * len(space.partitions)
    return {(replicas, len(partition)) for replicas, partition in zip(counts, space.partitions, strict=True)}


def test_good_partitions_have_low_ranks() -> None:
    space, *_ = build(4, replicas=(1,))
    assert len(space.partitions) == b.MAX_PARTITIONS
    assert space.replicas == ()
    best = space.partitions[0]
    assert len(best) == 4
    assert max(best) - min(best) <= 2


@pytest.mark.parametrize(
    ("num_devices", "bounds", "expected"),
    [
        (1, {}, {(1, 1)}),
        (2, {}, {(1, 1), (1, 2), (2, 1)}),
        (2, {"min_stages": 2}, {(1, 2)}),
        (3, {"max_stages": 1}, {(1, 1), (3, 1)}),
        (4, {"min_stages": 2, "max_stages": 2}, {(1, 2), (2, 2)}),
        (4, {"replicas": (2, 4)}, {(2, 2), (4, 1)}),
        (4, {"replicas": (3,)}, {(3, 1)}),
        (4, {"num_prompts": 3, "max_stages": 2}, {(1, 1), (1, 2), (2, 2)}),
    ],
)
def test_replicas_are_what_the_devices_divide_into(
    num_devices: int, bounds: dict[str, Any], expected: set[tuple[int, int]]
) -> None:
    space, *_ = build(num_devices, **bounds)
    assert layouts(space) == expected


def test_replicas_must_fit_as_one_pipeline_must() -> None:
    whole = 30 * SHAPE.layers[0].weight_bytes + 2 * SHAPE.embedding_bytes
    roomy, *_ = build(memory=4 * whole)
    tight, *_ = build(memory=int(0.8 * whole / 0.9))
    assert 2 in roomy.replicas
    assert tight.replicas == ()


def test_every_number_of_replicas_keeps_its_best_partition() -> None:
    """However the cost model ranks it: four pipelines of one stage are one entry among hundreds."""
    space, *_ = build(4)
    assert {1, 2, 4} == set(space.replicas)
    assert space.partitions[space.replicas.index(4)] == (30,)


def test_replicas_without_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"space\.replicas=2: 1 prompts over 2 devices .*; allow 1"):
        build(num_prompts=1, replicas=(2,))


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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"input_len": 127}, (None,)),
        ({"input_len": 128}, (64, None)),
        ({"input_len": 300}, (80, 160, None)),
        ({"input_len": 1000}, (128, 256, 512, None)),
        ({"input_len": 1000, "num_prompts": 17}, (None,)),
        ({"input_len": 1000, "num_devices": 1}, (None,)),
        ({"input_len": 64, "prefill_chunk_sizes": (16, 32, 64, 99)}, (16, 32, None)),
        ({"input_len": 64, "prefill_chunk_sizes": (16,)}, (16,)),
        ({"input_len": 1000, "prefill_chunk_sizes": (None,)}, (None,)),
    ],
)
def test_prompts_are_cut_where_they_are_long_and_few(values: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    space, *_ = build(**{"num_prompts": 16, "max_stages": 1, "replicas": (1,), **values})
    assert space.chunk_sizes == expected
    assert ("chunk_index" in space.dimensions()) == (len(expected) > 1)


def test_prefill_of_a_recurrent_model_is_never_cut() -> None:
    shape = SHAPE.model_copy(update={"recurrent": True})
    space, *_ = build(shape=shape, num_prompts=8, input_len=512)
    plans = [space.plan(point) for point in space.points()]
    assert all(plan.prefill_size == plan.micro_batch_size and plan.prefill_chunk_size is None for plan in plans)
    for name in ("prefill_micro_batch_sizes", "prefill_chunk_sizes"):
        with pytest.raises(ConfigError, match=rf"space\.{name}: .* recurrent states"):
            build(shape=shape, **{name: (4,)})  # type: ignore[arg-type]


def test_switches_hold_for_every_plan_and_a_searched_one_is_a_dimension() -> None:
    space, *_ = build(compile="search", packed_weights=False, cuda_graphs=False, max_stages=1)
    assert space.dimensions()["compile_index"] == (0, 1, False)
    plans = [space.plan(point) for point in space.points()]
    assert {plan.compile for plan in plans} == {False, True}
    assert not any(plan.packed_weights or plan.cuda_graphs for plan in plans)
    always, *_ = build(compile=True, max_stages=1)
    assert "compile_index" not in always.dimensions()
    assert all(always.plan(point).compile for point in always.points())


def test_the_size_of_a_space_counts_replicas() -> None:
    config = SpaceConfig()
    one = b.count_raw_partitions(SpaceConfig(replicas=(1,)), SHAPE, 4, 32)
    assert one == 1 + 29 + 29 * 28 // 2 + 29 * 28 * 27 // 6
    assert b.count_raw_partitions(config, SHAPE, 4, 32) == one + 29 + 1
