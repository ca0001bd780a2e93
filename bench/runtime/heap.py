"""The heap of a CPU worker: what lives as long as a plan is kept apart from what comes and goes in every task.

glibc learns from frees: once a weight was freed, weights of that size no longer get mappings of their own but lie in
the heap, between activations, and the holes that plans leave behind stay in memory. So the size from which on an
allocation is a mapping is set by hand: small while weights are loaded, as large as it goes while tasks run.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from torch.nn import functional

from bench.runtime.packing import PackedLinear, can_pack

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`."""
_LASTING_BYTES = 1 << 16
"""While weights are loaded, a mapping of its own for everything from this size on."""
_PASSING_BYTES = 1 << 25
"""While tasks run: the most that glibc allows."""
_KEPT_BYTES = 1 << 28
"""Free memory at the heap's end that is kept: what a task gave up, the next one takes."""


def set_up() -> None:
    """Prepares the heap of a worker for tasks."""
    _mallopt(_MMAP_THRESHOLD, _PASSING_BYTES)
    _mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """What is allocated within lives long."""
    _mallopt(_MMAP_THRESHOLD, _LASTING_BYTES)
    try:
        yield
    finally:
        _mallopt(_MMAP_THRESHOLD, _PASSING_BYTES)


def trim() -> None:
    """Gives free pages back: without it a plan would inherit the peak of the one before."""
    with contextlib.suppress(OSError, AttributeError):
        _libc().malloc_trim(0)


@torch.inference_mode()
def touch_libraries(dtype: torch.dtype) -> None:
    """Calls the kernels that every model calls, on a few numbers.

    Their code comes into memory at the first call; afterwards it is part of what the process takes without a model.
    """
    for rows in (1, 8, 64):
        states = torch.zeros((rows, 64), dtype=dtype)
        functional.silu(states @ torch.zeros((64, 64), dtype=dtype)).float().softmax(-1)
        if can_pack(dtype):
            PackedLinear(torch.zeros((128, 64), dtype=dtype), None)(states)
    heads = torch.zeros((2, 4, 8, 16), dtype=dtype)
    functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=torch.zeros((8, 8), dtype=dtype))
    functional.embedding(torch.zeros(3, dtype=torch.long), torch.zeros((4, 8), dtype=dtype))
    torch.arange(8.0).cos().pow(2).mean().rsqrt()


def _mallopt(parameter: int, value: int) -> None:
    # Other C libraries have no such thing, and no such heap.
    with contextlib.suppress(OSError, AttributeError):
        _libc().mallopt(parameter, value)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL("libc.so.6")
