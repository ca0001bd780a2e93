"""The KV cache of one slot: preallocated once, handed to the model as views, kept over micro-batches and runs."""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch

from pipetune.bench.models import hf_private as hf
from pipetune.bench.models.torch_private import tensors_in
from pipetune.bench.runtime import allocator


class SlotLayer(hf.DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer, `[rows, heads, max_len, head_dim]`, written in place.

    `seek` says which rows the next forward pass works on and how many positions they hold already. A layer that
    belongs to another stage is sought as well but never updated, so that masks come out alike on every stage.
    With a sliding window the view returned is the one that transformers' own sliding layer returns.
    """

    base = 0
    """Where the positions of the rows sought begin."""

    def __init__(self, *, rows: int, max_len: int, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.max_len = rows, max_len
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self._first_row, self._end_row, self._length = 0, rows, 0

    def seek(self, first_row: int, end_row: int, length: int, *, is_own: bool) -> None:
        """Points at rows `[first_row, end_row)`, of which `length` positions are filled."""
        self._first_row, self._end_row, self._length = first_row, end_row, length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates `[rows, heads, max_len, head_dim]` for keys and for values (whose sizes may differ)."""
        self.dtype, self.device = compute_dtype(key_states), key_states.device
        with allocator.lasting():
            self.keys, self.values = (
                torch.empty(
                    (self.rows, states.shape[1], self.max_len, states.shape[3]),
                    dtype=compute_dtype(states),
                    device=states.device,
                )
                for states in (key_states, value_states)
            )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[rows, heads, tokens, head_dim]` and returns views of all positions that may be attended to."""
        if self.keys is None:
            SlotLayer.lazy_initialization(self, key_states, value_states)
        begin, end = self._length, self._length + key_states.shape[-2]
        base = self.base
        assert base + end <= self.max_len, f"KV slot of {self.max_len} positions cannot take position {base + end}"
        start = 0 if self.sliding_window is None else max(begin - self.sliding_window + 1, 0)
        assert self.keys is not None
        assert self.values is not None
        views = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            rows = buffer[self._first_row : self._end_row]
            rows[:, :, base + begin : base + end].copy_(states)
            views.append(rows[:, :, base + start : base + end])
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
        """Positions of the sliding window; -1 without one."""
        return -1 if self.sliding_window is None else self.sliding_window


def compute_dtype(states: torch.Tensor) -> torch.dtype:
    """Dtype that attention reads: the half one in mixed precision, whatever `states` come in."""
    kind = states.device.type
    is_mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_mixed else states.dtype


class SlotIndexedLayer(SlotLayer):  # type: ignore[no-untyped-call]
    """Keys and values, and beside them the keys `[rows, max_len, dim]` by which positions to attend to are chosen."""

    indexer_keys: torch.Tensor | None = None
    indexer_position_ids: torch.Tensor | None = None
    """Kept by families of recurrent states alone, for a whole micro-batch."""
    _indexed = 0

    def seek(self, first_row: int, end_row: int, length: int, *, is_own: bool) -> None:
        """Points keys and values, and the indexer's keys, at these rows: each is written at a length of its own."""
        super().seek(first_row, end_row, length, is_own=is_own)
        self._indexed = length
        if length == 0:
            self.indexer_position_ids = None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Appends `[rows, tokens, dim]` and returns a view of all positions."""
        states = indexer_key_states
        if self.indexer_keys is None:
            self.indexer_keys = states.new_empty((self.rows, self.max_len, states.shape[-1]))
        begin, self._indexed = self._indexed, self._indexed + states.shape[1]
        rows = self.indexer_keys[self._first_row : self._end_row]
        rows[:, begin : self._indexed].copy_(states)
        return rows[:, : self._indexed]


class SlotStates(hf.LinearAttentionLayer):
    """Recurrent states of one layer, for a whole micro-batch; they start anew with every prefill."""

    _num_rows = 0

    def seek(self, first_row: int, end_row: int, length: int, *, is_own: bool) -> None:
        """Starts anew at `length` 0; states of as many rows stay at the same place in memory."""
        if not is_own:
            self.has_previous_state = dict.fromkeys(self.has_previous_state, length > 0)
        elif length == 0:
            if end_row - first_row != self._num_rows:
                self._num_rows = end_row - first_row
                SlotStates.__init__(self, number_of_states=self.number_of_states)
            hf.LinearAttentionLayer.reset(self)


class SlotHybridLayer(SlotStates, SlotLayer):  # type: ignore[misc, no-untyped-call, override]
    """Recurrent states and keys and values of one layer."""

    is_compileable = False

    def __init__(self, *, rows: int, max_len: int, sliding_window: int | None, number_of_states: int) -> None:
        SlotLayer.__init__(self, rows=rows, max_len=max_len, sliding_window=sliding_window)
        SlotStates.__init__(self, number_of_states=number_of_states)

    def seek(self, first_row: int, end_row: int, length: int, *, is_own: bool) -> None:
        """Points both at these rows."""
        SlotStates.seek(self, first_row, end_row, length, is_own=is_own)
        SlotLayer.seek(self, first_row, end_row, length, is_own=is_own)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocates the states alone: keys and values are allocated by `update` itself."""
        hf.LinearAttentionLayer.lazy_initialization(self, **kwargs)


class SlotCache(hf.Cache):
    """A model's cache for one slot of `rows` sequences of at most `max_len` positions.

    Keys, values and states of `own_layers` are kept, of the model's `num_layers`. What a family keeps in a kind of
    layer of its own stays that class, for a whole micro-batch at a time, and is made anew for every prefill.
    """

    states_of_modules: Sequence[Any] = ()
    """What the family keeps in its modules, while another slot's pass runs; nothing before a prefill."""

    def __init__(
        self,
        config: Any,
        *,
        rows: int,
        max_len: int,
        own_layers: range,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self.rows, self.max_len = rows, max_len
        templates = self._templates(num_layers)
        # Some families keep several entries for a layer.
        entries = max(len(templates) // num_layers, 1)
        self._own = range(own_layers.start * entries, own_layers.stop * entries)
        layers = [self._entry(template, index in self._own) for index, template in enumerate(templates)]
        self._of_own_kind = [index for index in self._own if not isinstance(layers[index], SlotLayer | SlotStates)]
        # Not `super()`: beside this class may stand a family's own, which makes its layers itself.
        hf.Cache.__init__(self, layers=layers)

    @torch.inference_mode()
    def seek(self, first_row: int, end_row: int, length: int) -> None:
        """Says which rows the next forward pass works on and how many positions they hold. States that start anew are
        written here: they were made in inference mode, and cannot be outside of it."""
        if length == 0:
            self.states_of_modules = ()
            templates = self._templates(0) if self._of_own_kind else []
            for index in self._of_own_kind:
                self.layers[index] = self._entry(templates[index], True)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SlotLayer | SlotStates):
                layer.seek(first_row, end_row, length, is_own=index in self._own)

    @torch.inference_mode()
    def fill(self, value: float, *, spread: float = 0.0) -> None:
        """Writes numbers about a value to every position of keys and values that have memory, over what they held."""
        for layer in self.layers:
            if isinstance(layer, SlotLayer) and layer.keys is not None and layer.values is not None:
                for tensor in (layer.keys, layer.values):
                    tensor.normal_(value, spread) if spread else tensor.fill_(value)

    @torch.inference_mode()
    def copy(self, source: Self, rows: slice, span: slice, *, to_row: int, to_first: int) -> None:
        """Copies keys and values of some rows and positions from another cache, or from this one; both keep nothing
        else, and have memory already."""
        layers: Iterator[tuple[Any, Any]] = zip(self.layers, source.layers, strict=True)
        for layer, other in layers:
            if getattr(other, "keys", None) is None:
                continue
            for own, theirs in ((layer.keys, other.keys), (layer.values, other.values)):
                states = theirs[rows, :, span]
                end_row, end = to_row + states.shape[0], to_first + states.shape[2]
                # What is shifted lies over where it goes.
                own[to_row:end_row, :, to_first:end].copy_(states.clone() if self is source else states)

    def seek_from(self, base: int, rows: range, length: int) -> None:
        """Points at some rows, whose positions are counted from `base`: 0 where more than keys and values is kept."""
        self.seek(rows.start, rows.stop, length)
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.base = base

    @property
    def is_linear(self) -> list[bool]:
        """Which entries hold states alone: a mask is made by the first that holds all keys."""
        return [type(layer) is SlotStates for layer in self.layers]

    def nbytes(self) -> int:
        """Bytes of keys, values and states held by this stage."""
        held = [*map(vars, self.layers), self.states_of_modules]
        tensors = {id(tensor): tensor for tensor in tensors_in(held)}
        return sum(int(tensor.nbytes) for tensor in tensors.values())

    def _templates(self, num_layers: int) -> list[Any]:
        """What transformers would keep; configs of encoder-decoders may count the encoder's layers."""
        known: list[Any] = hf.DynamicCache(config=self._config).layers
        return known + [hf.DynamicLayer() for _ in range(num_layers - len(known))]  # type: ignore[no-untyped-call]

    def _entry(self, template: Any, is_own: bool) -> Any:
        kind = type(template)
        sizes = {"rows": self.rows, "max_len": self.max_len}
        window = template.sliding_window if isinstance(template, hf.DynamicSlidingWindowLayer) else None
        if kind is hf.LinearAttentionLayer:
            return SlotStates(number_of_states=template.number_of_states)
        if kind in (hf.LinearAttentionAndFullAttentionLayer, hf.LinearAttentionAndSlidingWindowAttentionLayer):
            return SlotHybridLayer(**sizes, sliding_window=window, number_of_states=template.number_of_states)
        if kind is hf.DynamicIndexedLayer:
            return SlotIndexedLayer(**sizes)
        if kind is hf.DummyLayer or (is_own and kind not in (hf.DynamicLayer, hf.DynamicSlidingWindowLayer)):
            return template
        return SlotLayer(**sizes, sliding_window=window)


class MiniMaxSlotCache(SlotCache, hf.MiniMaxCache):
    """Keys and values by layers, the states of linear attention by list."""

    linear_cache: list[torch.Tensor | None]  # type: ignore[assignment]

    def seek(self, first_row: int, end_row: int, length: int) -> None:
        """Points at rows `[first_row, end_row)` at `length`; the states start anew with every prefill."""
        super().seek(first_row, end_row, length)
        if length == 0:
            self.linear_cache = [None] * len(self.layers)

    def nbytes(self) -> int:
        """Bytes of keys, values and states held by this stage."""
        return super().nbytes() + sum(int(state.nbytes) for state in tensors_in(getattr(self, "linear_cache", [])))

    def _entry(self, template: Any, is_own: bool) -> Any:
        # As in transformers, where such a layer counts no positions, and masks are made by the first layer's count.
        return hf.DynamicLayer() if isinstance(template, hf.LinearAttentionLayer) else super()._entry(template, is_own)  # type: ignore[no-untyped-call]


class XlstmSlotCache(SlotCache, hf.xLSTMCache):
    """No keys and values; a tuple of states for each own layer."""

    rnn_state: dict[int, tuple[torch.Tensor, ...]]  # type: ignore[assignment]

    def seek(self, first_row: int, end_row: int, length: int) -> None:
        """Points at rows `[first_row, end_row)` at `length`; the states start anew with every prefill."""
        super().seek(first_row, end_row, length)
        if length == 0:
            hf.xLSTMCache.__init__(self, self._config, end_row - first_row, dtype=self._dtype, device=str(self._device))
            self.rnn_state = {index: state if index in self._own else () for index, state in self.rnn_state.items()}

    def nbytes(self) -> int:
        """Bytes of states held by this stage."""
        return sum(int(state.nbytes) for state in tensors_in(getattr(self, "rnn_state", {})))


SLOT_CACHES: dict[str, type[SlotCache]] = {"minimax": MiniMaxSlotCache, "xlstm": XlstmSlotCache}
"""Slots for families that insist on cache classes of their own, and are both, by `model_type`."""
