"""The tables of the proof, from curves made by hand."""

from __future__ import annotations

from tests.evaluation.search.methods import OURS
from tests.evaluation.search.replay import Curve
from tests.evaluation.search.table import first_plan_table, searches_table
from tests.evaluation.search.worlds import named_world


def curve(method: str, seed: int, scores: tuple[float, ...]) -> Curve:
    return Curve(
        world="w",
        method=method,
        seed=seed,
        scores=scores,
        device_seconds=tuple(10.0 * count for count in range(1, len(scores) + 1)),
        plans=("p",) * len(scores),
    )


CURVES = [
    curve(OURS, 0, (0.97, 0.985, 0.995)),
    curve(OURS, 1, (0.985, 0.985, 0.992)),
    curve(OURS, 2, (0.90, 0.91, 0.992)),
    curve("TPE, default", 0, (0.5,) * 8 + (0.985,)),
    curve("TPE, default", 1, (0.5,) * 20),
    curve("TPE, default", 2, (0.5,) * 20),
]


def test_trials_are_counted_to_the_first_plan_that_is_good_enough() -> None:
    assert CURVES[0].trials_to(0.98) == 2
    assert CURVES[0].device_seconds_to(0.98) == 20.0
    assert CURVES[4].trials_to(0.98) is None
    assert CURVES[4].device_seconds_to(0.98) is None


def test_searches_that_never_came_there_count_as_endless() -> None:
    lines = searches_table([named_world("w")], CURVES, [OURS, "TPE, default"]).splitlines()
    assert lines[2] == "| w, 12 plans | pipetune | 2, 3 | 100% | 3, 3 | 100% | 20, 30 |"
    assert lines[3] == "| w, 12 plans | TPE, default | never, never | 33% | never, never | 0% | never, never |"


def test_the_first_plan_and_the_stop_are_told_apart_from_the_rest() -> None:
    line = first_plan_table([named_world("w")], CURVES).splitlines()[2]
    assert line == (
        "| w | 97.0%, 90.0% | 67% | 100% | 100% | 3, 3, then 0, 0 | 99.2%, 99.2% | 100%, 100% | > 10.0, > 6.7 |"
    )
    own = [one.model_copy(update={"trials": 1}) for one in CURVES[:3]]
    line = first_plan_table([named_world("w")], own).splitlines()[2]
    assert line == "| w | 97.0%, 90.0% | 67% | 100% | 100% | 1, 1, then 2, 2 | 99.2%, 99.2% | 100%, 100% | –, – |"
