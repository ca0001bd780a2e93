"""The memory of a CPU worker: what lives as long as a plan is kept apart from what comes and goes in every task.

glibc learns from frees: once a weight was freed, weights of that size no longer get mappings of their own but lie in
the heap, between activations, and the holes that plans leave behind stay in memory. So the size from which on an
allocation is a mapping is set by hand: small while weights are loaded, as large as it goes while tasks run.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.nn import functional

from pipetune.bench.models.torch_private import can_pack
from pipetune.bench.runtime.packed_linear import PackedLinear

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`."""
_DONTNEED = 4
"""Advice to `madvise`: the pages are not needed any more."""
_PAGE = mmap.PAGESIZE
_COPIED_BYTES = 1 << 22
"""Bytes of a mapped tensor that are copied at a time: no more of it is there twice."""
_LASTING_BYTES = 1 << 16
"""Size from which on an allocation is a mapping of its own while weights are loaded."""
_PASSING_BYTES = 1 << 25
"""That size while tasks run: the most that glibc allows."""
_KEPT_BYTES = 1 << 28
"""Free memory at the heap's end that is kept: what a task gave up, the next one takes."""


def set_up() -> None:
    """Prepares a worker's allocator for tasks."""
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


def own(tensors: Iterable[torch.Tensor], folder: Path) -> None:
    """Copies tensors out of the mapped files of a checkpoint, and forgets the files' pages as soon as they are copied.

    A mapping counts as the process's memory as far as it was read, as long as any tensor of it lives, and once more
    for every later load.
    """
    ranges = _mapped({str(path.resolve()) for path in folder.iterdir()})
    for tensor in tensors:
        address = tensor.data_ptr()
        if (mapped_end := next((end for begin, end in ranges if begin <= address < end), None)) is None:
            continue
        copy = torch.empty_like(tensor.data, memory_format=torch.contiguous_format)
        source, target = (one if one.dim() else one.unsqueeze(0) for one in (tensor.data, copy))
        rows = max(1, _COPIED_BYTES * len(source) // max(source.nbytes, 1))
        for part, place in zip(torch.split(source, rows), torch.split(target, rows), strict=True):
            place.copy_(part)
            if part.is_contiguous():
                _forget(part.data_ptr(), min(part.data_ptr() + part.nbytes, mapped_end))
        tensor.data = copy


def _forget(begin: int, end: int) -> None:
    """Lets whole pages of a mapped file go; who reads them again gets them from the file."""
    begin, end = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
    if end > begin:
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)


def _mapped(paths: set[str]) -> list[tuple[int, int]]:
    """Addresses at which these files are mapped."""
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0] in paths:
            begin, end = span.split("-")
            ranges.append((int(begin, 16), int(end, 16)))
    return ranges


@torch.inference_mode()
def touch_libraries(dtype: torch.dtype) -> None:
    """Calls the kernels that every model calls, on a few numbers. Their code comes into memory at the first call;
    afterwards it is part of what the process takes without a model."""
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
