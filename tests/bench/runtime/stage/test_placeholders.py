"""What stands for the parts of other stages: the same attributes and kind of return value, and no tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipetune.bench.runtime.stage.parts import PlaceholderEmbedding, PlaceholderHead, PlaceholderLayer


class Layer(nn.Module):
    """A layer with what models read of one: a plain attribute, a part, and a table that is no weight."""

    window = 8

    def __init__(self) -> None:
        super().__init__()
        self.kind = "full_attention"
        self.mlp = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, hidden_states: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("length", [0, 2, 3])
def test_a_layer_hands_on_what_it_gets(length: int) -> None:
    layer, hidden, state = PlaceholderLayer(Layer(), length), torch.ones(1, 2, 4), torch.zeros(1)
    output = layer(hidden, state)
    assert (output if length == 0 else output[0]) is hidden
    assert length == 0 or (len(output) == length and output[1] is state)


def test_attributes_stay_weights_go_and_tables_stay_until_it_is_emptied() -> None:
    layer: Any = PlaceholderLayer(Layer(), 0)
    assert (layer.kind, layer.window) == ("full_attention", 8)
    assert not list(layer.parameters())
    assert [name for name, _ in layer.named_buffers()] == ["table"]
    layer.empty()
    assert not list(layer.buffers())


def test_shared_parts_stay_until_it_is_emptied() -> None:
    real = Layer()
    layer = PlaceholderLayer(real, 0, shared=["mlp"])
    assert layer.get_submodule("mlp") is real.mlp
    layer.empty()
    assert not list(layer.parameters())


def test_embedding_and_head_hold_no_weights() -> None:
    embedding = PlaceholderEmbedding(4, torch.bfloat16)
    output = embedding(torch.zeros((2, 3), dtype=torch.long))
    assert (output.shape, output.dtype) == ((2, 3, 4), torch.bfloat16)
    assert not [*embedding.parameters(), *PlaceholderHead().parameters()]
