"""Worlds for tests that need no more than a name."""

from __future__ import annotations

from tests.evaluation.search.simulated import simulated_worlds
from tests.evaluation.search.world import World


def named_world(name: str) -> World:
    """A world of 12 plans that says it was measured."""
    world = simulated_worlds()[0]
    world.name, world.num_plans = name, 12
    world.simulated = False
    return world
