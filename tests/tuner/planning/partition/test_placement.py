"""Placements against every other one: the least time on links, each place of its class, and as given without a gain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.partition.placement import ALIKE_LINKS, MAX_EXACT, Order, crossing_s, levels_of, place


@st.composite
def cases(draw: st.DrawFn, least: int = 2, most: int = 6) -> tuple[Order, tuple[int, ...], Floats, Floats]:
    """An order of some of the devices, their classes, and what messages take."""
    count = draw(st.integers(least, most))
    classes = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    devices = draw(st.permutations(range(count)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    hops_s, returns_s = (rng.choice((0.1, 0.7, 3.0), (count, count)) for _ in range(2))
    return tuple(devices[: draw(st.integers(2, count))]), tuple(classes), hops_s, 0.1 * returns_s


@given(cases())
@settings(deadline=None)
def test_no_order_of_one_pipeline_takes_less(case: tuple[Order, tuple[int, ...], Floats, Floats]) -> None:
    order, classes, hops_s, returns_s = case
    found = place(order, classes, hops_s, returns_s)
    every = itertools.permutations(range(len(classes)), len(order))
    alike = [one for one in every if kinds_of(one, classes) == kinds_of(order, classes)]
    assert found in alike
    least_s = min(crossing_s(one, hops_s, returns_s) for one in alike)
    assert crossing_s(found, hops_s, returns_s) == pytest.approx(least_s, rel=1e-6)


@given(cases(least=MAX_EXACT + 1, most=MAX_EXACT + 4))
@settings(deadline=None, max_examples=20)
def test_no_exchange_shortens_a_long_pipeline(case: tuple[Order, tuple[int, ...], Floats, Floats]) -> None:
    order, classes, hops_s, returns_s = case
    found = place(order, classes, hops_s, returns_s)
    assert kinds_of(found, classes) == kinds_of(order, classes)
    assert len(set(found)) == len(order)
    least_s = crossing_s(found, hops_s, returns_s)
    assert least_s <= crossing_s(order, hops_s, returns_s)
    for one, other in itertools.combinations(range(len(found)), 2):
        swapped = list(found)
        swapped[one], swapped[other] = found[other], found[one]
        if kinds_of(swapped, classes) == kinds_of(found, classes):
            assert crossing_s(tuple(swapped), hops_s, returns_s) >= least_s * (1 - 1e-6)


@given(cases(), st.integers(0, 2**32 - 1))
def test_alike_links_move_nothing(case: tuple[Order, tuple[int, ...], Floats, Floats], seed: int) -> None:
    order, classes, *_ = case
    noise = np.random.default_rng(seed).uniform(1.0, ALIKE_LINKS, (2, len(classes), len(classes)))
    assert place(order, classes, levels_of(2e-3 * noise[0]), levels_of(1e-5 * noise[1])) == order


def two_hosts(count: int) -> tuple[Floats, Floats]:
    """What messages take between devices of which every other one is on the other host."""
    between = (np.arange(count)[:, None] + np.arange(count)) % 2
    return np.where(between, 1.0, 0.1), np.where(between, 0.01, 0.001)


@pytest.mark.parametrize("count", [4, 6, 8, 12, 16])
def test_a_pipeline_crosses_between_two_hosts_once_and_its_tokens_once(count: int) -> None:
    order = place(tuple(range(count)), (0,) * count, *two_hosts(count))
    assert [device % 2 for device in order] == [0] * (count // 2) + [1] * (count // 2)


@pytest.mark.parametrize(("replicas", "stages"), [(2, 2), (2, 4), (2, 8), (4, 2)])
def test_replicas_stay_on_a_host(replicas: int, stages: int) -> None:
    count = replicas * stages
    order = place(tuple(range(count)), (0,) * count, *two_hosts(count), replicas=replicas)
    assert sorted(order) == list(range(count))
    for replica in np.array(order).reshape(replicas, stages):
        assert len(set(replica % 2)) == 1


def kinds_of(order: Sequence[int], classes: Sequence[int]) -> list[int]:
    return [classes[device] for device in order]
