"""The search space of another engine."""

from __future__ import annotations

from typing import Any

import pytest

from pipetune.bench.errors import ConfigError, NothingFeasibleError
from pipetune.bench.record import Failure, FailureKind
from pipetune.bench.spec import EffectivePlan, Plan, Workload
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.calibration.engine_model import EngineModel
from pipetune.tuner.search.space.engine import EngineResolver, build_engine_space, default_point
from pipetune.tuner.search.space.space import SearchSpace, candidates
from tests.record_factory import make_shape

SHAPE = make_shape().model_copy(update={"num_attention_heads": 8})
LENS = (32,) * 16


class Engine:
    """Resolves, and finds room for as many layers a stage."""

    def __init__(self, most_layers: int = 1000) -> None:
        self.most_layers = most_layers

    def resolve(self, plan: Plan, workload: Workload) -> EffectivePlan | Failure:
        if max(plan.layer_counts) > self.most_layers:
            return Failure(kind=FailureKind.OVER_MEMORY_CAP, message="too large", bytes_wanted=2, bytes_had=1)
        return EffectivePlan(plan=plan, in_flight=len(plan.stages))


def space_of(devices: int = 2, most_layers: int = 1000, **values: Any) -> tuple[SearchSpace, EngineResolver]:
    names = tuple(f"cpu:{place}" for place in range(devices))
    given = {"python": "python", **values.pop("engine", {})}
    config = TuneConfig.model_validate({"model": {"name": "m"}, "devices": names, "engine": given, **values})
    workload = Workload(num_prompts=16, input_len=32, output_len=8)
    engine: Any = Engine(most_layers)
    of = (SHAPE, workload, LENS, dict.fromkeys(names, 2**33))
    resolve = EngineResolver.of_workload(*of, engine=engine, work=workload)
    cost = EngineModel.of_workload(SHAPE, workload, LENS)
    return build_engine_space(config, names, cost, resolve), resolve


def kinds(space: SearchSpace) -> set[tuple[int, int, int]]:
    points = [{"partition_rank": rank} for rank in range(1, len(space.partitions) + 1)]
    return {
        (space.replicas_of(point), space.shards_of(point), len(space.partitions[point["partition_rank"] - 1]))
        for point in points
    }


def test_every_use_of_the_devices_is_there() -> None:
    space, _ = space_of(4)
    # Replicas, shards, stages.
    wanted = {(1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 1, 4), (2, 1, 2), (4, 1, 1), (1, 2, 2), (2, 2, 1), (1, 4, 1)}
    assert kinds(space) == wanted


def test_shards_of_a_stage_take_the_devices_behind_it() -> None:
    space, _ = space_of(4, engine={"tensor_parallel_sizes": "2"})
    plans = [space.plan({"partition_rank": rank}) for rank in range(1, len(space.partitions) + 1)]
    taken = [[one for device in plan.devices for one in plan.shards(device)] for plan in plans]
    assert all(own == [f"cpu:{place}" for place in range(4)] for own in taken)


def test_what_the_engine_does_by_itself_is_a_point() -> None:
    space, _ = space_of(2)
    plan = space.plan(default_point(space))
    assert plan.is_engine_default
    assert plan.layer_counts == (SHAPE.num_layers // 2, SHAPE.num_layers - SHAPE.num_layers // 2)


def test_limits_given_are_the_limits_tried() -> None:
    space, resolve = space_of(2, engine={"max_num_batched_tokens": "64,512", "max_num_seqs": "8,128"})
    settings = {
        (one.effective.plan.engine.max_num_batched_tokens, one.effective.plan.engine.max_num_seqs)
        for one in candidates(space, resolve)
        if one.effective.plan.engine
    }
    # A batch holds a token of each sequence at least.
    assert settings == {(64, 8), (64, 64), (512, 8), (512, 128)}


def kv_bytes(*plans: Plan) -> set[int | None]:
    return {plan.engine.kv_cache_memory_bytes for plan in plans if plan.engine}


def test_sizes_of_the_kv_cache_are_tried_where_several_are_given() -> None:
    one, resolve = space_of(engine={"kv_cache_memory_bytes": "1GiB"})
    assert "kv_index" not in one.dimensions()
    assert kv_bytes(*(candidate.effective.plan for candidate in candidates(one, resolve))) == {2**30}
    several, resolve = space_of(engine={"kv_cache_memory_bytes": "2GiB,1GiB"})
    assert several.num_points == 2 * one.num_points
    assert kv_bytes(several.plan(default_point(several))) == {2**31}
    assert kv_bytes(*(candidate.effective.plan for candidate in candidates(several, resolve))) == {2**30, 2**31}


def test_a_stored_space_reads_back() -> None:
    space, _ = space_of(2)
    assert SearchSpace.model_validate_json(space.model_dump_json()) == space


def test_splits_that_do_not_fit_are_left_out() -> None:
    most = SHAPE.num_layers // 2
    space, _ = space_of(2, most_layers=most)
    assert set(space.partitions) == {(most, SHAPE.num_layers - most)}
    with pytest.raises(NothingFeasibleError, match="too large"):
        space_of(2, most_layers=1)


def test_shards_that_do_not_divide_the_heads_are_left_out() -> None:
    space, _ = space_of(3)
    assert kinds(space) == {(1, 1, 1), (1, 1, 2), (1, 1, 3), (3, 1, 1)}


def test_bounds_that_leave_nothing_are_named() -> None:
    with pytest.raises(ConfigError, match="attention heads"):
        space_of(2, engine={"tensor_parallel_sizes": "2"}, space={"min_stages": 2})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"engine": {"name": "vllm"}}, r"engine: engine\.python|--engine-python"),
        ({"engine": {"python": "p"}, "space": {"compile": True}}, "engine: .*space.compile"),
        ({"engine": {"python": "p", "max_num_seqs": "0"}}, "max_num_seqs"),
    ],
)
def test_settings_that_cannot_be_used_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TuneConfig.model_validate({"model": {"name": "m"}, "devices": "cpu:0-1", **values})
