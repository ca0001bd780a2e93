"""When a static step counts as the eager one."""

from __future__ import annotations

import pytest
import torch

from pipetune.bench.runtime.kernels.static_step import disagreement


def test_disagreement_forgives_a_few_rows_and_no_missing_numbers() -> None:
    expected = torch.ones(8, 3)
    actual = expected.clone()
    actual[:2] = 5.0
    assert disagreement(expected, actual) == 0.0
    actual[2] = torch.nan
    assert disagreement(expected, actual) == float("inf")
    assert disagreement(expected[:1], actual[:1]) == pytest.approx(4.0)
    assert disagreement(torch.full((2, 3), torch.nan), expected[:2]) == 0.0
