"""The plans of a space that a search may choose among: one of each that runs differently and fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Point, SearchSpace

MAX_CANDIDATES = 4000
"""In a space with more plans, those of the worse partitions are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A point, and what its plan comes to."""

    point: Point
    effective: EffectivePlan


def candidates(space: SearchSpace, resolve: Resolver, *, limit: int = MAX_CANDIDATES) -> tuple[Candidate, ...]:
    """One of every plan that runs differently, those of the best partitions first.

    Points under the largest cap come before all others, and stand for those whose cap makes no difference; smaller
    caps follow as far as there is room.

    Args:
        limit: how many there are at most, about; each number of replicas and of stages has its best partition among
            them.
    """
    found: dict[str, Candidate] = {}
    for point in _points(space, limit):
        if len(found) >= limit and point.get("memory_index", 0) < len(space.memory_fractions) - 1:
            break
        resolved = resolve(space.plan(point))
        if isinstance(resolved, EffectivePlan):
            found.setdefault(resolved.key, Candidate(point=point, effective=resolved))
    return tuple(found.values())


def best_ranks(space: SearchSpace, count: int) -> tuple[int, ...]:
    """Ranks of the best partitions, and of the best one of each number of replicas and of stages: these at least."""
    firsts: dict[tuple[int, int], int] = {}
    for rank, partition in enumerate(space.partitions, start=1):
        firsts.setdefault((space.replicas_of({"partition_rank": rank}), len(partition)), rank)
    others = [rank for rank in range(1, len(space.partitions) + 1) if rank not in firsts.values()]
    return tuple(sorted([*firsts.values(), *others[: max(0, count - len(firsts))]]))


def _points(space: SearchSpace, limit: int) -> Iterator[Point]:
    """Points of the best partitions, cap by cap from the largest on."""
    few = space.model_copy(update={"memory_fractions": space.memory_fractions[-1:]})
    sizes = {(rows, min(prefill, rows)) for rows in space.micro_batch_sizes for prefill in space.prefill_sizes}
    ranks = best_ranks(space, limit // (len(sizes) * len(space.chunk_sizes) * len(space.compile)))
    many_caps = len(space.memory_fractions) > 1
    for cap in reversed(range(len(space.memory_fractions))):
        for rank in ranks:
            for point in few.points(rank):
                yield {**point, "memory_index": cap} if many_caps else point
