"""Attention of stages on GPUs: transformers' own by SDPA, less what it copies and what it asks the host.

Where queries share keys and values, transformers copies these out to all heads as soon as there is a mask, in every
step. Here each key is read by its queries where it lies. And where there is a mask, transformers looks at it to see
whether it can be left out; a stage has none where nothing is padded, so that nobody has to look.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from pipetune.bench.models import hf_private as hf

_UNGROUPED: Any = SimpleNamespace()
"""In the place of a module whose queries share nothing."""


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Attention `[B, S, heads, D]` of `[B, heads, S, D]` on `[B, KV heads, L, D]`, as `sdpa_attention_forward`. One
    query token a row takes the place of a group's queries; of several, each member of the groups goes by itself."""
    groups: int = getattr(module, "num_key_value_groups", 1)
    shared = attention_mask is not None and attention_mask.shape[1] == 1
    if groups == 1 or not shared or given.get("position_bias") is not None:
        return hf.sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    grouped = query.reshape(query.shape[0], -1, groups, *query.shape[2:])
    if query.shape[2] == 1:
        output, _ = hf.sdpa_attention_forward(_UNGROUPED, grouped.squeeze(3), key, value, attention_mask, **given)
        return output.transpose(1, 2).reshape(query.shape[0], 1, -1, output.shape[-1]), None
    rows, tokens = query.shape[0], query.shape[2]
    whole = query.new_empty((rows, tokens, key.shape[1], groups, value.shape[-1]))
    for member in range(groups):
        part = hf.sdpa_attention_forward(_UNGROUPED, grouped[:, :, member], key, value, attention_mask, **given)
        whole[..., member, :] = part[0]
    return whole.flatten(2, 3), None


def build_mask(
    *, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **given: Any
) -> torch.Tensor | None:
    """A mask as `sdpa_mask` builds it, left out only where there is no padding: that, the host knows."""
    may_skip = allow_is_causal_skip and attention_mask is None
    return hf.sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=may_skip, **given)


@contextlib.contextmanager
def attention_on(device: torch.device) -> Iterator[None]:
    """Within it, models that attend by SDPA attend so on a GPU; on a CPU nothing is changed."""
    if device.type == "cpu":
        yield
        return
    before = hf.ALL_ATTENTION_FUNCTIONS["sdpa"], hf.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    hf.ALL_ATTENTION_FUNCTIONS["sdpa"], hf.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = attend, build_mask
    try:
        yield
    finally:
        hf.ALL_ATTENTION_FUNCTIONS["sdpa"], hf.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = before
