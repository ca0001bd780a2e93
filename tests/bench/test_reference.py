"""The truth that plans are checked against must itself be numbers."""

from __future__ import annotations

import pytest
import torch

from bench.errors import ModelError
from bench.reference import spread_of


def test_passes_that_agree_bit_for_bit_leave_a_few_units_in_the_last_place() -> None:
    logits = torch.tensor([[1.0, -8.0]])
    assert spread_of(logits, [logits.clone()], torch.float32) == 4 * torch.finfo(torch.float32).eps * 8
    assert spread_of(logits, [logits + 0.5], torch.float32) == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_overflows_is_refused_by_its_dtype(value: float) -> None:
    logits = torch.tensor([[1.0, value]])
    with pytest.raises(ModelError, match=r"float16.*not finite"):
        spread_of(logits, [logits], torch.float16)
