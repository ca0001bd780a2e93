"""The search space: every point a plan that can be made, and old spaces that mean what they meant."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.memory import check_plan
from pipetune.bench.record import Record
from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace, candidates
from tests.tuner.search.space_factory import MIB, SHAPE, build

ROOT = Path(__file__).parents[4]


@cache
def spaces() -> list[tuple[SearchSpace, CostModel, Resolver]]:
    return [
        build(1, num_prompts=1),
        build(2, num_prompts=7),
        build(3, num_prompts=32, max_stages=2),
        build(4, num_prompts=9, input_len=300, min_stages=2, max_stages=2, compile="search"),
        build(4, num_prompts=70, replicas=(2, 4), min_stages=1),
        build(3, num_prompts=9, speeds=(1.0, 0.5, 1.0)),
        build(4, num_prompts=32, speeds=(1.0, 1.0, 0.5, 0.4), replicas=(1, 2)),
    ]


@given(data=st.data())
def test_every_point_is_a_plan_of_the_model(data: st.DataObject) -> None:
    space, cost, resolve = data.draw(st.sampled_from(spaces()))
    point = {name: data.draw(st.integers(low, high), label=name) for name, (low, high, _) in space.dimensions().items()}
    plan = space.plan(point)
    check_plan(SHAPE, plan)
    assert plan.replicas == space.replicas_of(point)
    assert set(plan.devices) <= set(space.devices)
    order = space.orders[point["partition_rank"] - 1] if space.orders else ()
    assert plan.devices == tuple(space.devices[place] for place in order or range(len(plan.devices)))
    assert plan.replicas * (plan.micro_batch_size - 1) < cost.num_prompts
    assert plan.prefill_size <= plan.micro_batch_size
    assert isinstance(resolve(plan), EffectivePlan)


def test_a_space_reads_back_as_it_was() -> None:
    for space, *_ in spaces():
        assert SearchSpace.model_validate_json(space.model_dump_json()) == space


def test_points_of_one_partition_are_some_of_all() -> None:
    space = spaces()[1][0]
    own = [point for point in space.points() if point["partition_rank"] == 3]
    assert own
    assert list(space.points(3)) == own


def test_a_space_of_before_replicas_means_the_plans_that_its_records_hold() -> None:
    study = ROOT / "tests" / "data" / "study-before-replicas"
    text = (study / "space.json").read_text(encoding="utf-8")
    values = json.loads(text)
    for name in ("replicas", "orders", "chunk_sizes", "compile", "cuda_graphs", "packed_weights", "num_prompts"):
        values.pop(name, None)
    space = SearchSpace.model_validate(values)
    assert set(space.dimensions()) == {"partition_rank", "micro_batch_index", "prefill_index"}
    seen = 0
    for path in sorted((study / "records").glob("*.json")):
        record = Record.model_validate_json(path.read_text(encoding="utf-8"))
        if record.role == "trial" and record.params is not None and record.spec is not None:
            plan = space.plan({name: int(value) for name, value in record.params.items()})
            assert plan == record.spec.plan
            seen += 1
    assert seen == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"num_devices": 4, "replicas": (1, 2, 4), "micro_batch_sizes": "4,8"},
        {"num_devices": 3, "speeds": (1.0, 0.5, 2.0), "micro_batch_sizes": "4,8"},
        {"memory": 700 * MIB, "micro_batch_sizes": "4,8"},
        {"compile": "search", "prefill_chunk_sizes": "16,whole", "memory": 800 * MIB, "micro_batch_sizes": "4,8"},
    ],
)
def test_no_two_plans_of_a_space_are_described_by_one_line(changes: dict[str, Any]) -> None:
    space, _, resolve = build(**changes)
    lines: dict[str, str] = {}
    for candidate in candidates(space, resolve):
        key = candidate.effective.key
        assert lines.setdefault(candidate.effective.plan.describe(), key) == key
    assert len(lines) > 20
