"""Attention of stages on GPUs is transformers' own, without heads that are copied or masks that are looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipetune.bench.runtime.stage.attention import attend, attention_on, build_mask
from pipetune.bench.runtime.stage.joined import JoinedCache


class Seen(TorchDispatchMode):
    """Sizes of all that is made, and whether the host asked for a number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest, self.asked = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.asked = self.asked or "item" in func.__name__ or "is_nonzero" in func.__name__
        if isinstance(result, torch.Tensor) and result._base is None:
            self.largest = max(self.largest, result.numel())
        return result


@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 6),
    past=st.integers(0, 9),
    padded=st.booleans(),
)
def test_it_is_transformers_own(rows: int, kv_heads: int, groups: int, tokens: int, past: int, padded: bool) -> None:
    torch.manual_seed(0)
    length = past + tokens
    query = torch.randn(rows, kv_heads * groups, tokens, 8)
    key, value = torch.randn(2, rows, kv_heads, length, 8).unbind()
    mask = None
    if padded or (past > 0 and tokens > 1):
        seen = torch.arange(length) >= torch.arange(rows).view(-1, 1, 1, 1) % length
        causal = torch.arange(length) <= torch.arange(past, length).view(1, 1, -1, 1)
        mask = (seen & causal) | (torch.arange(length) == torch.arange(past, length).view(1, 1, -1, 1))
    module: Any = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    actual, _ = attend(module, query, key, value, mask, scaling=0.3)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, atol=1e-5)
    # What stands in the registry for joined passes leaves all others as they were, to the bit.
    registered = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert registered.__module__ == JoinedCache.__module__
    assert torch.equal(registered(module, query, key, value, mask, scaling=0.3)[0], expected)


@pytest.mark.parametrize("tokens", [1, 4])
def test_keys_and_values_are_read_where_they_lie(tokens: int) -> None:
    query = torch.randn(2, 8, tokens, 4)
    key, value = torch.randn(2, 2, 2, 512, 4).unbind()
    mask = torch.ones(2, 1, tokens, 512, dtype=torch.bool)
    module: Any = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    with Seen() as seen:
        attend(module, query, key, value, mask)
    # As floats, a mask is no longer than that; copied to all heads, keys would be four times as large as they are.
    assert seen.largest <= max(key.numel(), mask.numel())


@pytest.mark.parametrize(("tokens", "length"), [(1, 6), (6, 6), (3, 6)])
def test_no_mask_is_looked_at(tokens: int, length: int) -> None:
    sizes: dict[str, Any] = {"batch_size": 2, "q_length": tokens, "kv_length": length, "q_offset": length - tokens}
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[1, 0] = False
    with Seen() as seen:
        mask = build_mask(**sizes, mask_function=causal_mask_function, attention_mask=padding)
        without = build_mask(**sizes, mask_function=causal_mask_function)
    assert not seen.asked
    expected = sdpa_mask(**sizes, mask_function=causal_mask_function, attention_mask=padding)
    assert mask is not None
    assert expected is not None
    assert torch.equal(mask, expected)
    assert (without is None) == (tokens in (1, length))


def test_on_a_cpu_nothing_is_changed() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    for device, own in ((torch.device("cpu"), False), (torch.device("cuda", 0), True)):
        with attention_on(device):
            assert (ALL_ATTENTION_FUNCTIONS["sdpa"] is attend) == own
            assert (ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is build_mask) == own
        assert (ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]) == before
