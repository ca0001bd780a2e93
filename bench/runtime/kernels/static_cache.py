"""A KV slot seen with fixed shapes: one more token a row, at a position that is a number on the device.

The tensors are those of the slot (`bench.runtime.stage.kv_cache`), so that prefill, which sees views of growing
length, and decode steps of fixed shape work on the same memory, and nothing is copied in between. A step writes its
keys and values by index, and attention reads `kv_len` positions whatever the position is: the model's own mask hides
what lies behind it, since transformers builds masks from the cache's length, which is a tensor here as in its
`StaticCache`. A sliding window is such a mask as well: the whole length is read and what left the window is hidden.

What is hidden must be a number all the same, and no huge one: its score is computed before it is hidden, and infinity
less infinity is NaN. Keys and values that some tokens left are such; uninitialised memory is not, and is filled first.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from pipetune.bench.runtime.stage.kv_cache import SlotCache, SlotLayer


def why_not_static(slot: SlotCache) -> str | None:
    """Why a slot cannot be seen with fixed shapes; None if it can.

    Keys and values alone can: recurrent states and the states of families with caches of their own are written by code
    that decides on the host.
    """
    for index, layer in enumerate(slot.layers):
        # What is neither is a place that nothing is kept in.
        if isinstance(layer, CacheLayerMixin | LinearAttentionCacheLayerMixin) and type(layer) is not SlotLayer:
            return f"layer {index} keeps a {type(layer).__name__}, and keys and values alone have a static form"
    return None


class StaticSlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer, `[rows, heads, kv_len, head_dim]`: views of a slot's."""

    is_compileable = True
    """So that transformers builds the mask in full: to leave it out, it would have to look at it on the host."""

    def __init__(self, layer: SlotLayer, *, rows: int, kv_len: int, position: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = layer.is_sliding
        self.sliding_window = layer.sliding_window
        self._kv_len = kv_len
        self._position = position
        self._length = position.view(())
        if layer.keys is not None and layer.values is not None:
            self.keys, self.values = layer.keys[:rows, :, :kv_len], layer.values[:rows, :, :kv_len]
            self.dtype, self.device = layer.keys.dtype, layer.keys.device
            self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Never: a slot has its memory before it is seen with fixed shapes."""
        raise AssertionError("a static layer was updated whose slot had no memory yet")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes `[rows, heads, 1, head_dim]` at the position and returns all `kv_len` positions."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self._position, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self._position, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions filled before this step: a tensor, which transformers takes wherever it takes a number."""
        return self._length  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` returns: always the same."""
        return self._kv_len, 0

    def get_max_length(self) -> int:
        """Positions that attention reads."""
        return self._kv_len


class StaticSlotCache(Cache):
    """The first `rows` rows and `kv_len` positions of a slot, for steps of one token at `position`.

    Args:
        slot: its own layers have memory already: a forward pass went through it.
        position: `[1]` int64 on the slot's device; whoever runs a step writes it first.
    """

    def __init__(self, slot: SlotCache, *, rows: int, kv_len: int, position: torch.Tensor) -> None:
        assert rows <= slot.rows, f"{rows} rows of a slot of {slot.rows}"
        assert kv_len <= slot.max_len, f"{kv_len} positions of a slot of {slot.max_len}"
        super().__init__(
            layers=[
                StaticSlotLayer(layer, rows=rows, kv_len=kv_len, position=position)
                if isinstance(layer, SlotLayer)
                else layer
                for layer in slot.layers
            ]
        )

    @property
    def is_compileable(self) -> bool:
        """Always: so that transformers builds masks in full."""
        return True
