"""Packed layers compute what plain ones do, and take the place of no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipetune.bench.models.torch_private import can_pack
from pipetune.bench.runtime.packed_linear import PackedLinear, pack_linears, packed_bytes

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this build of torch has no such kernels")


class OwnLinear(nn.Linear):
    """A kind of its own, with perhaps a forward of its own."""


def test_only_plain_layers_are_packed_and_give_what_they_gave() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), Conv1D(5, 6), OwnLinear(5, 4), nn.Linear(4, 3, bias=False))  # type: ignore[no-untyped-call]
    x = torch.randn(2, 7, 8)
    with torch.inference_mode():
        expected = model(x)
        assert pack_linears(model) == 3
        assert [type(module) is PackedLinear for module in model] == [True, True, False, True]
        torch.testing.assert_close(model(x), expected)
    assert packed_bytes(model) == 4 * (8 * 6 + 6 * 5 + 4 * 3)
    assert pack_linears(model) == 0, "what is packed stays as it is"


def test_a_packed_weight_can_be_read() -> None:
    weight = torch.randn(6, 8)
    assert torch.equal(PackedLinear(weight, None).weight, weight)
