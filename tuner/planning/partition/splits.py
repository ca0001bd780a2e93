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

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Partition = tuple[int, ...]
Table = npt.NDArray[np.float64]
"""`[class, first, end]`, seconds of a stage; infinity where there can be none."""
Row = npt.NDArray[np.float64]
_State = tuple[int, ...]
_Key = tuple[float, float, tuple[int, ...], Partition]

TICKS = 2**20
"""The least bottleneck in ticks, in which costs are compared: what differs by less than a millionth is a tie."""
MAX_TOLERANCE = 9.0
"""Squares of ticks within it add up exactly over 64 stages."""
_STEPS = (0.0, 0.005, 0.02, 0.1)
"""Above the least bottleneck: what is still to come is bounded for each of these limits, since under a tight one stages
must be more even than under a loose one."""


@dataclass(frozen=True, slots=True)
class Split:
    """A partition, and where its stages lie."""

    partition: Partition
    order: tuple[int, ...]
    """Of each stage, which of the devices holds it."""
    bottleneck_s: float
    """Of its slowest stage."""


def count_partitions(num_layers: int, *, min_stages: int, max_stages: int, forbidden_cuts: Sequence[int] = ()) -> int:
    """How many partitions there are."""
    cuts = len(_allowed_cuts(num_layers, forbidden_cuts))
    return sum(math.comb(cuts, stages - 1) for stages in range(min_stages, max_stages + 1))


def all_partitions(
    num_layers: int, *, min_stages: int, max_stages: int, forbidden_cuts: Sequence[int] = ()
) -> Iterator[Partition]:
    """Every partition into `min_stages` to `max_stages` stages, each of one layer at least."""
    allowed = _allowed_cuts(num_layers, forbidden_cuts)
    for stages in range(min_stages, max_stages + 1):
        for cuts in itertools.combinations(allowed, stages - 1):
            yield tuple(end - first for first, end in itertools.pairwise((0, *cuts, num_layers)))


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
    """The splits whose bottleneck is within `1 + tolerance` of the least, best first, up to a limit.

    Of equal bottleneck, those with more even stages come first (the lesser sum of squares), then those whose devices
    come first in the order given, then those with fewer layers in front. Devices of one class are taken in the order
    given, so that no two splits differ by equal devices alone.

    Args:
        cost: `[class, first, end]`, see `Table`; what it holds for `end <= first` is not looked at.
        classes: class of each device.
        min_stages: so many devices hold a stage at least; as many as there are devices leaves none idle.
        max_stages: so many at most; None means all.
        any_order: whether devices may hold stages in any order, and any of them be idle; else stage i lies on the
            i-th device.
        forbidden_cuts: layers before which no stage may begin.
        tolerance: up to `MAX_TOLERANCE`.

    Returns:
        An empty tuple where no split has finite cost.
    """
    assert 0.0 <= tolerance <= MAX_TOLERANCE
    search = _Search(
        cost=_masked(cost, forbidden_cuts),
        moves=_Moves(tuple(classes), min_stages, min(max_stages or len(classes), len(classes)), any_order),
        tolerance=tolerance,
    )
    return tuple(itertools.islice(search.splits(), limit))


def _allowed_cuts(num_layers: int, forbidden_cuts: Sequence[int]) -> list[int]:
    forbidden = set(forbidden_cuts)
    return [cut for cut in range(1, num_layers) if cut not in forbidden]


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
        return {
            kind: tuple(index for index, other in enumerate(self.classes) if other == kind)
            for kind in sorted(Counter(self.classes))
        }

    @property
    def start(self) -> _State:
        return (0,) * len(self._members) if self.any_order else (0,)

    def may_end(self, taken: _State) -> bool:
        return self.min_stages <= sum(taken)

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

    def states(self) -> list[_State]:
        """All that can be taken, the most stages first."""
        if not self.any_order:
            return [(stages,) for stages in range(self.max_stages, -1, -1)]
        counts = itertools.product(*(range(len(members) + 1) for members in self._members.values()))
        return sorted((taken for taken in counts if sum(taken) <= self.max_stages), key=lambda taken: -sum(taken))


@dataclass(frozen=True, slots=True)
class _Node:
    """A split as far as it is made."""

    taken: _State
    end: int
    """Layers given away."""
    bottleneck: float
    squares: float
    order: tuple[int, ...]
    partition: Partition


class _Search:
    """Finishes splits, best first."""

    def __init__(self, *, cost: Table, moves: _Moves, tolerance: float) -> None:
        self._moves = moves
        self._num_layers = cost.shape[1] - 1
        bottlenecks = self._ahead(cost, np.maximum)
        least = float(bottlenecks[moves.start][0])
        self._is_feasible = math.isfinite(least)
        if not self._is_feasible:
            return
        self._tick_s = least / TICKS if least > 0 else 1.0
        self._seconds = cost
        self._ticks = np.rint(cost / self._tick_s)
        # Rounding keeps order, so that the bound of the rounded costs is the rounded bound.
        self._bottlenecks = {taken: np.rint(values / self._tick_s) for taken, values in bottlenecks.items()}
        self._limits = np.rint(TICKS * np.array([*(1 + step for step in _STEPS if step < tolerance), 1 + tolerance]))
        self._squares: dict[int, dict[_State, Row]] = {}

    def splits(self) -> Iterator[Split]:
        """All within the tolerance."""
        if not self._is_feasible:
            return
        root = _Node(self._moves.start, 0, 0.0, 0.0, (), ())
        # Of the ways to go on from one node only the best one not yet tried waits.
        waiting: list[tuple[_Key, _Node, Iterator[tuple[_Key, _Node]]]] = []

        def wait_for_next(rest: Iterator[tuple[_Key, _Node]]) -> None:
            for key, node in rest:
                heapq.heappush(waiting, (key, node, rest))
                return

        wait_for_next(self._onward(root))
        while waiting:
            _, node, rest = heapq.heappop(waiting)
            wait_for_next(rest)
            if node.end == self._num_layers:
                yield self._finished(node)
            else:
                wait_for_next(self._onward(node))

    def _onward(self, node: _Node) -> Iterator[tuple[_Key, _Node]]:
        """Every way to add a stage that can be finished within the bound, by the best that can come of it."""
        found: list[tuple[float, float, int, int, float, float, _State]] = []
        for kind, device, taken in self._moves.after(node.taken):
            own = self._ticks[kind, node.end, node.end + 1 :]
            bottlenecks = np.maximum(own, node.bottleneck)
            least = np.maximum(bottlenecks, self._bottlenecks[taken][node.end + 1 :])
            levels = np.searchsorted(self._limits, least).tolist()
            for count, level in enumerate(levels, start=1):
                if level < len(self._limits):
                    squares = node.squares + float(own[count - 1]) ** 2
                    key = squares + float(self._squares_ahead(level)[taken][node.end + count])
                    found.append((float(least[count - 1]), key, device, count, bottlenecks[count - 1], squares, taken))
        for least_, key, device, count, bottleneck, squares, taken in sorted(found, key=lambda entry: entry[:4]):
            order, partition = (*node.order, device), (*node.partition, count)
            yield (
                (least_, key, order, partition),
                _Node(taken, node.end + count, float(bottleneck), squares, order, partition),
            )

    def _squares_ahead(self, level: int) -> dict[_State, Row]:
        """The least sum of squares of the stages to come, none of which is above the limit of the level."""
        if level not in self._squares:
            ticks = np.where(self._ticks <= self._limits[level], self._ticks, np.inf)
            self._squares[level] = self._ahead(ticks**2, np.add)
        return self._squares[level]

    def _ahead(self, cost: Table, join: np.ufunc) -> dict[_State, Row]:
        """What is taken → from each layer on, the least that the stages to come can cost, joined to one number."""
        ahead: dict[_State, Row] = {}
        for taken in self._moves.states():
            best = np.full(self._num_layers + 1, np.inf)
            if self._moves.may_end(taken):
                best[-1] = 0.0
            for kind, _, following in self._moves.after(taken):
                np.minimum(best, join(cost[kind], ahead[following]).min(axis=1), out=best)
            ahead[taken] = best
        return ahead

    def _finished(self, node: _Node) -> Split:
        ends = list(itertools.accumulate(node.partition))
        classes = [self._moves.classes[device] for device in node.order]
        seconds = [
            float(self._seconds[kind, end - count, end])
            for kind, count, end in zip(classes, node.partition, ends, strict=True)
        ]
        return Split(node.partition, node.order, max(seconds))
