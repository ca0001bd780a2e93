"""Columns: the devices that hold one stage in all replicas of a plan, and splits over them.

Replicas are cut alike, so that a stage is as slow as the slowest device of its column. Unlike devices are sorted by
speed and taken in columns of neighbours: the k-th fastest column is then as fast as any choice could make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipetune.tuner.planning.partition.splits import Split, Table, best_splits


@dataclass(frozen=True)
class Columns:
    """Columns for so many replicas of so many stages, or of more where some may stay idle."""

    members: tuple[tuple[int, ...], ...]
    """Devices of each column, by replica."""
    classes: tuple[tuple[int, ...], ...]
    """Classes of the devices of each column."""
    may_move: bool
    """Whether columns may hold the stages in any order."""

    @classmethod
    def of(
        cls, classes: Sequence[int], by_speed: Sequence[int], *, replicas: int, stages: int, any_order: bool
    ) -> Columns:
        """Columns of these devices.

        Args:
            classes: of each device; equal ones are of one class.
            by_speed: the devices, the fastest first.
            any_order: whether unlike devices may hold the stages in any order; else they are taken as they come,
                replica by replica and stage by stage.
        """
        may_move = any_order and len(set(classes)) > 1
        if may_move:
            starts = range(0, len(by_speed) - replicas + 1, replicas)
            members = sorted(tuple(sorted(by_speed[start : start + replicas])) for start in starts)
        else:
            members = [tuple(range(stage, stages * replicas, stages)) for stage in range(stages)]
        kinds = tuple(tuple(sorted({classes[device] for device in column})) for column in members)
        return cls(tuple(members), kinds, may_move)

    @property
    def _distinct(self) -> tuple[tuple[int, ...], ...]:
        return tuple(dict.fromkeys(self.classes))

    def slowest(self, tables: Table) -> Table:
        """`[class of device, …]` to `[class of column, …]`: the most that any device of the column takes."""
        return np.array([tables[list(kinds)].max(axis=0) for kinds in self._distinct])

    def splits(
        self, table: Table, stages: int, *, forbidden_cuts: Sequence[int], tolerance: float = 0.0, limit: int = 1
    ) -> tuple[Split, ...]:
        """The best splits into so many stages, by a table of the columns; their orders are of columns."""
        distinct = self._distinct
        return best_splits(
            table,
            [distinct.index(kinds) for kinds in self.classes],
            min_stages=stages,
            max_stages=stages,
            any_order=self.may_move,
            forbidden_cuts=forbidden_cuts,
            tolerance=tolerance,
            limit=limit,
        )

    def devices_of(self, order: Sequence[int]) -> tuple[int, ...]:
        """The devices of columns in this order, replica by replica and stage by stage."""
        replicas = len(self.members[0])
        return tuple(self.members[column][replica] for replica in range(replicas) for column in order)
