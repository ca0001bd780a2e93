"""Rooms, floors and loose modules of both packages: `python -m tests.house`, which `make lint` runs.

A room is a direct subfolder of a package with all below it, a loose module stands for itself (`__init__` and `__main__`
do not count), and floors are the longest chain of imports over both. Imports within functions count; those for type
checkers alone do not. Within a room nothing is counted, but no parts of it may import one another in a circle either.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

PACKAGES = ("pipetune.bench", "pipetune.tuner")
MAX_ROOMS, MAX_FLOORS, MAX_LOOSE = 18, 8, 10
MAX_LINES = 41_000
"""Lines of Python that are installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class House:
    """What one package consists of."""

    package: str
    rooms: tuple[str, ...]
    loose: tuple[str, ...]
    floors: int
    circle: tuple[str, ...] = ()
    """Rooms and loose modules that import one another, if any do."""

    def faults(self) -> list[str]:
        """What is beyond the bounds, in words."""
        counts = (
            ("rooms", len(self.rooms), MAX_ROOMS),
            ("floors", self.floors, MAX_FLOORS),
            ("loose modules", len(self.loose), MAX_LOOSE),
        )
        found = [f"{self.package}: {count} {name}, at most {most}" for name, count, most in counts if count > most]
        return found + self.circles()

    def circles(self) -> list[str]:
        """The circle, in words."""
        return [f"{self.package}: imports in a circle: {' → '.join(self.circle)}"] if self.circle else []


def survey(package: str, graph: grimp.ImportGraph) -> House:
    """Counts a package's parts and the chain of imports over them."""
    children = graph.find_children(package)
    parts = {child for child in children if not child.endswith("__main__")}
    rooms = {part for part in parts if graph.find_children(part)}
    uses: dict[str, set[str]] = {part: set() for part in parts}
    for part in parts:
        for module in {part} | graph.find_descendants(part):
            for imported in graph.find_modules_directly_imported_by(module):
                target = ".".join(imported.split(".")[: package.count(".") + 2])
                if target in parts and target != part:
                    uses[part].add(target)
    try:
        tuple(TopologicalSorter(uses).static_order())
    except CycleError as error:
        circle = tuple(error.args[1])
        return House(package=package, rooms=_names(rooms), loose=_names(parts - rooms), floors=0, circle=circle)
    return House(package=package, rooms=_names(rooms), loose=_names(parts - rooms), floors=_longest(uses))


def _longest(uses: Mapping[str, set[str]]) -> int:
    """Length of the longest chain of an acyclic graph, in nodes."""

    @cache
    def height(part: str) -> int:
        return 1 + max(map(height, uses[part]), default=0)

    return max(map(height, uses), default=0)


def _names(parts: set[str]) -> tuple[str, ...]:
    return tuple(sorted(part.rpartition(".")[2] for part in parts))


def main() -> int:
    """Prints the counts, and says what is beyond the bounds."""
    graph = grimp.build_graph("pipetune", exclude_type_checking_imports=True, cache_dir=None)
    faults = []
    for package in PACKAGES:
        house = survey(package, graph)
        print(f"{package}: {len(house.rooms)} rooms, {house.floors} floors, {len(house.loose)} loose modules")
        faults += house.faults()
        inner = sorted(name for name in graph.find_descendants(package) if graph.find_children(name))
        faults += [circle for room in inner for circle in survey(room, graph).circles()]
    root = Path(__file__).parents[1]
    files = [path for folder in ("bench", "tuner", "pipetune") for path in (root / folder).rglob("*.py")]
    lines = sum(len(path.read_bytes().splitlines()) for path in files)
    print(f"installed: {lines} lines of Python in {len(files)} files")
    faults += [f"{lines} lines of Python would be installed, at most {MAX_LINES}"] if lines > MAX_LINES else []
    print("".join(f"{fault}\n" for fault in faults), end="", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
