"""TPE's suggestions: new, without a trace, and the same for the same trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.policy.tpe import TpePolicy
from pipetune.tuner.search.space.space import Point
from tests.record_factory import make_measurement, make_record
from tests.tuner.search.space_factory import build

SPACE = build()[0]
OBJECTIVES = ("output_throughput",)


def open_(path: Path) -> OptunaStudy:
    return OptunaStudy.open(f"sqlite:///{path}", SPACE, objectives=OBJECTIVES, constraints=())


def suggest(study: OptunaStudy, is_new: Callable[[Point], bool] = lambda point: True) -> Point | None:
    return TpePolicy(SPACE, objectives=OBJECTIVES, seed=0, trials=study.trials).suggest(is_new)


def run(study: OptunaStudy, point: Point) -> None:
    number = study.ask(point)
    assert number is not None
    plan = SPACE.plan(point)
    record = make_record(number, "trial", plan, make_measurement(plan), trial_number=number)
    study.tell(record.model_copy(update={"params": dict(point)}))


@pytest.fixture
def study(tmp_path: Path) -> Iterator[OptunaStudy]:
    opened = open_(tmp_path / "study.db")
    yield opened
    opened.close()


def test_suggestions_are_new_and_leave_no_trace_until_they_start(study: OptunaStudy) -> None:
    seen: list[Point] = []
    for index in range(12):
        point = suggest(study, lambda point: point not in seen)
        assert point is not None
        assert len(study.trials()) == index
        seen.append(point)
        run(study, point)
    assert len({tuple(point.values()) for point in seen}) == 12


def test_the_last_new_point_is_found_and_then_none(study: OptunaStudy) -> None:
    last = list(SPACE.points())[-1]
    assert suggest(study, lambda point: point == last) == last
    assert suggest(study, lambda point: False) is None


def test_a_seed_gives_one_sequence_and_a_resumed_study_does_not_start_over(tmp_path: Path) -> None:
    def suggestions(name: str, reopen: bool) -> list[Point | None]:
        found = []
        opened = open_(tmp_path / name)
        for _ in range(6):
            point = suggest(opened)
            assert point is not None
            found.append(point)
            run(opened, point)
            if reopen:
                opened.close()
                opened = open_(tmp_path / name)
        opened.close()
        return list(found)

    assert suggestions("a.db", reopen=False) == suggestions("b.db", reopen=True)
