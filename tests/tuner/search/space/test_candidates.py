"""What a search chooses among: everything that runs differently, once, and the best of every kind when that is much."""

from __future__ import annotations

from typing import Any

import pytest

from pipetune.bench.memory import stage_bytes
from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace, best_ranks, candidates
from tests.tuner.search.space_factory import MIB, build


def every_key(space: SearchSpace, resolve: Resolver) -> set[str]:
    resolved = (resolve(space.plan(point)) for point in space.points())
    return {one.key for one in resolved if isinstance(one, EffectivePlan)}


@pytest.mark.parametrize(
    ("num_devices", "changes"),
    [
        (2, {"min_stages": 2, "micro_batch_sizes": (8, 16), "prefill_micro_batch_sizes": (8,)}),
        (2, {"memory": 500 * MIB, "min_stages": 2, "micro_batch_sizes": (8, 32), "prefill_micro_batch_sizes": (8,)}),
        (3, {"max_stages": 2, "micro_batch_sizes": (4, 32), "compile": "search", "speeds": (1.0, 0.5, 1.0)}),
        (2, {"num_prompts": 8, "input_len": 512, "max_stages": 1}),
    ],
)
def test_everything_that_runs_differently_is_there_once(num_devices: int, changes: dict[str, Any]) -> None:
    space, _, resolve = build(num_devices, **changes)
    found = candidates(space, resolve)
    keys = [one.effective.key for one in found]
    assert len(keys) == len(set(keys))
    assert set(keys) == every_key(space, resolve)
    assert all(resolve(space.plan(one.point)) == one.effective for one in found)


def test_the_largest_cap_stands_for_those_that_make_no_difference_and_comes_first() -> None:
    space, _, resolve = build(memory=1000 * MIB, input_len=256)
    caps = [one.point["memory_index"] for one in candidates(space, resolve)]
    assert caps == sorted(caps, reverse=True)
    assert set(caps) > {2}
    largest = {
        resolve(space.plan({**point, "memory_index": 2})) for point in space.points() if point["memory_index"] == 0
    }
    found = {one.effective for one in candidates(space, resolve) if one.point["memory_index"] < 2}
    assert not {one.key for one in found} & {one.key for one in largest if isinstance(one, EffectivePlan)}


def test_of_a_large_space_the_best_partitions_and_the_best_of_every_kind_are_kept() -> None:
    space, _, resolve = build(4)
    found = candidates(space, resolve, limit=400)
    assert len(found) <= 400
    ranks = [one.point["partition_rank"] for one in found]
    assert ranks == sorted(ranks)
    assert set(ranks) == set(best_ranks(space, len(set(ranks))))
    kinds = {(plan.replicas, len(plan.stages)) for one in found for plan in [one.effective.plan]}
    assert kinds == {(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (4, 1)}
    assert set(ranks) >= {1, 2, 3}


def test_what_cannot_fit_is_no_candidate() -> None:
    space, _, resolve = build(memory=600 * MIB, input_len=256)
    found = candidates(space, resolve)
    assert 0 < len(found) < len({space.plan(point) for point in space.points()})
    for one in found:
        plan = one.effective.plan
        needs = [stage_bytes(resolve.shape, plan, index, prompt_len=256, output_len=16) for index in range(2)]
        assert all(need.total(one.effective.in_flight) <= 600 * MIB for need in needs[: len(plan.stages)])
