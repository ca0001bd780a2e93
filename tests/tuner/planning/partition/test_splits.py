"""Partitions: complete and without repeats; the best splits: as a look at every one of them finds them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipetune.tuner.planning.partition import splits as p
from tests.evaluation.search.landscape import all_partitions


@given(num_layers=st.integers(1, 9), max_stages=st.integers(1, 5), data=st.data())
def test_all_partitions_are_found_once_and_none_is_forbidden(
    num_layers: int, max_stages: int, data: st.DataObject
) -> None:
    forbidden = data.draw(st.sets(st.integers(1, max(1, num_layers - 1))))
    found = list(all_partitions(num_layers, min_stages=1, max_stages=max_stages, forbidden_cuts=sorted(forbidden)))
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


def table_of(layers: Sequence[Sequence[float]], ends: Sequence[tuple[float, float]] = ()) -> p.Table:
    """`[class, first, end]` of costs that add up: `[class][layer]`, and what the first and the last stage add."""
    num_layers = len(layers[0])
    table = np.full((len(layers), num_layers + 1, num_layers + 1), np.inf)
    for kind, first in itertools.product(range(len(layers)), range(num_layers)):
        for end in range(first + 1, num_layers + 1):
            head, tail = ends[kind] if ends else (0.0, 0.0)
            table[kind, first, end] = sum(layers[kind][first:end]) + head * (first == 0) + tail * (end == num_layers)
    return table


def bottleneck_s(table: p.Table, classes: Sequence[int], split: p.Split) -> float:
    """Seconds of the slowest stage."""
    ends = itertools.accumulate(split.partition)
    stages = zip(split.order, split.partition, ends, strict=True)
    return max(float(table[classes[device], end - layers, end]) for device, layers, end in stages)


def every_split(
    table: p.Table, classes: Sequence[int], stages: range, any_order: bool, forbidden: set[int]
) -> list[p.Split]:
    """Each one that can be, by looking at all of them; in the order that is promised."""
    num_layers = table.shape[1] - 1
    found: list[tuple[float, list[float], p.Split]] = []
    for count in stages:
        orders: list[tuple[int, ...]] = [tuple(range(count))]
        if any_order:
            # Of devices of a class, the first ones in order.
            orders = [
                order
                for order in itertools.permutations(range(len(classes)), count)
                if all(
                    [device for device in order if classes[device] == kind]
                    == [device for device in range(len(classes)) if classes[device] == kind][
                        : sum(classes[device] == kind for device in order)
                    ]
                    for kind in set(classes)
                )
            ]
        for partition in all_partitions(num_layers, min_stages=count, max_stages=count):
            ends = list(itertools.accumulate(partition))
            if forbidden & set(ends[:-1]):
                continue
            for order in orders:
                own = [
                    float(table[classes[device], end - layers, end])
                    for device, layers, end in zip(order, partition, ends, strict=True)
                ]
                if math.isfinite(max(own)):
                    found.append((max(own), own, p.Split(partition, order)))
    if not found:
        return []
    tick = min(least for least, _, _ in found) / p.TICKS

    def key(entry: tuple[float, list[float], p.Split]) -> tuple[int, int, tuple[int, ...], p.Partition]:
        ticks = [round(seconds / tick) for seconds in entry[1]]
        return max(ticks), sum(value**2 for value in ticks), entry[2].order, entry[2].partition

    return [split for _, _, split in sorted(found, key=key)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_best_splits_are_those_that_a_look_at_every_one_finds(data: st.DataObject) -> None:
    """Random costs, memory caps, forbidden cuts and unlike devices, in any order or in the one given."""
    num_devices = data.draw(st.integers(2, 4), label="devices")
    num_layers = data.draw(st.integers(1, 8), label="layers")
    classes = [data.draw(st.integers(0, 2)) for _ in range(num_devices)]
    # Small numbers, so that many are equal.
    cost = st.integers(1, 6) | st.floats(0.5, 6.0)
    layers = [[data.draw(cost) for _ in range(num_layers)] for _ in range(3)]
    table = table_of(layers, [(data.draw(cost), data.draw(cost)) for _ in range(3)])
    for kind in range(3):
        # A cap that some runs of layers are above: by their number, and any one by itself.
        cap = data.draw(st.integers(1, num_layers), label="cap")
        first, end = np.indices(table.shape[1:])
        table[kind, end - first > cap] = np.inf
    forbidden = data.draw(st.sets(st.integers(1, max(1, num_layers - 1)), max_size=3), label="forbidden")
    least = data.draw(st.integers(1, num_devices), label="min_stages")
    most = data.draw(st.integers(least, num_devices), label="max_stages")
    any_order = data.draw(st.booleans(), label="any order")
    tolerance = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0, 9.0]), label="tolerance")
    limit = data.draw(st.sampled_from([1, 7, 10_000]), label="limit")
    found = p.best_splits(
        table,
        classes,
        min_stages=least,
        max_stages=most,
        any_order=any_order,
        forbidden_cuts=sorted(forbidden),
        tolerance=tolerance,
        limit=limit,
    )
    every = every_split(table, classes, range(least, most + 1), any_order, forbidden)
    seconds = [bottleneck_s(table, classes, split) for split in every]
    within = [
        split for split, one in zip(every, seconds, strict=True) if one <= seconds[0] * (1 + tolerance) * (1 + 1e-9)
    ]
    assert list(found) == within[:limit]


def test_equal_devices_are_not_permuted() -> None:
    table = table_of([[1.0] * 6])
    found = p.best_splits(table, [0, 0, 0], min_stages=2, tolerance=9.0, limit=1000)
    assert len(found) == len({split.partition for split in found}) == 5 + 10
    assert {split.order for split in found} == {(0, 1), (0, 1, 2)}


def test_a_slow_device_may_stay_idle_or_must_not() -> None:
    table = table_of([[1.0] * 6, [9.0] * 6])
    (idle,) = p.best_splits(table, [0, 1, 0])
    assert (idle.partition, idle.order, bottleneck_s(table, [0, 1, 0], idle)) == ((3, 3), (0, 2), 3.0)
    (busy,) = p.best_splits(table, [0, 1, 0], min_stages=3)
    assert sorted(busy.order) == [0, 1, 2]
    assert busy.partition[busy.order.index(1)] == 1
    (given_,) = p.best_splits(table, [0, 1, 0], min_stages=3, any_order=False)
    assert (given_.partition, given_.order) == ((2, 1, 3), (0, 1, 2))


def test_the_order_puts_the_heavy_head_on_the_fast_device() -> None:
    table = table_of([[2.0] * 8, [1.0] * 8], [(0.0, 8.0), (0.0, 4.0)])
    (best,) = p.best_splits(table, [0, 1], min_stages=2)
    assert (best.partition, best.order, bottleneck_s(table, [0, 1], best)) == ((4, 4), (0, 1), 8.0)


def test_of_equal_bottlenecks_the_more_even_split_comes_first() -> None:
    table = table_of([[5.0, 1.0, 1.0, 1.0, 1.0]])
    found = p.best_splits(table, [0, 0, 0], min_stages=3, limit=3)
    assert [split.partition for split in found] == [(1, 2, 2), (1, 1, 3), (1, 3, 1)]


def test_what_fits_nowhere_has_no_split() -> None:
    table = np.full((1, 4, 4), np.inf)
    assert p.best_splits(table, [0, 0]) == ()
    assert p.best_splits(table_of([[1.0] * 3]), [0, 0], forbidden_cuts=(1, 2), min_stages=2) == ()


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_many_layers_on_many_unlike_devices(tolerance: float) -> None:
    """Far too many to look at: the best is no worse than what any cut of work into speeds could give."""
    speeds = (1.0, 2.0, 3.0)
    layers = [[1.0 + 0.1 * (layer % 4 == 0) for layer in range(80)]] * 3
    table = table_of([[seconds / speed for seconds in own] for own, speed in zip(layers, speeds, strict=True)])
    classes = (0, 0, 0, 1, 1, 1, 2, 2)
    found = p.best_splits(table, classes, min_stages=8, tolerance=tolerance, limit=200)
    least = sum(layers[0]) / sum(speeds[kind] for kind in classes)
    seconds = [bottleneck_s(table, classes, split) for split in found]
    assert least <= seconds[0] < 1.1 * least
    assert seconds == sorted(seconds)
    assert len(set(found)) == len(found) == (200 if tolerance else len(found))
