"""A slot seen with fixed shapes is the slot; and when a static step counts as the eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipetune.bench.runtime.kernels.static_step import StaticSlotCache, disagreement, why_not_static
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from tests.tiny_models import tiny_config

CPU = torch.device("cpu")


def slot_of(config: Any) -> SlotCache:
    return SlotCache(
        config,
        rows=3,
        max_len=16,
        own_layers=range(config.num_hidden_layers),
        num_layers=config.num_hidden_layers,
        dtype=torch.float32,
        device=CPU,
    )


def test_a_step_writes_where_the_slot_reads() -> None:
    config = tiny_config("llama")
    slot = slot_of(config)
    assert why_not_static(slot) is None
    slot.seek(0, 2, 0)
    prompt = torch.randn(2, 2, 5, 4)
    slot.update(prompt, prompt, 0)
    slot.fill(0.0)
    position = torch.tensor([5])
    static = StaticSlotCache(slot, rows=2, kv_len=8, position=position)
    token = torch.randn(2, 2, 1, 4)
    keys, values = static.update(token, -token, 0)
    assert keys.shape == (2, 2, 8, 4)
    assert torch.equal(keys[:, :, 5:6], token)
    assert int(static.get_seq_length()) == 5
    slot.seek(0, 2, 6)
    more, _ = slot.update(token, token, 0)
    assert torch.equal(more[:, :, 5:6], token)
    assert torch.equal(values[:, :, 5:6], -token)
    assert torch.equal(more[:, :, :5], torch.zeros(2, 2, 5, 4)), "filled"


def test_disagreement_forgives_a_few_rows_and_no_missing_numbers() -> None:
    expected = torch.ones(8, 3)
    actual = expected.clone()
    actual[:2] = 5.0
    assert disagreement(expected, actual) == 0.0
    actual[2] = torch.nan
    assert disagreement(expected, actual) == float("inf")
    assert disagreement(expected[:1], actual[:1]) == pytest.approx(4.0)
    assert disagreement(torch.full((2, 3), torch.nan), expected[:2]) == 0.0
