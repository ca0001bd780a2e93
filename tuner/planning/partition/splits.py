"""Partitions of layers into stages, and the best splits: partitions and devices whose slowest stage is fastest.

A partition is the count of layers of each stage. A *split* also says which device holds each stage. Its bottleneck is
the seconds of its slowest stage, and what a stage costs is looked up in a table `[class of device, first, end]`:
infinity there says that the layers `[first, end)` do not fit on such a device. Equal devices are one class.

Whether the layers from one on can be given to the devices that are left depends on how many of each class are taken,
not on which: with `n_c` devices of class c that makes `Π (n_c + 1)` states, and

    ahead[taken][first] = min over classes c left, min over end > first of max(cost[c, first, end],
                                                                               ahead[taken + c][end])

takes `states × classes × layers² / 2` steps: 48 states for eight devices of three classes, 2^D for D unlike ones.
Where the order of devices is given, a state is the number of stages, and the steps are `stages × layers² / 2`.

These values bound what an unfinished split can become. A search that always goes on with the most promising
unfinished one, and looks at nothing that cannot end within the bound, thus finishes splits best first.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pipetune.tuner.planning.arrays import Floats

Partition = tuple[int, ...]
Table = Floats
"""`[class, first, end]`, seconds of a stage; infinity where there can be none."""
_State = tuple[int, ...]

TICKS = 2**20
"""The least bottleneck in ticks, in which costs are compared: what differs by less than a millionth is a tie."""
MAX_TOLERANCE = 9.0
"""Squares of ticks within it add up exactly over 64 stages."""


class Split(NamedTuple):
    """A partition, and where its stages lie."""

    partition: Partition
    order: tuple[int, ...]
    """Indices of the devices that hold the stages."""


def count_partitions(num_layers: int, *, min_stages: int, max_stages: int, forbidden_cuts: Sequence[int] = ()) -> int:
    """How many partitions there are."""
    cuts = len(set(range(1, num_layers)) - set(forbidden_cuts))
    return sum(math.comb(cuts, stages - 1) for stages in range(min_stages, max_stages + 1))


def best_splits(
    cost: Table,
    classes: Sequence[int],
    *,
    min_stages: int = 1,
    max_stages: int | None = None,
    any_order: bool = True,
    forbidden_cuts: Sequence[int] = (),
    tolerance: float = 0.0,
    limit: int = 1,
) -> tuple[Split, ...]:
    """The splits whose bottleneck is within `1 + tolerance` (up to `MAX_TOLERANCE`) of the least, best first, up to a
    limit; none where no split has finite cost.

    Of equal bottleneck, those with more even stages come first (the lesser sum of squares), then those whose devices
    come first in the order given, then those with fewer layers in front. Devices of one class are taken in the order
    given, so that no two splits differ by equal devices alone.

    What `cost[class, first, end]`, see `Table`, holds for `end <= first` is not looked at. From `min_stages` devices
    (as many as there are leaves none idle) up to `max_stages` (None means all) hold a stage; they may do so in any
    order, and any of them be idle, or else stage i lies on the i-th device. No stage may begin before a layer of
    `forbidden_cuts`.
    """
    assert 0.0 <= tolerance <= MAX_TOLERANCE
    moves = _Moves(tuple(classes), min_stages, min(max_stages or len(classes), len(classes)), any_order)
    cost = _masked(cost, forbidden_cuts)
    bottlenecks_s = moves.ahead(cost, np.maximum)
    least_s = float(bottlenecks_s[moves.start][0])
    if not math.isfinite(least_s):
        return ()
    tick_s = least_s / TICKS if least_s > 0 else 1.0
    most = round(TICKS * (1 + tolerance))
    ticks = np.rint(cost / tick_s)
    ticks[ticks > most] = np.inf
    # Rounding keeps order, so that the bound of the rounded costs is the rounded bound.
    bottlenecks = {taken: np.rint(values / tick_s) for taken, values in bottlenecks_s.items()}
    squares = moves.ahead(ticks**2, np.add)
    waiting = [_Node(0.0, 0.0, (), (), 0.0, 0.0, moves.start)]
    found: list[Split] = []
    while waiting and len(found) < limit:
        node = heapq.heappop(waiting)
        end = sum(node.partition)
        if end == cost.shape[1] - 1:
            found.append(Split(node.partition, node.order))
            continue
        for kind, device, taken in moves.after(node.taken):
            own = ticks[kind, end, end + 1 :]
            reached = np.maximum(own, node.bottleneck)
            least = np.maximum(reached, bottlenecks[taken][end + 1 :])
            given = node.squares + own**2
            bound = given + squares[taken][end + 1 :]
            for index in np.flatnonzero((least <= most) & np.isfinite(bound)).tolist():
                order, partition = (*node.order, device), (*node.partition, index + 1)
                rest = (float(reached[index]), float(given[index]), taken)
                heapq.heappush(waiting, _Node(float(least[index]), float(bound[index]), order, partition, *rest))
    return tuple(found)


class _Node(NamedTuple):
    """A split as far as it is made; sorts by the best that can come of it."""

    least_bottleneck: float
    """What the finished split's bottleneck is at least, ticks."""
    least_squares: float
    order: tuple[int, ...]
    partition: Partition
    bottleneck: float
    """Bottleneck of the stages so far, ticks."""
    squares: float
    taken: _State


def best_partitions(
    table: Table, forbidden_cuts: Sequence[int], *, tolerance: float = 0.0, limit: int = 1
) -> tuple[Partition, ...]:
    """The partitions of the `best_splits` by a table `[device, first, end]`, over all devices in their order."""
    splits = best_splits(
        table,
        range(len(table)),
        min_stages=len(table),
        any_order=False,
        forbidden_cuts=forbidden_cuts,
        tolerance=tolerance,
        limit=limit,
    )
    return tuple(split.partition for split in splits)


def unevenness(partition: Partition) -> tuple[int, int]:
    """Least for the partition of most stages, and of those for the most even one."""
    return -len(partition), max(partition) - min(partition)


def _masked(cost: Table, forbidden_cuts: Sequence[int]) -> Table:
    """The table with infinity where no stage can be."""
    cost = cost.copy()
    num_layers = cost.shape[1] - 1
    cost[:, *np.tril_indices(num_layers + 1)] = np.inf
    cuts = [cut for cut in forbidden_cuts if 0 < cut < num_layers]
    cost[:, cuts, :] = np.inf
    cost[:, :, cuts] = np.inf
    return cost


@dataclass(frozen=True)
class _Moves:
    """Which device may hold the next stage, and what is taken then."""

    classes: tuple[int, ...]
    min_stages: int
    max_stages: int
    any_order: bool

    @cached_property
    def _members(self) -> dict[int, tuple[int, ...]]:
        """Devices of each class, in order."""
        places = range(len(self.classes))
        return {kind: tuple(n for n in places if self.classes[n] == kind) for kind in sorted(set(self.classes))}

    @property
    def start(self) -> _State:
        """The state in which nothing is taken."""
        return (0,) * len(self._members) if self.any_order else (0,)

    def after(self, taken: _State) -> Iterator[tuple[int, int, _State]]:
        """Class, device, and what is taken with it."""
        stages = sum(taken)
        if stages == self.max_stages:
            return
        if not self.any_order:
            yield self.classes[stages], stages, (stages + 1,)
            return
        for place, (kind, members) in enumerate(self._members.items()):
            count = taken[place]
            if count < len(members):
                yield kind, members[count], (*taken[:place], count + 1, *taken[place + 1 :])

    def ahead(self, cost: Table, join: np.ufunc) -> dict[_State, Floats]:
        """What is taken → from each layer on, the least that the stages to come can cost, joined to one number."""
        ahead: dict[_State, Floats] = {}
        for taken in self._states():
            best = np.full(cost.shape[1], np.inf)
            if self.min_stages <= sum(taken):
                best[-1] = 0.0
            for kind, _, following in self.after(taken):
                np.minimum(best, join(cost[kind], ahead[following]).min(axis=1), out=best)
            ahead[taken] = best
        return ahead

    def _states(self) -> list[_State]:
        """All that can be taken, the most stages first."""
        if not self.any_order:
            return [(stages,) for stages in range(self.max_stages, -1, -1)]
        counts = itertools.product(*(range(len(members) + 1) for members in self._members.values()))
        return sorted((taken for taken in counts if sum(taken) <= self.max_stages), key=lambda taken: -sum(taken))


class Columns:
    """Columns for so many replicas of so many stages, or of more where some may stay idle.

    A column is the devices that hold one stage in all replicas. These are cut alike, so that a stage is as slow as the
    slowest device of its column. Unlike devices are sorted by speed and taken in columns of neighbours: the k-th
    fastest column is then as fast as any choice could make it.
    """

    def __init__(
        self, classes: Sequence[int], by_speed: Sequence[int], *, replicas: int, stages: int, any_order: bool
    ) -> None:
        """From the class of each device, and the devices by speed, the fastest first. Devices of unlike classes may
        hold the stages in any order, or else are taken as they come, replica by replica and stage by stage."""
        self.may_move = any_order and len(set(classes)) > 1
        """Whether columns may hold the stages in any order."""
        if self.may_move:
            starts = range(0, len(by_speed) - replicas + 1, replicas)
            members = sorted(tuple(sorted(by_speed[start : start + replicas])) for start in starts)
        else:
            members = [tuple(range(stage, stages * replicas, stages)) for stage in range(stages)]
        self.members = tuple(members)
        """Devices of each column, by replica."""
        self.classes = tuple(tuple(sorted({classes[device] for device in column})) for column in members)
        """Classes of the devices of each column."""
        self._distinct = list(dict.fromkeys(self.classes))
        self.kinds = [self._distinct.index(own) for own in self.classes]
        """Columns of one kind hold devices of the same classes."""

    def slowest(self, tables: Table) -> Table:
        """`[class of device, …]` to `[kind of column, …]`: the most that any device of the column takes."""
        return np.array([tables[list(kinds)].max(axis=0) for kinds in self._distinct])

    def devices_of(self, order: Sequence[int]) -> tuple[int, ...]:
        """The devices of columns in this order, replica by replica and stage by stage."""
        replicas = range(len(self.members[0]))
        return tuple(self.members[column][replica] for replica in replicas for column in order)
