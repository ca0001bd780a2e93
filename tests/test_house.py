"""The counts of rooms, floors and loose modules, on graphs with known ones."""

from __future__ import annotations

import grimp
import pytest

from tests.house import House, survey


def graph_of(*imports: tuple[str, str]) -> grimp.ImportGraph:
    """Modules of the package `p`, by what imports what; all parents are there."""
    graph = grimp.ImportGraph()
    names = {name for pair in imports for name in pair}
    for name in names | {name.rpartition(".")[0] for name in names if "." in name} | {"p"}:
        graph.add_module(name)
    for importer, imported in imports:
        graph.add_import(importer=importer, imported=imported)
    return graph


def test_rooms_and_loose_modules_are_counted_with_the_chain_over_them() -> None:
    graph = graph_of(
        ("p.cli.main", "p.run.loop"),
        ("p.run.loop", "p.run.deep"),
        ("p.run.deep", "p.values"),
        ("p.cli.main", "p.values"),
        ("p.__main__", "p.cli.main"),
    )
    assert survey("p", graph) == House(package="p", rooms=("cli", "run"), loose=("values",), floors=3)


def test_imports_within_a_room_are_its_own_matter() -> None:
    assert not survey("p", graph_of(("p.run.a", "p.run.b"), ("p.run.b", "p.run.a"))).circle


def test_a_circle_over_rooms_is_told() -> None:
    house = survey("p", graph_of(("p.a.x", "p.b.y"), ("p.b.z", "p.c"), ("p.c", "p.a.w")))
    assert {"p.a", "p.b", "p.c"} == set(house.circle)
    assert "circle" in house.faults()[0]


@pytest.mark.parametrize(("floors", "rooms", "loose"), [(9, 1, 1), (1, 19, 1), (1, 1, 11)])
def test_what_is_beyond_the_bounds_is_a_fault(floors: int, rooms: int, loose: int) -> None:
    house = House(package="p", rooms=("r",) * rooms, loose=("l",) * loose, floors=floors)
    assert len(house.faults()) == 1
    assert "at most" in house.faults()[0]
