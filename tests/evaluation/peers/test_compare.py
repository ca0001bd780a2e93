"""Ratios are formed within rounds, and say how they stand to the aims."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.peers.cell_factory import make_cell, make_round
from tests.evaluation.peers.compare import COMPARISONS, SIDES, pair_ratios, spread, throughput, verdict
from tests.evaluation.peers.sides import SIDES_OF


def test_a_ratio_is_of_one_round_and_a_failed_pass_has_none() -> None:
    cell = make_cell(
        [
            make_round(0, {"pipeline": 2.0, "hf_one": 4.0}),
            make_round(1, {"hf_one": 9.0, "pipeline": 3.0}),
            make_round(2, {"pipeline": None, "hf_one": 4.0}),
            make_round(0, {"pipeline": 1.0, "pipeline_bare": 1.0}, "instrument"),
        ]
    )
    assert pair_ratios(cell, "generate", "pipeline", "hf_one") == (2.0, 3.0)
    assert pair_ratios(cell, "generate", "pipeline", "hf_two") == ()
    rate = throughput(cell, "generate", "pipeline")
    assert rate is not None
    assert (rate.count, rate.high) == (2, 20.0)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=9))
def test_a_spread_is_ordered(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.low <= found.median <= found.high
    assert 0.0 <= found.iqr <= found.high - found.low + 1e-9
    assert spread([]) is None


@pytest.mark.parametrize(
    ("value", "aim", "at_least", "said"),
    [
        (1.9, 1.85, True, "met"),
        (1.85, 1.85, True, "met"),
        (0.925, 1.85, True, "missed by 50%"),
        (0.1, 0.12, False, "met"),
        (0.18, 0.12, False, "missed by 50%"),
        (3.0, None, True, "shown"),
    ],
)
def test_verdicts(value: float, aim: float | None, at_least: bool, said: str) -> None:
    assert verdict(value, aim, at_least=at_least) == said


def test_every_comparison_is_of_sides_that_run_together() -> None:
    assert {side for sides in SIDES_OF.values() for side in sides} == set(SIDES)
    for comparison in COMPARISONS:
        named = {comparison.ours, comparison.peer} | ({comparison.single} - {None})
        assert named <= set(SIDES_OF[comparison.contest])
