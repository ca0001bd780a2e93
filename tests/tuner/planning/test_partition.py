"""Partitions: complete, without repeats, and best first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.planning import partition as p


def slowest(partition: Sequence[int], weights: Sequence[float]) -> float:
    ends = list(itertools.accumulate(partition))
    return max(sum(weights[end - count : end]) for count, end in zip(partition, ends, strict=True))


@given(num_layers=st.integers(1, 9), max_stages=st.integers(1, 5), data=st.data())
def test_all_partitions_are_found_once_and_none_is_forbidden(
    num_layers: int, max_stages: int, data: st.DataObject
) -> None:
    forbidden = data.draw(st.sets(st.integers(1, max(1, num_layers - 1))))
    found = list(p.all_partitions(num_layers, min_stages=1, max_stages=max_stages, forbidden_cuts=sorted(forbidden)))
    wanted = {
        counts
        for stages in range(1, max_stages + 1)
        for counts in itertools.product(range(1, num_layers + 1), repeat=stages)
        if sum(counts) == num_layers and not forbidden & set(itertools.accumulate(counts[:-1]))
    }
    assert len(found) == len(set(found))
    assert set(found) == wanted
    assert p.count_partitions(num_layers, min_stages=1, max_stages=max_stages, forbidden_cuts=sorted(forbidden)) == len(
        wanted
    )


@given(weights=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=10), stages=st.integers(1, 4))
def test_the_best_comes_first(weights: list[float], stages: int) -> None:
    stages = min(stages, len(weights))
    best = p.best_partitions(
        len(weights), lambda counts: slowest(counts, weights), min_stages=stages, max_stages=stages, limit=5
    )
    costs = [slowest(counts, weights) for counts in best]
    assert costs == sorted(costs)
    every = p.all_partitions(len(weights), min_stages=stages, max_stages=stages)
    assert costs[0] == min(slowest(counts, weights) for counts in every)


@pytest.mark.parametrize(("num_layers", "stages"), [(80, 8), (126, 16)])
def test_a_large_space_is_walked_and_the_balanced_partition_found(num_layers: int, stages: int) -> None:
    # The head weighs as much as three layers, so that the last stage wants fewer.
    weights = [1.0] * (num_layers - 1) + [4.0]
    best = p.best_partitions(
        num_layers,
        lambda counts: slowest(counts, weights) + 1e-6 * sum(count**2 for count in counts),
        min_stages=stages,
        max_stages=stages,
        limit=50,
    )
    assert len(best) == len(set(best)) == 50
    assert all(sum(counts) == num_layers and len(counts) == stages for counts in best)
    lower_bound = -(-(num_layers + 3) // stages)
    assert slowest(best[0], weights) == lower_bound


def test_a_walk_keeps_off_forbidden_cuts() -> None:
    forbidden = tuple(range(10, 70))
    best = p.best_partitions(
        80, lambda counts: max(counts), min_stages=6, max_stages=6, forbidden_cuts=forbidden, limit=20
    )
    assert p.count_partitions(80, min_stages=6, max_stages=6, forbidden_cuts=forbidden) > p.EXHAUSTIVE
    assert all(not set(forbidden) & set(itertools.accumulate(counts[:-1])) for counts in best)


@given(num_layers=st.integers(1, 40), stages=st.integers(1, 8), data=st.data())
def test_a_balanced_partition_keeps_its_distance_from_nothing_it_must_not_cut(
    num_layers: int, stages: int, data: st.DataObject
) -> None:
    forbidden = data.draw(st.sets(st.integers(1, max(1, num_layers - 1)), max_size=10))
    found = p.balanced(num_layers, stages, sorted(forbidden))
    free = num_layers - 1 - len(forbidden & set(range(1, num_layers)))
    if found is None:
        assert free < stages - 1
        return
    assert sum(found) == num_layers
    assert len(found) == stages
    assert min(found) >= 1
    assert not forbidden & set(itertools.accumulate(found[:-1]))
    if not forbidden:
        assert max(found) - min(found) <= 1
