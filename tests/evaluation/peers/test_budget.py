"""Time is estimated beforehand and refused in time."""

from __future__ import annotations

import pytest

from pipetune.bench.spec import ModelSpec, Workload
from tests.evaluation.peers.budget import Budget, OutOfTimeError, cell_s, pass_s
from tests.evaluation.peers.questions import MODELS


def test_a_part_ends_within_the_whole() -> None:
    whole = Budget(1000.0)
    part = whole.part(0.25)
    assert part.left_s <= 250.0
    part.demand(200.0)
    with pytest.raises(OutOfTimeError):
        part.demand(300.0)
    with pytest.raises(OutOfTimeError):
        Budget(-1.0).demand(0.0)


def test_estimates_grow_with_the_work_and_are_none_for_unknown_models() -> None:
    small, large = Workload(num_prompts=4), Workload(num_prompts=64)
    for model in MODELS.values():
        one, other = pass_s(model, small), pass_s(model, large)
        assert one is not None
        assert other == pytest.approx(16 * one)
    unknown = ModelSpec(name="some/thing")
    assert pass_s(unknown, small) is None
    assert cell_s(unknown, small, rounds=5, extras=False) is None
    for model in MODELS.values():
        plain = cell_s(model, small, rounds=5, extras=False)
        extra = cell_s(model, small, rounds=5, extras=True)
        longer = cell_s(model, small, rounds=9, extras=False)
        assert plain is not None
        assert extra is not None
        assert longer is not None
        assert 0.0 < plain < min(extra, longer)
