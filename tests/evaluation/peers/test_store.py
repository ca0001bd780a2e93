"""A cell is taken up again where nothing changed, and starts anew where anything did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.machine.hardware import read_machine
from pipetune.bench.spec import ModelSpec, Workload
from tests.evaluation.peers import store
from tests.evaluation.peers.cell_factory import make_cell, make_round
from tests.evaluation.peers.cells import Extent

ASKED: dict[str, Any] = {
    "model": ModelSpec(name="a"),
    "workload": Workload(),
    "seed": 0,
    "quick": False,
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2"},
    "config_text": "{}",
}


def test_what_was_saved_is_loaded_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cell.json"
    cell = make_cell([make_round(0, {"pipeline": 2.0, "hf_one": 4.0})], identity="same")
    store.save(path, cell)
    machine = read_machine()
    assert store.load(path, identity="same", machine=machine) == cell
    assert store.load(path, identity="other", machine=machine) is None
    assert store.load(path, identity="same", machine=machine.model_copy(update={"hardware_id": "other"})) is None
    assert store.load(tmp_path / "none.json", identity="same", machine=machine) is None
    path.write_text("{}")
    assert store.read(path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"model": ModelSpec(name="b")},
        {"workload": Workload(num_prompts=3)},
        {"seed": 1},
        {"quick": True},
        {"packages": {"torch": "2.14.0", "transformers": "5.23.0"}},
        {"config_text": "{ }"},
        {"sides": ("pipeline", "hf_one")},
    ],
)
def test_every_change_of_the_question_is_another_cell(change: dict[str, Any]) -> None:
    assert store.identity_of(**{**ASKED, **change}) != store.identity_of(**ASKED)


def test_packages_that_no_peer_is_made_of_may_change() -> None:
    packages = {**ASKED["packages"], "numpy": "3"}
    assert store.identity_of(**{**ASKED, "packages": packages}) == store.identity_of(**ASKED)


def test_only_missing_rounds_are_left() -> None:
    cell = make_cell([make_round(number, {"pipeline": 2.0, "hf_one": 4.0}) for number in range(3)])
    assert Extent(pairs=5, extras=False).left(None) == 10
    assert Extent(pairs=5, extras=False).left(cell) == 2 + 5
    assert Extent(pairs=5, extras=True).left(cell) == 2 + 5 + 10
    assert Extent(pairs=5, extras=True, only=("pipeline", "hf_one")).left(cell) == 2
    assert Extent(pairs=3, extras=False, only=("pipeline", "hf_one")).left(cell) == 0
    assert Extent(pairs=3, extras=False, only=("pipeline",)).left(None) == 0


def test_files_are_named_after_their_question() -> None:
    model = ModelSpec(name="/some/where/dummy-llama-24l")
    assert store.path_of(Path("out"), model, "balanced", quick=True) == Path("out/dummy-llama-24l-balanced-quick.json")
