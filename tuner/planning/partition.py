"""Partitions of layers into stages, best first by a cost that the caller gives.

A partition is the count of layers of each stage. Few of them are all looked at; of many, a search walks from the
balanced ones to their neighbours, one layer moved over one cut at a time, always from the best not yet left.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

Partition = tuple[int, ...]

EXHAUSTIVE = 5000
"""So many partitions are all looked at."""


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
            yield _counts(cuts, num_layers)


def best_partitions(
    num_layers: int,
    cost: Callable[[Partition], float],
    *,
    min_stages: int,
    max_stages: int,
    forbidden_cuts: Sequence[int] = (),
    limit: int = 400,
) -> tuple[Partition, ...]:
    """The partitions of least cost, best first.

    Exact up to `EXHAUSTIVE` partitions; beyond, as good as walking downhill and around from the balanced ones.

    Args:
        forbidden_cuts: layers before which no stage may begin.
        limit: how many to return at most.
    """
    count = count_partitions(num_layers, min_stages=min_stages, max_stages=max_stages, forbidden_cuts=forbidden_cuts)
    if count <= EXHAUSTIVE:
        every = all_partitions(num_layers, min_stages=min_stages, max_stages=max_stages, forbidden_cuts=forbidden_cuts)
        found = [(cost(partition), partition) for partition in every]
    else:
        found = list(_walk(num_layers, cost, min_stages, max_stages, forbidden_cuts, limit))
    return tuple(partition for _, partition in sorted(found)[:limit])


def balanced(num_layers: int, stages: int, forbidden_cuts: Sequence[int] = ()) -> Partition | None:
    """Stages as equal in layers as the forbidden cuts allow; None where there are too few cuts."""
    allowed = _allowed_cuts(num_layers, forbidden_cuts)
    if len(allowed) < stages - 1:
        return None
    cuts: list[int] = []
    for index in range(1, stages):
        wanted = num_layers * index / stages
        first = bisect.bisect_right(allowed, cuts[-1]) if cuts else 0
        # Later cuts need room as well.
        choices = allowed[first : len(allowed) - (stages - 1 - index)]
        cuts.append(min(choices, key=lambda cut: abs(cut - wanted)))
    return _counts(cuts, num_layers)


def _walk(
    num_layers: int,
    cost: Callable[[Partition], float],
    min_stages: int,
    max_stages: int,
    forbidden_cuts: Sequence[int],
    limit: int,
) -> Iterator[tuple[float, Partition]]:
    """Visits `limit` partitions and half as many again, always the cheapest that is known."""
    allowed = _allowed_cuts(num_layers, forbidden_cuts)
    starts = [balanced(num_layers, stages, forbidden_cuts) for stages in range(min_stages, max_stages + 1)]
    known = {start for start in starts if start is not None}
    heap = [(cost(start), start) for start in known]
    heapq.heapify(heap)
    for _ in range(limit + limit // 2):
        if not heap:
            return
        value, partition = heapq.heappop(heap)
        yield value, partition
        cuts = list(itertools.accumulate(partition[:-1]))
        for index, cut in enumerate(cuts):
            position = bisect.bisect_left(allowed, cut)
            for neighbour in (position - 1, position + 1):
                if not 0 <= neighbour < len(allowed):
                    continue
                moved = [*cuts[:index], allowed[neighbour], *cuts[index + 1 :]]
                if any(one >= other for one, other in itertools.pairwise(moved)):
                    continue
                candidate = _counts(moved, num_layers)
                if candidate not in known:
                    known.add(candidate)
                    heapq.heappush(heap, (cost(candidate), candidate))


def _allowed_cuts(num_layers: int, forbidden_cuts: Sequence[int]) -> list[int]:
    forbidden = set(forbidden_cuts)
    return [cut for cut in range(1, num_layers) if cut not in forbidden]


def _counts(cuts: Sequence[int], num_layers: int) -> Partition:
    return tuple(end - first for first, end in itertools.pairwise((0, *cuts, num_layers)))
