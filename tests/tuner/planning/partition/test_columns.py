"""Columns: which devices hold one stage in all replicas."""

from __future__ import annotations

import numpy as np

from pipetune.tuner.planning.partition.splits import Columns


def test_equal_devices_are_taken_as_they_come() -> None:
    columns = Columns((0, 0, 0, 0, 0), range(5), replicas=2, stages=2, any_order=True)
    assert columns.members == ((0, 2), (1, 3))
    assert not columns.may_move
    assert columns.devices_of((0, 1)) == (0, 1, 2, 3)


def test_unlike_devices_are_taken_by_speed_and_the_slowest_left_out() -> None:
    # Devices 1 and 3 are fastest, 4 is slowest.
    columns = Columns((1, 0, 1, 0, 2), (1, 3, 0, 2, 4), replicas=2, stages=2, any_order=True)
    assert columns.members == ((0, 2), (1, 3))
    assert columns.classes == ((1,), (0,))
    assert columns.devices_of((1, 0)) == (1, 0, 3, 2)


def test_unlike_devices_in_the_order_given_make_mixed_columns() -> None:
    columns = Columns((0, 0, 1, 1), (0, 1, 2, 3), replicas=2, stages=2, any_order=False)
    assert columns.members == ((0, 2), (1, 3))
    assert columns.classes == ((0, 1), (0, 1))
    assert not columns.may_move


def test_a_column_is_as_slow_as_its_slowest_device_layer_by_layer() -> None:
    columns = Columns((0, 1, 0, 0), (0, 2, 3, 1), replicas=2, stages=2, any_order=True)
    assert columns.members == ((0, 2), (1, 3))
    tables = np.array([[[1.0, 5.0]], [[3.0, 2.0]]])
    assert columns.slowest(tables).tolist() == [[[1.0, 5.0]], [[3.0, 5.0]]]
    assert columns.devices_of((1, 0)) == (1, 0, 3, 2)
