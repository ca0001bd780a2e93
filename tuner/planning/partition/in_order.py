"""Splits over devices in the order given, all of them used: for those who want one good split and no search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipetune.bench.profile import TaskKind
from pipetune.tuner.planning.partition.splits import Partition, Table, best_partitions
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
    return best_partitions(table, cost.shape.forbidden_cuts, tolerance=_NEAR, limit=_LOOKED_AT)
