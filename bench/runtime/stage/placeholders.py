"""Modules that stand in for parts of other stages: same place, same kind of return value, no weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_PLAIN = str | int | float | bool | None
_OF_EVERY_MODULE = frozenset(vars(nn.Module)) | {"training"}


class Placeholder(nn.Module):
    """What is left of a module without its weights: plain attributes, and the same of every part of it.

    Models read attributes of layers, and initialise tables inside of them, that may be another stage's. Such tables
    stay until `empty` is called.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for holder in (*(vars(kind) for kind in reversed(type(module).__mro__)), vars(module)):
            for name, value in holder.items():
                if not name.startswith("_") and name not in _OF_EVERY_MODULE and isinstance(value, _PLAIN):
                    setattr(self, name, value)
        for name, table in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                self.register_buffer(name, table, persistent=False)
        for name, part in module.named_children():
            self.add_module(name, _placeholder(part))

    def empty(self) -> None:
        """Lets go of every tensor."""
        for module in self.modules():
            module._buffers.clear()


def _placeholder(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: _placeholder(part) for name, part in module.items()})
    return Placeholder(module)


class PlaceholderLayer(Placeholder):
    """Stands in for a layer of another stage: same plain attributes, same kind of return value, no weights.

    Args:
        layer: what it stands in for.
        returns_tuple_of: length of the tuple that the layer returns; 0 if it returns a tensor.
        shared: parts, by name, whose weights are tied to those of own layers and which must be there until the weights
            are loaded.
    """

    def __init__(self, layer: nn.Module, returns_tuple_of: int, shared: Iterable[str] = ()) -> None:
        super().__init__(layer)
        self._returns_tuple_of = returns_tuple_of
        self._hands_on_state = list(inspect.signature(layer.forward).parameters)[1:2] == ["state"]
        for name in shared:
            self.add_module(name, layer.get_submodule(name))

    def empty(self) -> None:
        """Lets go of every tensor, and of shared parts."""
        for name, part in self.named_children():
            self.add_module(name, _placeholder(part))
        super().empty()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What it was given; a state behind the hidden states is handed on, too."""
        if self._returns_tuple_of == 0:
            return hidden_states
        state = args[0] if args and self._hands_on_state else None
        return (hidden_states, state) + (None,) * (self._returns_tuple_of - 2)


class PlaceholderEmbedding(nn.Module):
    """Stands in for the embedding of another stage: zeros of the right shape, since the result is replaced."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._hidden_size = hidden_size
        # Some models read the dtype of this weight.
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zeros `[..., hidden_size]`."""
        return self.weight.new_zeros((*input_ids.shape, self._hidden_size))


class PlaceholderHead(nn.Module):
    """Stands in for the head of another stage: never called, but some families initialise its weight by name."""

    bias = None

    def __init__(self) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.empty(0), persistent=False)
