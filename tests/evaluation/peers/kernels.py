"""What packed weights are worth here, layer shape by layer shape: `python -m tests.evaluation.peers kernels`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipetune.bench.errors import ConfigError
from pipetune.bench.models.torch_private import can_pack
from pipetune.bench.runtime.packed_linear import PackedLinear

SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576))
"""`out_features, in_features` of SmolLM2-135M: attention, MLP up, MLP down, head."""
ROWS = (1, 8, 16, 32, 64, 256)
CACHE_BYTES = 64 * 2**20
"""Weights used in turn, so that none is still in a cache when its turn comes again, as in a model."""


def print_speeds(dtype_name: str, repeats: int) -> int:
    """Prints, for one thread, microseconds and GFLOP/s of both kinds of layer and their ratio; 0 when it could.

    Raises:
        ConfigError: there are no packed kernels for the dtype here.
    """
    dtype: torch.dtype = getattr(torch, dtype_name)
    torch.set_num_threads(1)
    if not can_pack(dtype):
        raise ConfigError(f"this torch or this processor has no packed kernels for {dtype_name}")
    say = sys.stdout.write
    say(f"{'layer':>12} {'rows':>5} {'plain µs':>9} {'GF/s':>5} {'packed µs':>9} {'GF/s':>5} {'ratio':>12}\n")
    for out_features, in_features in SHAPES:
        for rows in ROWS:
            plain, packed = _compare(out_features, in_features, rows, dtype, repeats)
            flop = 2 * rows * out_features * in_features
            ratios = sorted(a / b for a, b in zip(plain, packed, strict=True))
            a, b = statistics.median(plain), statistics.median(packed)
            say(
                f"{f'{out_features}x{in_features}':>12} {rows:>5} {a * 1e6:>9.0f} {flop / a / 1e9:>5.0f} "
                f"{b * 1e6:>9.0f} {flop / b / 1e9:>5.0f} {a / b:>5.2f} {f'{ratios[0]:.2f}-{ratios[-1]:.2f}':>9}\n"
            )
    return 0


def _compare(
    out_features: int, in_features: int, rows: int, dtype: torch.dtype, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of one call, each side once per repeat, in turns."""
    count = max(1, CACHE_BYTES // (out_features * in_features * dtype.itemsize))
    with torch.inference_mode():
        plain = [nn.Linear(in_features, out_features, bias=False, dtype=dtype) for _ in range(count)]
        packed = [PackedLinear(layer.weight, None) for layer in plain]
        given = torch.randn(rows, in_features, dtype=dtype)
        sides: tuple[Sequence[Callable[[torch.Tensor], torch.Tensor]], ...] = (plain, packed)
        times: tuple[list[float], list[float]] = ([], [])
        for repeat in range(repeats + 1):
            for layers, seconds in zip(sides, times, strict=True):
                began = time.perf_counter()
                for layer in layers:
                    layer(given)
                if repeat:
                    seconds.append((time.perf_counter() - began) / count)
    return times
