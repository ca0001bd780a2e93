"""The knee of a front: where it bulges, whatever the units; and none where nothing bulges."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.tuner.ranking.order import bulges


def knee(costs: Sequence[Sequence[float]]) -> int | None:
    found = bulges(costs)
    return None if found is None else max(range(len(found)), key=found.__getitem__)


def test_the_point_farthest_before_the_chord_is_the_knee() -> None:
    front = [(0.0, 10.0), (1.0, 4.0), (2.0, 1.0), (6.0, 0.5), (10.0, 0.0)]
    assert knee(front) == 2
    found = bulges(front)
    assert found is not None
    assert found[2] == pytest.approx((1 - 0.2 - 0.1) / 2**0.5)
    assert (found[0], found[-1]) == pytest.approx((0.0, 0.0))


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(-50, 50))
def test_units_and_offsets_do_not_move_it(one: float, other: float, offset: float) -> None:
    front = [(0.0, 10.0), (1.0, 4.0), (2.0, 1.0), (6.0, 0.5), (10.0, 0.0)]
    assert knee([(one * x + offset, other * y) for x, y in front]) == 2


def test_three_objectives_have_a_knee_before_the_plane_through_their_ends() -> None:
    ends = [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)]
    assert knee([*ends, (0.3, 0.3, 0.3), (0.6, 0.6, 0.5)]) == 3


@pytest.mark.parametrize(
    "front",
    [
        [],
        [(0.0, 1.0), (1.0, 0.0)],
        [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)],
        [(0.0, 1.0), (0.8, 0.8), (1.0, 0.0)],
        [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0)],
    ],
)
def test_too_few_points_and_fronts_that_do_not_bulge_have_none(front: list[tuple[float, ...]]) -> None:
    assert bulges(front) is None
