"""The peers of our search: plans that can run, the same for one seed, and cuts that are never equal."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench import metrics
from pipetune.bench.record import Measurement
from tests.evaluation.search.methods import METHODS, OURS, apart, device_orders
from tests.evaluation.search.simulated import SimulatedWorld, simulated_worlds
from tests.evaluation.search.world import METRIC


@pytest.fixture(scope="module")
def world() -> SimulatedWorld:
    return simulated_worlds()[0]


@given(st.integers(3, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n - 1), max_size=n - 1))))
def test_cuts_are_moved_apart_within_the_layers(case: tuple[int, list[int]]) -> None:
    layers, cuts = case
    moved = apart(sorted(cuts), layers)
    assert len(moved) == len(cuts)
    assert all(one < other for one, other in itertools.pairwise((0, *moved, layers)))
    if len(set(cuts)) == len(cuts):
        assert moved == tuple(sorted(cuts))


@pytest.mark.parametrize("name", [name for name in METHODS if name != OURS and "device_map" not in name])
def test_peers_propose_plans_of_the_world_and_repeat_themselves_by_seed(world: SimulatedWorld, name: str) -> None:
    def proposed(seed: int) -> list[str]:
        method = METHODS[name](world, seed, 8)
        keys = []
        for visit in range(8):
            plan = method.next()
            assert plan is not None
            assert plan.num_layers == world.shape.num_layers
            assert plan.devices in device_orders(world)
            assert plan.micro_batch_size in world.micro_batch_sizes
            keys.append(world.resolve(plan).key)
            method.tell(world.run(plan, visit, seed))
        return keys

    assert proposed(1) == proposed(1)
    assert proposed(1) != proposed(2)


def test_simulated_runs_are_whole_records_whose_noise_comes_from_seed_and_visit(world: SimulatedWorld) -> None:
    plan = METHODS["random"](world, 0, 1).next()
    assert plan is not None
    one = world.run(plan, 0, seed=5)
    assert one == world.run(plan, 0, seed=5)
    assert one != world.run(plan, 1, seed=5)
    assert isinstance(one.result, Measurement)
    derived = metrics.derive(one.result)
    assert derived[METRIC] > 0
    assert 0 < derived["bubble_ratio"] < 1


def test_no_plan_is_worth_more_than_the_best_of_a_simulated_world(world: SimulatedWorld) -> None:
    plans = METHODS["uniform split first"](world, 0, 25)
    scores = []
    for _ in range(len(world.micro_batch_sizes) + 20):
        plan = plans.next()
        assert plan is not None
        scores.append(world.score(plan, 0))
    assert max(scores) <= 1.0
    assert min(scores) > 0
