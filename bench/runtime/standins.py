"""Modules that stand in for parts of other stages: same place, same kind of return value, no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SkipLayer(nn.Module):
    """Stands in for a layer of another stage: same plain attributes, same kind of return value, no weights."""

    def __init__(self, layer: nn.Module, returns_tuple_of: int) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training" and isinstance(value, str | int | float | bool | None):
                setattr(self, name, value)
        self._returns_tuple_of = returns_tuple_of

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._returns_tuple_of == 0:
            return hidden_states
        return (hidden_states,) + (None,) * (self._returns_tuple_of - 1)


class StubEmbedding(nn.Module):
    """Stands in for the embedding of another stage: zeros of the right shape, since the result is replaced."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._hidden_size = hidden_size
        # Some models read the dtype of this weight.
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.weight.new_zeros((*input_ids.shape, self._hidden_size))
