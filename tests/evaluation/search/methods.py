"""Ways to search a world for its best plan: ours, Optuna's samplers over plain cuts, and what people do by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Protocol

import optuna

from pipetune.bench.record import Record
from pipetune.bench.spec import Plan
from tests.evaluation.search.ours import Ours
from tests.evaluation.search.world import World, throughput


class Method(Protocol):
    """Asks for plans and is told what they gave."""

    stopped: str | None
    """Why it ended by itself."""
    trials: int | None
    """Runs until then, where it measures its best plans again afterwards."""

    def next(self) -> Plan | None:
        """The next plan to run; None at the end."""
        ...

    def recommended(self) -> Plan | None:
        """What it holds for the best; None leaves that to whoever asks."""
        ...

    def tell(self, record: Record) -> None:
        """What it gave."""
        ...


class Listed:
    """Plans in an order that no result changes."""

    stopped: str | None = None
    trials: int | None = None

    def __init__(self, plans: Iterator[Plan]) -> None:
        self._plans = plans

    def next(self) -> Plan | None:
        return next(self._plans, None)

    def recommended(self) -> Plan | None:
        return None

    def tell(self, record: Record) -> None:
        """Learns nothing."""


class Tpe:
    """Optuna's TPE over plain cuts, as somebody would set it up who knows Optuna and not this problem.

    Cuts are integers, sorted; two that are equal are moved apart. A plan proposed again is run again.
    """

    stopped: str | None = None
    trials: int | None = None

    def __init__(self, world: World, seed: int, *, multivariate: bool) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._world = world
        self._study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=multivariate)
        )
        self._trial: optuna.Trial

    def next(self) -> Plan | None:
        world, trial = self._world, self._study.ask()
        layers, stages = world.shape.num_layers, len(world.devices)
        cuts = sorted(trial.suggest_int(f"cut_{index}", 1, layers - 1) for index in range(1, stages))
        size = world.micro_batch_sizes[trial.suggest_int("micro_batch_index", 0, len(world.micro_batch_sizes) - 1)]
        orders = device_orders(world)
        order = orders[trial.suggest_int("order_index", 0, len(orders) - 1)] if len(orders) > 1 else orders[0]
        self._trial = trial
        return plan_of(world, apart(cuts, layers), order, size)

    def recommended(self) -> Plan | None:
        return None

    def tell(self, record: Record) -> None:
        self._study.tell(self._trial, throughput(record))


def random_plans(world: World, seed: int) -> Iterator[Plan]:
    """Every plan once in random order; where there are too many to list, drawn at random."""
    rng = random.Random(seed)
    layers, stages = world.shape.num_layers, len(world.devices)
    if stages == 2:
        grid = list(itertools.product(range(1, layers), device_orders(world), world.micro_batch_sizes))
        for cut, order, size in rng.sample(grid, len(grid)):
            yield plan_of(world, (cut,), order, size)
        return
    while True:
        cuts = sorted(rng.sample(range(1, layers), stages - 1))
        yield plan_of(world, cuts, rng.choice(device_orders(world)), rng.choice(world.micro_batch_sizes))


def uniform_first(world: World, seed: int) -> Iterator[Plan]:
    """The even split at every micro-batch size in random order, then plans at random."""
    layers, stages = world.shape.num_layers, len(world.devices)
    cuts = [round(layers * index / stages) for index in range(1, stages)]
    yield from _sweep(world, cuts, seed)
    yield from random_plans(world, seed)


def auto_split(world: World, seed: int) -> Iterator[Plan]:
    """The split of `device_map="auto"` at every micro-batch size in random order, and nothing else."""
    assert world.auto_counts is not None, f"{world.name}: nobody asked accelerate for its split"
    yield from _sweep(world, list(itertools.accumulate(world.auto_counts[:-1])), seed)


def _sweep(world: World, cuts: list[int], seed: int) -> Iterator[Plan]:
    for size in random.Random(seed).sample(world.micro_batch_sizes, len(world.micro_batch_sizes)):
        yield plan_of(world, cuts, world.devices, size)


def device_orders(world: World) -> tuple[tuple[str, ...], ...]:
    """Which devices may hold the stages: as given, or in every order."""
    return tuple(itertools.permutations(world.devices)) if world.has_orders else (world.devices,)


def plan_of(world: World, cuts: list[int] | tuple[int, ...], order: tuple[str, ...], size: int) -> Plan:
    """The plan with these first layers of the stages but the first."""
    bounds = (0, *cuts, world.shape.num_layers)
    counts = tuple(end - first for first, end in itertools.pairwise(bounds))
    return Plan.from_layer_counts(counts, order, size)


def apart(cuts: list[int], num_layers: int) -> tuple[int, ...]:
    """Ascending cuts, equal ones moved up, or down from the end where there is no room."""
    for index in range(1, len(cuts)):
        cuts[index] = max(cuts[index], cuts[index - 1] + 1)
    most = num_layers - 1
    for index in range(len(cuts) - 1, -1, -1):
        cuts[index] = min(cuts[index], most)
        most = cuts[index] - 1
    return tuple(cuts)


OURS = "pipetune"
Make = Callable[..., Method]
"""A search of a world, by a seed, with a number of trials."""
METHODS: dict[str, Make] = {
    OURS: Ours,
    "TPE, default": lambda world, seed, budget: Tpe(world, seed, multivariate=False),
    "TPE, multivariate": lambda world, seed, budget: Tpe(world, seed, multivariate=True),
    "random": lambda world, seed, budget: Listed(random_plans(world, seed)),
    "uniform split first": lambda world, seed, budget: Listed(uniform_first(world, seed)),
    'device_map="auto", sizes swept': lambda world, seed, budget: Listed(auto_split(world, seed)),
}
"""By the name that the tables give them: a world, a seed and a number of trials make a search."""
