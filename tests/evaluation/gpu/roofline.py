"""How near a decode step comes to the memory bandwidth, which bounds it: pure arithmetic.

A decode step of a small batch reads every weight and all keys and values once, and computes little with them (Williams
et al. 2009). The bandwidth is a measured one: bytes read and written by a large copy within the device.
"""

from __future__ import annotations

import statistics

from pipetune.bench.memory import ModelShape
from pipetune.bench.record import Iteration, Measurement


def step_bytes(shape: ModelShape, *, batch: int, prompt_len: int, output_len: int) -> int:
    """Bytes that a decode step must read, on average over the steps of one generation.

    Of the embedding only a row a sequence is read, unless it is the head as well. KV counts at the length that is
    filled: what a kernel reads beyond it is its own waste.
    """
    weights = sum(layer.weight_bytes for layer in shape.layers) + shape.other_bytes
    weights += shape.embedding_bytes if shape.tied else shape.head_bytes
    # Step t = 1 … output_len - 1 works behind prompt_len + t - 1 positions, and adds one.
    mean_len = prompt_len + output_len / 2
    kv = batch * mean_len * sum(layer.kv_bytes_per_token for layer in shape.layers)
    return round(weights + kv)


def decode_step_s(measurement: Measurement) -> float:
    """Seconds of one decode step, for a single batch: the median over the iterations of each one's mean step."""
    assert len(measurement.micro_batch_sizes) == 1, "one batch alone shows what a step takes"
    return statistics.median(_mean_step_s(measurement, iteration) for iteration in measurement.iterations)


def _mean_step_s(measurement: Measurement, iteration: Iteration) -> float:
    steps = zip(measurement.tasks, iteration.token_times_s, strict=True)
    times: dict[int, float] = {}
    for task, time_s in steps:
        times[task.step] = max(time_s, times.get(task.step, 0.0))
    last = max(times)
    assert last > 0, "a single token has no decode step"
    return (times[last] - times[0]) / last


def bandwidth_share(step_bytes: int, step_s: float, copy_bytes_per_s: float) -> float:
    """Of the bandwidth that a copy reaches, the share that a step's necessary reads reach."""
    return step_bytes / step_s / copy_bytes_per_s
