"""Stages over ranks: each device's workers in turn, replica by replica."""

from __future__ import annotations

from pipetune.bench.spec import Plan
from pipetune.bench.worker.stage_host import Placement


def test_replicas_lie_on_the_ranks_of_their_devices() -> None:
    devices = ("cpu:3", "cpu:2", "cpu:1", "cpu:0", "cpu:9")
    plan = Plan.from_layer_counts((2, 2), ("cpu:0", "cpu:1", "cpu:2", "cpu:3"), 1, replicas=2)
    views = [Placement.of(plan, devices, rank) for rank in range(len(devices))]
    assert views[0].replicas == ((3, 2), (1, 0))
    assert (views[0].ranks, views[0].last_ranks) == ((3, 2, 1, 0), (2, 0))
    assert [(one.replica, one.index) for one in views] == [(1, 1), (1, 0), (0, 1), (0, 0), (None, None)]


def test_stages_that_share_a_gpu_take_its_workers_in_turn() -> None:
    plan = Plan.from_layer_counts((1, 1, 1), ("cuda:0", "cuda:1", "cuda:0"), 1)
    assert Placement.of(plan, ("cuda:0", "cuda:0", "cuda:1"), 0).replicas == ((0, 2, 1),)
