"""The KV cache of one slot: preallocated once, handed to the model as views, kept over micro-batches and runs."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)


class SlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer, `[rows, heads, max_len, head_dim]`, written in place.

    `seek` says which rows the next forward pass works on and how many positions they hold already. A layer that
    belongs to another stage is sought as well but never updated, so that masks come out alike on every stage.
    With a sliding window the view returned is the one that transformers' own sliding layer returns.
    """

    def __init__(self, *, rows: int, max_len: int, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.max_len = max_len
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self._first_row = 0
        self._end_row = rows
        self._length = 0

    def seek(self, first_row: int, end_row: int, length: int) -> None:
        """Points at rows `[first_row, end_row)`, of which `length` positions are filled."""
        self._first_row, self._end_row, self._length = first_row, end_row, length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates `[rows, heads, max_len, head_dim]` for keys and for values (whose sizes may differ)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            torch.empty(
                (self.rows, states.shape[1], self.max_len, states.shape[3]), dtype=states.dtype, device=states.device
            )
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[rows, heads, tokens, head_dim]` and returns views of all positions that may be attended to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self._length, self._length + key_states.shape[-2]
        assert end <= self.max_len, f"KV slot of {self.max_len} positions cannot take position {end}"
        start = 0 if self.sliding_window is None else max(begin - self.sliding_window + 1, 0)
        assert self.keys is not None
        assert self.values is not None
        views = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            rows = buffer[self._first_row : self._end_row]
            rows[:, :, begin:end].copy_(states)
            views.append(rows[:, :, start:end])
        self._length = end
        return views[0], views[1]

    def get_seq_length(self) -> int:
        """Positions filled in the rows sought."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` will return for `query_length` new tokens."""
        start = 0 if self.sliding_window is None else max(self._length - self.sliding_window + 1, 0)
        return self._length + query_length - start, start

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def nbytes(self) -> int:
        """Bytes allocated; 0 before the first use and on other stages."""
        if self.keys is None or self.values is None:
            return 0
        return int(self.keys.nbytes + self.values.nbytes)


class SlotCache(Cache):
    """A model's cache for one slot of `rows` sequences of at most `max_len` positions.

    Layers of attention are `SlotLayer`; what transformers keeps for other kinds of layer (recurrent states) stays
    its own class and starts anew with every prefill.
    """

    def __init__(self, config: Any, *, rows: int, max_len: int, own_layers: range) -> None:
        self._config = config
        self.rows = rows
        self.max_len = max_len
        self._own_layers = own_layers
        layers: list[Any] = []
        for template in DynamicCache(config=config).layers:
            if type(template) is DynamicLayer:
                layers.append(SlotLayer(rows=rows, max_len=max_len))
            elif type(template) is DynamicSlidingWindowLayer:
                layers.append(SlotLayer(rows=rows, max_len=max_len, sliding_window=template.sliding_window))
            else:
                layers.append(template)
        super().__init__(layers=layers)

    @property
    def rows_are_separable(self) -> bool:
        """Whether rows may be prefilled in several pieces: not where a recurrent state covers the whole batch."""
        return all(isinstance(layer, SlotLayer | DummyLayer) for layer in self.layers)

    def seek(self, first_row: int, end_row: int, length: int) -> None:
        """Says which rows the next forward pass works on and how many positions they hold."""
        if length == 0 and not self.rows_are_separable:
            for index, fresh in enumerate(DynamicCache(config=self._config).layers):
                if not isinstance(self.layers[index], SlotLayer | DummyLayer):
                    self.layers[index] = fresh
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SlotLayer):
                layer.seek(first_row, end_row, length)
            elif isinstance(layer, LinearAttentionCacheLayerMixin) and index not in self._own_layers:
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, length > 0)

    def nbytes(self) -> int:
        """Bytes of keys, values and states held by this stage."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                total += layer.nbytes()
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
                total += sum(int(state.nbytes) for state in states if state is not None)
        return total
