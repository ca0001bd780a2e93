"""One plan as both sides is told apart from itself only where every round says the same."""

from __future__ import annotations

import pytest

from tests.evaluation.load.versus import null_rows


def shares(highest: float) -> dict[float, float]:
    """Of two rates that enclose one, by little."""
    return {0.999 * highest: 0.95, 1.001 * highest: 0.85}


@pytest.mark.parametrize(("factors", "told_apart"), [([1.1, 1 / 1.1] * 5, False), ([1.02] * 10, True)])
def test_a_null_is_judged_by_the_gates_test(factors: list[float], told_apart: bool) -> None:
    rounds = [{"a": shares(20.0 * factor), "b": shares(20.0)} for factor in factors]
    p, ratio, apart = null_rows("a plan", rounds)
    assert (p.value < 0.05) == told_apart
    assert ratio.value == pytest.approx(factors[0] if told_apart else 1.0, abs=0.01)
    assert apart.value == pytest.approx(factors[0] - 1.0, abs=0.01)
    assert null_rows("a plan", [{"a": {20.0: 0.5}, "b": {20.0: 0.95}}]) == []
