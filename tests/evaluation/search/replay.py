"""One search of one world: what the plan it would recommend after each trial is really worth, and what that cost."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping

from pipetune.bench.spec import Plan, Value
from tests.evaluation.search.methods import METHODS, OURS, Make
from tests.evaluation.search.world import World, throughput


class Curve(Value):
    """A search, run by run."""

    world: str
    method: str
    seed: int
    scores: tuple[float, ...]
    """After each run: the worth of the plan recommended, or else of the one that has the best mean so far, as a share
    of the best plan's."""
    device_seconds: tuple[float, ...]
    """After each run: devices × seconds, what was learnt before the first trial included."""
    plans: tuple[str, ...]
    """Effective plans run, by their keys."""
    stopped: str | None = None
    """Why a search ended by itself."""
    trials: int | None = None
    """Runs until then; those behind are of its finals."""

    def trials_to(self, worth: float) -> int | None:
        """Runs until the recommended plan is worth so much; None where that never came."""
        return next((count for count, score in enumerate(self.scores, start=1) if score >= worth), None)

    def device_seconds_to(self, worth: float) -> float | None:
        """Device-seconds until then."""
        count = self.trials_to(worth)
        return None if count is None else self.device_seconds[count - 1]


def search(world: World, method: str, seed: int, budget: int, methods: Mapping[str, Make] = METHODS) -> Curve:
    """Lets a method search a world for so many runs, or until it ends by itself."""
    visits: Counter[str] = Counter()
    seen: dict[str, list[float]] = defaultdict(list)
    plans: dict[str, Plan] = {}
    scores: list[float] = []
    spent: list[float] = []
    keys: list[str] = []
    searcher = methods[method](world, seed, budget)
    cost = world.profile_s * len(world.devices) if method == OURS else 0.0
    while len(scores) < budget:
        plan = searcher.next()
        if plan is None:
            break
        key = world.resolve(plan).key
        record = world.run(plan, visits[key], seed)
        visits[key] += 1
        searcher.tell(record)
        seen[key].append(throughput(record))
        plans[key] = plan
        cost += record.wall_s * len(plan.devices)
        best = searcher.recommended() or plans[max(seen, key=lambda one: statistics.fmean(seen[one]))]
        scores.append(world.score(best, seed))
        spent.append(round(cost, 1))
        keys.append(key)
    return Curve(
        world=world.name,
        method=method,
        seed=seed,
        scores=tuple(round(score, 5) for score in scores),
        device_seconds=tuple(spent),
        plans=tuple(keys),
        stopped=searcher.stopped,
        trials=searcher.trials,
    )
