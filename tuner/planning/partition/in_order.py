"""Splits over devices in the order given, all of them used: for those who want one good split and no search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipetune.bench.profile import TaskKind
from pipetune.tuner.planning.partition.splits import Partition, Split, Table, best_splits
from pipetune.tuner.planning.partition.stage_table import stage_seconds
from pipetune.tuner.planning.simulation.model import CostModel

_NEAR, _LOOKED_AT = 0.1, 50
"""Splits whose slowest stage is so near to the best one are worth a comparison by their whole duration."""


def near_best(
    cost: CostModel, kinds: Mapping[TaskKind, int], devices: Sequence[str], fill: Table
) -> tuple[Partition, ...]:
    """Partitions that fit and whose slowest stage is near to the fastest, best first; none where nothing fits.

    Args:
        kinds: how many tasks of each kind the stages run.
        fill: `[device, first, end]`, share of its memory that a stage would take; up to 1 fits.
    """
    seconds = np.array([stage_seconds(cost.costs, device, kinds) for device in devices])
    table = np.where(fill <= 1.0, seconds, np.inf)
    return _partitions(table, cost.shape.forbidden_cuts, tolerance=_NEAR, limit=_LOOKED_AT)


def least_filled(fill: Table, forbidden_cuts: Sequence[int]) -> Partition:
    """The partition whose fullest stage is emptiest."""
    return _partitions(fill, forbidden_cuts, tolerance=0.0, limit=1)[0]


def _partitions(table: Table, forbidden_cuts: Sequence[int], *, tolerance: float, limit: int) -> tuple[Partition, ...]:
    splits: tuple[Split, ...] = best_splits(
        table,
        range(len(table)),
        min_stages=len(table),
        any_order=False,
        forbidden_cuts=forbidden_cuts,
        tolerance=tolerance,
        limit=limit,
    )
    return tuple(split.partition for split in splits)
