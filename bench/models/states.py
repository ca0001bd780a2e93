"""How large a model's recurrent states are, found out by running it on the meta device, where nothing is computed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from pipetune.bench.models.layers import cache_name

_TOKENS = 8


def state_bytes(model: PreTrainedModel, num_layers: int) -> tuple[int, ...]:
    """Bytes of the states that each layer keeps for one row, whatever its length; keys and values are not among them.

    Zeros where the model cannot be run on the meta device, as with caches of a family's own.

    Args:
        model: on the meta device; not to be used afterwards.
    """
    untyped: Any = model
    name = cache_name(model)
    assert name is not None
    try:
        # Grouped matrix products have no meta form.
        untyped.set_experts_implementation("batched_mm")
        few, more = _kept_bytes(untyped, name, _TOKENS), _kept_bytes(untyped, name, 2 * _TOKENS)
    # Families fail in every way there is where they look into numbers.
    except Exception:
        return (0,) * num_layers
    # What grows with the tokens are keys and values.
    entries = [2 * one - other for one, other in zip(few, more, strict=True)]
    each = max(len(entries) // num_layers, 1)
    states = [sum(entries[index * each : (index + 1) * each]) for index in range(num_layers)]
    return tuple(max(size, 0) for size in states)


def _kept_bytes(model: Any, name: str, tokens: int) -> list[int]:
    """Bytes that each entry of the cache holds after a prompt of one row."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{name: cache})
    return [_bytes(vars(layer)) for layer in cache.layers]


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
