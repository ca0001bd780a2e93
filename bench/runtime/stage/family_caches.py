"""Slots for families that insist on cache classes of their own: they are both."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.models.minimax.modeling_minimax import MiniMaxCache
from transformers.models.xlstm.modeling_xlstm import xLSTMCache

from pipetune.bench.runtime.stage.kv_cache import SlotCache


class MiniMaxSlotCache(SlotCache, MiniMaxCache):
    """Keys and values by layers, the states of linear attention by list."""

    linear_cache: list[torch.Tensor | None]  # type: ignore[assignment]

    def seek(self, first_row: int, end_row: int, length: int) -> None:
        """Points at rows `[first_row, end_row)` at `length`; the states start anew with every prefill."""
        super().seek(first_row, end_row, length)
        if length == 0:
            self.linear_cache = [None] * len(self.layers)

    def nbytes(self) -> int:
        """Bytes of keys, values and states held by this stage."""
        states = getattr(self, "linear_cache", [])
        return super().nbytes() + sum(int(state.nbytes) for state in states if state is not None)

    def _entry(self, template: Any, is_own: bool) -> Any:
        # As in transformers, where such a layer counts no positions, and masks are made by the first layer's count.
        return DynamicLayer() if isinstance(template, LinearAttentionLayer) else super()._entry(template, is_own)  # type: ignore[no-untyped-call]


class XlstmSlotCache(SlotCache, xLSTMCache):
    """No keys and values; a tuple of states for each own layer."""

    rnn_state: dict[int, tuple[torch.Tensor, ...]]  # type: ignore[assignment]

    def seek(self, first_row: int, end_row: int, length: int) -> None:
        """Points at rows `[first_row, end_row)` at `length`; the states start anew with every prefill."""
        super().seek(first_row, end_row, length)
        if length == 0:
            xLSTMCache.__init__(self, self._config, end_row - first_row, dtype=self._dtype, device=str(self._device))
            self.rnn_state = {index: state if index in self._own else () for index, state in self.rnn_state.items()}

    def nbytes(self) -> int:
        """Bytes of states held by this stage."""
        return sum(int(tensor.nbytes) for states in getattr(self, "rnn_state", {}).values() for tensor in states)


SLOT_CACHES: dict[str, type[SlotCache]] = {"minimax": MiniMaxSlotCache, "xlstm": XlstmSlotCache}
"""By `model_type`."""
