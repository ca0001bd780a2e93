"""Partitions that the refitted model likes and the space does not list: the best splits for the sizes of a plan.

A space lists the partitions that were promising before anything ran. When a refit finds a device slower or a layer
dearer than was thought, the best cuts move, and with many stages soon beyond the list. So they are sought anew, for
the devices and sizes of a promising candidate. Such a point carries its cuts, beside the rank of the listed partition
that is nearest: it means the same plan for ever, and TPE sees the neighbour.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.planning.partition.splits import Partition, best_partitions, count_partitions
from pipetune.tuner.planning.partition.stage_table import stage_seconds
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Candidate, Point, SearchSpace, cut_name

_Class = tuple[int, int, tuple[int, ...]]
"""Replicas, stages and the order of the devices."""
_TOLERANCE = 0.1
"""Splits whose slowest stage takes so much longer than that of the best one are not looked at."""


class Refiner:
    """Finds further partitions for candidates of a space."""

    def __init__(self, space: SearchSpace, resolve: Resolver) -> None:
        self._space, self._resolve = space, resolve
        ranks: dict[_Class, list[int]] = {}
        for rank in range(1, len(space.partitions) + 1):
            ranks.setdefault(self._class_of({"partition_rank": rank}), []).append(rank)
        self._listed = {
            kind: (own, np.array([_cuts(space.partitions[rank - 1]) for rank in own])) for kind, own in ranks.items()
        }
        """Ranks, and their cuts `[partition, cut]`."""
        self._cut_names = tuple(cut_name(index) for index in range(1, max(map(len, space.partitions))))

    def class_of(self, candidate: Candidate) -> tuple[object, ...]:
        """Equal for candidates that differ in their cuts, and perhaps their caps, alone."""
        plan = candidate.effective.plan
        sizes = (plan.micro_batch_size, plan.prefill_size, plan.prefill_chunk_size)
        return (*self._class_of(candidate.point), *sizes, plan.compile, plan.lanes, candidate.effective.in_flight)

    def is_whole(self, candidate: Candidate) -> bool:
        """Whether the space lists every partition of the candidate's stages."""
        listed, _ = self._listed[self._class_of(candidate.point)]
        stages, shape = len(candidate.effective.plan.stages), self._resolve.shape
        return len(listed) == count_partitions(
            shape.num_layers, min_stages=stages, max_stages=stages, forbidden_cuts=shape.forbidden_cuts
        )

    def nearest_ranks(self, partition: Partition) -> tuple[int, ...]:
        """Ranks nearest to a partition: one for each number of replicas and order of the devices."""
        kinds = [kind for kind in self._listed if kind[1] == len(partition)]
        return tuple(self._nearest(kind, _cuts(partition))[0] for kind in kinds)

    def best(self, candidate: Candidate, model: CostModel, *, limit: int) -> Iterator[Candidate]:
        """The best partitions for a candidate's devices and sizes that fit into memory, listed ones among them."""
        plan = candidate.effective.plan
        stages = len(plan.stages)
        kinds = model.kinds(plan, candidate.effective.in_flight)
        known = {device: stage_seconds(model.costs, device, kinds) for device in dict.fromkeys(plan.devices)}
        # All replicas are cut alike: a stage is as slow as the slowest of the devices that hold it.
        columns = [[known[device] for device in plan.devices[index::stages]] for index in range(stages)]
        table = np.array([np.max(tables, axis=0) for tables in columns])
        cuts = self._resolve.shape.forbidden_cuts
        for partition in best_partitions(table, cuts, tolerance=_TOLERANCE, limit=limit):
            point = self.point(candidate.point, partition)
            if isinstance(resolved := self._resolve(self._space.plan(point)), EffectivePlan):
                yield Candidate(point=point, effective=resolved)

    def point(self, point: Point, partition: Partition) -> Point:
        """A point of the same devices, sizes and switches, with another partition."""
        cuts = _cuts(partition)
        rank, distance = self._nearest(self._class_of(point), cuts)
        plain = {name: value for name, value in point.items() if name not in self._cut_names}
        own = dict(zip(self._cut_names, cuts.tolist(), strict=False)) if distance else {}
        return plain | {"partition_rank": rank} | own

    def _nearest(self, kind: _Class, cuts: npt.NDArray[np.int_]) -> tuple[int, int]:
        """Rank of the listed partition whose cuts are nearest, and their distance in layers."""
        ranks, listed = self._listed[kind]
        distances = np.abs(listed - cuts).sum(axis=1)
        place = int(distances.argmin())
        return ranks[place], int(distances[place])

    def _class_of(self, point: Point) -> _Class:
        rank = point["partition_rank"]
        order = self._space.orders[rank - 1] if self._space.orders else ()
        return self._space.replicas_of(point), len(self._space.partitions[rank - 1]), order


def _cuts(partition: Partition) -> npt.NDArray[np.int_]:
    return np.cumsum(partition[:-1], dtype=int)
