"""Several forward passes as one: prompts and a decode step in a single row of tokens, where each attends to its own
past alone.

What works token by token then reads its weights once for all of them, and nothing is padded. The model is given one row
`[1, N]` and its positions; in the place of its cache stands one that hands each part's keys and values to the part's
own, and masks and attention are made part by part. Families that attend by transformers' registries say so
(`_supports_attention_backend`); others would fail on what stands for keys and masks here, which are lists.
"""

import contextlib
import typing
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from pipetune.bench.models import hf_private as hf
from pipetune.bench.runtime.stage.attention import attend, build_mask
from pipetune.bench.runtime.stage.kv_cache import SlotCache, SlotLayer


class Part(NamedTuple):
    """What one forward pass would do: `tokens` new positions of each of the rows, behind `past` ones from `base` on."""

    cache: SlotCache
    first_row: int
    rows: int
    base: int
    past: int
    tokens: int
    mask: torch.Tensor | None
    """`[rows, past + tokens]`, 0 where a row is padded; None where none is."""

    def seek(self) -> SlotCache:
        """Its cache, pointed at these rows."""
        self.cache.seek_from(self.base, range(self.first_row, self.first_row + self.rows), self.past)
        return self.cache

    def layer(self, index: int) -> SlotLayer:
        """A layer's own keys and values, pointed at these rows."""
        found: Any = self.cache.layers[index]
        found.seek(self.first_row, self.first_row + self.rows, self.past, is_own=True)
        found.base = self.base
        return typing.cast("SlotLayer", found)


class _PerPart(list[torch.Tensor]):
    """Keys or values, `[rows, heads, positions, D]` of each part."""


class JoinedCache(hf.Cache):
    """The caches of some parts as one, for one forward pass."""

    def __init__(self, parts: Sequence[Part], last: torch.Tensor) -> None:
        """`last` is `[rows of all parts]`, on their device: where each row's last token is."""
        super().__init__(layers=parts[0].cache.layers)
        self.parts, self.last = parts, last
        self._lens = [part.rows * part.tokens for part in parts]
        self.sizes: list[tuple[int, int]] = []
        """Length and offset of the positions that the next mask is for, part by part."""

    def split(self, states: torch.Tensor) -> list[torch.Tensor]:
        """`[rows, heads, tokens, D]` of each part, of `[1, heads, N, D]`."""
        pieces = zip(self.parts, torch.split(states[0], self._lens, dim=1), strict=True)
        return [torch.unflatten(piece, 1, (part.rows, part.tokens)).transpose(0, 1) for part, piece in pieces]

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[_PerPart, _PerPart]:
        """Appends `[1, heads, N, D]`; of each part what its own cache returns."""
        keys, values = _PerPart(), _PerPart()
        for part, *new in zip(self.parts, self.split(key_states), self.split(value_states), strict=True):
            for found, one in zip((keys, values), part.layer(layer_idx).update(*new), strict=True):
                found.append(one)
        return keys, values

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Those of the whole row, which nobody needs; the mask is made next, of `sizes`."""
        self.sizes = [part.layer(layer_idx).get_mask_sizes(part.tokens) for part in self.parts]
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """0, as without a past: each part has its own."""
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given."""
        return 0


_joined: ContextVar[JoinedCache | None] = ContextVar("joined", default=None)


@contextlib.contextmanager
def joining(cache: JoinedCache) -> Iterator[None]:
    """Within it a model's forward pass is that of the cache's parts."""
    token = _joined.set(cache)
    try:
        yield
    finally:
        _joined.reset(token)


def _attend(
    module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **given: Any
) -> tuple[torch.Tensor, None]:
    if not isinstance(key, _PerPart):
        return hf.sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    cache = _joined.get()
    assert cache is not None
    one = attend if query.is_cuda else hf.sdpa_attention_forward
    each = zip(cache.split(query), key, value, attention_mask, strict=True)
    # `[rows, tokens, heads, D]` of each part.
    outputs = [one(module, *own, **given)[0].flatten(0, 1) for own in each]
    return torch.cat(outputs).unsqueeze(0), None


def _mask(**given: Any) -> Any:
    if (cache := _joined.get()) is None:
        return hf.sdpa_mask(**given)
    masks = []
    for part, (length, offset) in zip(cache.parts, cache.sizes, strict=True):
        padding = None if part.mask is None else part.mask.bool()
        own = {"batch_size": part.rows, "q_length": part.tokens, "q_offset": part.past, "attention_mask": padding}
        build = build_mask if torch.device(given["device"]).type == "cuda" else hf.sdpa_mask
        masks.append(build(**{**given, **own, "kv_length": length, "kv_offset": offset}))
    return masks


# For good, since stages may be threads of one process; what is not joined is left to transformers' own.
hf.ALL_ATTENTION_FUNCTIONS["sdpa"], hf.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _attend, _mask
