"""A slot seen with fixed shapes is the slot: what the one writes the other reads."""

from __future__ import annotations

from typing import Any

import torch

from pipetune.bench.runtime.kernels.static_cache import StaticSlotCache, why_not_static
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
        recurrent=False,
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
