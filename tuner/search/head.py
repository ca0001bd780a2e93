"""What is worth trying before anything is known: the plans that the cost model likes, and one of every kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from bench.spec import EffectivePlan
from tuner.planning.cost import CostModel
from tuner.search.resolver import Resolver
from tuner.search.space import Point, SearchSpace

MAX_HEAD = 16
"""So many plans of the analytic ranking run before TPE takes over."""
JOINT_PARTITIONS = 30
"""Partitions that the joint ranking looks at; the worse ones are left to TPE."""
_ENUMERABLE = 20_000
_ALIKE_PENALTY = 1.15
"""Each further plan of one layout and micro-batch size is taken for so much slower than it is predicted."""


def head(space: SearchSpace, cost: CostModel, resolve: Resolver, n_trials: int) -> tuple[Point, ...]:
    """What to try before TPE knows anything, most promising first; all that fits when that is no more than `n_trials`.

    Balanced partitions lead by themselves, since the slowest stage sets the beat. The cost model knows bubbles better
    than it knows kernels: so the further plans of one layout (replicas and stages) and micro-batch size, which differ
    from the first in small ways, wait until others had their turn.
    """
    distinct = distinct_points(space, resolve, limit=n_trials)
    predicted: dict[str, tuple[float, Point]] = {}
    for point in distinct if distinct is not None else joint_points(space):
        plan = space.plan(point)
        resolved = resolve(plan)
        if isinstance(resolved, EffectivePlan):
            predicted.setdefault(resolved.key, (cost.duration_s(plan, resolved.in_flight), point))
    alike: Counter[tuple[int, int, int]] = Counter()
    ranked: list[tuple[float, tuple[int, ...], Point]] = []
    for seconds, point in sorted(predicted.values(), key=lambda entry: (entry[0], *entry[1].values())):
        kind = (
            space.replicas_of(point),
            len(space.partitions[point["partition_rank"] - 1]),
            point["micro_batch_index"],
        )
        ranked.append((seconds * _ALIKE_PENALTY ** alike[kind], tuple(point.values()), point))
        alike[kind] += 1
    points = [point for _, _, point in sorted(ranked, key=lambda entry: entry[:2])]
    count = n_trials if distinct is not None else min(MAX_HEAD, max(1, math.ceil(n_trials * 2 / 3)))
    return tuple(_with_every_kind(space, points, count))


def _with_every_kind(space: SearchSpace, points: Sequence[Point], count: int) -> list[Point]:
    """The first `count` points, with the best of each number of replicas, cut and whole prompts, compiled and not.

    Of these the model knows least: each is measured once, as far as there is room, in place of the last ones.
    """
    firsts: dict[tuple[str, int], int] = {}
    for place, point in enumerate(points):
        chunk = point.get("chunk_index", len(space.chunk_sizes) - 1)
        cut = space.chunk_sizes[chunk] is not None
        for kind in (
            ("replicas", space.replicas_of(point)),
            ("cut", int(cut)),
            ("compile", point.get("compile_index", 0)),
        ):
            firsts.setdefault(kind, place)
    wanted = sorted(set(firsts.values()))[:count]
    rest = [place for place in range(len(points)) if place not in wanted][: max(0, count - len(wanted))]
    return [points[place] for place in sorted([*wanted, *rest])]


def distinct_points(space: SearchSpace, resolve: Resolver, *, limit: int) -> tuple[Point, ...] | None:
    """One point for each plan that runs differently and fits; None when there are more than `limit`."""
    found: dict[str, Point] = {}
    for count, point in enumerate(space.points()):
        if count >= _ENUMERABLE:
            return None
        resolved = resolve(space.plan(point))
        if isinstance(resolved, EffectivePlan):
            found.setdefault(resolved.key, point)
            if len(found) > limit:
                return None
    return tuple(found.values())


def joint_points(space: SearchSpace) -> Iterator[Point]:
    """Points of the best partitions, and of the best one of each number of replicas, under the largest cap.

    A larger cap never costs time, so that the ranking needs no other.
    """
    ranks = dict.fromkeys(range(1, min(JOINT_PARTITIONS, len(space.partitions)) + 1))
    for replicas in dict.fromkeys(space.replicas):
        ranks[space.replicas.index(replicas) + 1] = None
    caps = {"memory_index": len(space.memory_fractions) - 1} if len(space.memory_fractions) > 1 else {}
    few = space.model_copy(update={"memory_fractions": space.memory_fractions[-1:]})
    return ({**point, **caps} for rank in ranks for point in few.points(rank))
