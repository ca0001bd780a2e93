"""The simulated gates: scaled as their class says, and our rule within its error rates on a small sample."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluation.gate.power import CLASSES, METHODS, _paired, cell, table

OURS = next(iter(METHODS))


@pytest.mark.parametrize("name", CLASSES)
def test_paired_differences_have_the_spread_that_names_the_class(name: str) -> None:
    lots = np.random.default_rng(0)
    differences = np.concatenate([_paired(lots, CLASSES[name], 3, 24).ravel() for _ in range(300)])
    assert float(differences.std()) == pytest.approx(CLASSES[name], rel=0.12)
    assert abs(float(differences.mean())) < 0.1 * CLASSES[name]


def test_our_rule_errs_rarely_where_habits_err_often() -> None:
    assert cell(OURS, "typical", 0.0, repetitions=100, seeds=1).fail <= 0.03
    assert cell(OURS, "typical", 0.10, repetitions=50, seeds=1).fail == 1.0
    assert cell(OURS, "typical", 0.05, repetitions=100, seeds=1).ok <= 0.10
    assert cell("stored baseline, mean > 5 %", "noisy", 0.0, repetitions=100, seeds=1).fail > 0.1


def test_the_table_has_a_row_for_every_method_and_class() -> None:
    text = table(repetitions=2, seeds=2, jobs=1)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(METHODS) * len(CLASSES)
    assert {line.count("|") for line in rows} == {10}
