"""How a space is laid out: partitions that fit, replicas that the devices give, caps and chunks that matter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from pipetune.bench.errors import ConfigError, NothingFeasibleError
from pipetune.bench.spec import Arrivals, EffectivePlan, Lane, Plan, device_index
from pipetune.tuner.config.schema import SpaceConfig
from pipetune.tuner.planning.costs.nominal import NominalCosts
from pipetune.tuner.search.space import build as b
from pipetune.tuner.search.space.space import SearchSpace, candidates
from tests.evaluation.search.landscape import all_partitions
from tests.tuner.search.space_factory import GIB, MIB, SHAPE, build


def layouts(space: SearchSpace) -> set[tuple[int, int]]:
    """Pairs of replicas and stages."""
    counts = space.replicas or (1,) * len(space.partitions)
    return {(replicas, len(partition)) for replicas, partition in zip(counts, space.partitions, strict=True)}


def test_good_partitions_have_low_ranks() -> None:
    space, *_ = build(4, replicas=(1,))
    assert 200 < len(space.partitions) <= b.MAX_PARTITIONS
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


def test_a_cap_in_bytes_holds_whatever_the_devices_have() -> None:
    for memory in (1, 4, 256):
        space, _, resolve = build(memory=memory * GIB, max_memory_per_device="500MiB")
        assert layouts(space) == {(1, 2)}, "the model is too large for one device, once or twice"
        plan = space.plan(next(space.points()))
        assert {stage.cap_bytes(memory * GIB) for stage in plan.stages} == {500 * MIB}
        assert max(resolve.needed_bytes(EffectivePlan(plan=plan, in_flight=1)).values()) <= 500 * MIB
    with pytest.raises(NothingFeasibleError, match=r"cap is 100 MiB.*or a larger max_memory_per_device"):
        build(max_memory_per_device="100MiB")


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
        with pytest.raises(ConfigError, match=rf"space\.{name}: .* whole prompts"):
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


def orders_of(space: SearchSpace, replicas: int = 1, stages: int = 2) -> list[tuple[int, ...]]:
    """Of the entries with so many replicas and stages, best first."""
    counts = space.replicas or (1,) * len(space.partitions)
    orders = space.orders or ((),) * len(space.partitions)
    entries = zip(space.partitions, counts, orders, strict=True)
    return [order for partition, count, order in entries if count == replicas and len(partition) == stages]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"speeds": (1.0, 0.99, 1.0)},
        {"memory": (4 * GIB, 4 * GIB - MIB, 4 * GIB)},
        {"speeds": (1.0, 0.5, 1.0), "device_order": "given"},
    ],
)
def test_devices_that_are_alike_or_in_a_given_order_are_not_moved(changes: dict[str, Any]) -> None:
    space, *_ = build(3, **changes)
    assert space.orders == ()
    entries = list(zip(space.partitions, space.replicas, strict=True))
    assert len(entries) == len(set(entries))


def test_unlike_devices_are_tried_in_every_order_and_the_slow_one_is_left_out() -> None:
    space, *_ = build(3, speeds=(1.0, 0.5, 1.0))
    assert orders_of(space)[0] == (0, 2)
    assert {(), (1, 0), (0, 2)} <= set(orders_of(space))
    # The first and the third device are equal, and stand for one another.
    assert not {(2, 0), (1, 2), (2, 1)} & set(orders_of(space))
    pipelines = [plan for point in space.points() if (plan := space.plan(point)).replicas == 1]
    assert {plan.devices[0] for plan in pipelines} == {"cpu:0", "cpu:1"}


def test_a_device_with_more_memory_may_take_the_larger_end() -> None:
    """The last stage holds a second embedding, and its device is too small for it in the order given."""
    layers = 30 * SHAPE.layers[0].weight_bytes
    small = int((SHAPE.embedding_bytes + 0.2 * layers) / 0.9)
    space, *_ = build(memory=(4 * GIB, small), min_stages=2, max_stages=2)
    assert set(orders_of(space)) == {(), (1, 0)}
    given_, *_ = build(memory=(4 * GIB, small), min_stages=2, max_stages=2, device_order="given")
    assert set(given_.partitions) <= set(space.partitions)


def test_every_stage_of_replicas_on_unlike_devices_has_equal_ones() -> None:
    space, *_ = build(4, speeds=(1.0, 1.0, 0.5, 0.5), replicas=(2,))
    assert set(orders_of(space, replicas=2)) == {(0, 2, 1, 3), (2, 0, 3, 1)}


def test_replicas_take_the_fastest_of_unlike_devices() -> None:
    space, *_ = build(4, speeds=(0.5, 1.0, 1.0, 1.0), replicas=(3,))
    assert orders_of(space, replicas=3, stages=1) == [(1, 2, 3)]


@pytest.mark.parametrize("speeds", [None, (1.0, 0.6, 0.6)])
def test_no_plan_is_predicted_much_better_than_the_best_of_the_space(speeds: tuple[float, ...] | None) -> None:
    """All partitions, orders and sizes, of layers of which some are heavy to prefill and some to decode."""
    heavy = SHAPE.layers[0].model_copy(update={"active_params": 4 * SHAPE.layers[0].active_params})
    wide = SHAPE.layers[0].model_copy(update={"kv_bytes_per_token": 40 * SHAPE.layers[0].kv_bytes_per_token})
    shape = SHAPE.model_copy(update={"layers": (heavy,) * 4 + (wide,) * 3 + SHAPE.layers[:4]})
    space, cost, resolve = build(3, shape=shape, speeds=speeds, replicas=(1,), memory=64 * GIB)
    plans = []
    for stages in (1, 2, 3):
        for order in itertools.permutations(space.devices, stages):
            for partition in all_partitions(shape.num_layers, min_stages=stages, max_stages=stages):
                plans += [
                    Plan.from_layer_counts(partition, order, rows, prefill_micro_batch_size=prefill)
                    for rows in space.micro_batch_sizes
                    for prefill in space.prefill_sizes
                    if prefill <= rows
                ]
    every = min(one.duration_s for one in cost.predict_many([(plan, None) for plan in plans]))
    found = [one.effective for one in candidates(space, resolve)]
    best = min(one.duration_s for one in cost.predict_many([(one.plan, one.in_flight) for one in found]))
    assert best <= 1.003 * every
    assert len(found) < len(plans)


def test_a_space_is_laid_out_alike_every_time() -> None:
    one, two = (build(3, speeds=(1.0, 0.5, 0.8))[0].model_copy(update={"study_id": ""}) for _ in range(2))
    assert one == two


class TwoHosts(NominalCosts):
    """Nominal costs; devices of odd numbers are on another host, behind a slow link."""

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        far = (device_index(source) + device_index(target)) % 2
        return super().hop_s(source, target, num_bytes) * (50.0 if far else 1.0)


def test_stages_that_follow_each_other_stay_on_a_host() -> None:
    space, *_ = build(4, costs=TwoHosts(SHAPE))
    for replicas, partition, order in zip(space.replicas, space.partitions, space.orders, strict=True):
        hosts = [place % 2 for place in order or range(len(partition) * replicas)]
        crossings = sum(
            one != other
            for replica in range(replicas)
            for one, other in itertools.pairwise(hosts[replica * len(partition) : (replica + 1) * len(partition)])
        )
        assert crossings == (1 if len(partition) > 2 else 0)
    as_given, *_ = build(4, costs=TwoHosts(SHAPE), device_order="given")
    assert as_given.orders == ()


@pytest.mark.parametrize(
    ("lens", "limit"),
    [([16] * 20 + [512] * 4, 16), ([20, 16, 400] * 8, 20), ([64] * 24, None), (list(range(32, 96)), None)],
)
def test_short_prompts_get_a_lane_where_others_are_long(lens: list[int], limit: int | None) -> None:
    space, _, resolve = build(2, lens=lens, arrivals=Arrivals(request_rate=2), min_stages=2)
    assert space.lanes[:3] == ((), (Lane(prefills_per_decode=1),), (Lane(prefills_per_decode=0.5),))
    assert {lanes[0].up_to_tokens for lanes in space.lanes[3:]} == ({limit} if limit else set())
    assert space.dimensions()["lane_index"] == (0, len(space.lanes) - 1, False)
    assert {one.effective.plan.lanes for one in candidates(space, resolve)} == {*space.lanes}
    batch, *_ = build(2, lens=lens, min_stages=2)
    assert batch.lanes == ((),)
    assert "lanes" not in batch.model_dump()
    if limit:
        assert SearchSpace.model_validate_json(space.model_dump_json()) == space
