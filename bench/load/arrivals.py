"""When requests arrive: a unit-rate trace drawn from a seed, divided by the rate, so that all rates share its gaps.

The processes and their names are those of `vllm bench serve`: gaps are gamma-distributed with a shape of `burstiness`
(1 is a Poisson process, infinity a constant rate), and scaled so that the last of n requests arrives at n / rate.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from pipetune.bench.spec import Arrivals


def arrival_times_s(arrivals: Arrivals, num_requests: int) -> tuple[float, ...]:
    """When each request arrives, seconds from the start."""
    if arrivals.times_s is not None:
        return arrivals.times_s
    if arrivals.ramp_up_strategy is not None:
        return _ramp_s(arrivals, num_requests)
    assert arrivals.request_rate is not None, "a trace that was not read"
    trace = unit_trace(num_requests, arrivals.burstiness, arrivals.seed)
    return tuple(at / arrivals.request_rate for at in trace)


def _ramp_s(arrivals: Arrivals, num_requests: int) -> tuple[float, ...]:
    start, end = arrivals.ramp_up_start_rps, arrivals.ramp_up_end_rps
    assert start is not None
    assert end is not None
    shares = [index / num_requests for index in range(num_requests)]
    if arrivals.ramp_up_strategy == "linear":
        rates = [start + (end - start) * share for share in shares]
    else:
        rates = [start * (end / start) ** share for share in shares]
    gaps = _unit_gaps(num_requests, arrivals.burstiness, arrivals.seed)
    return tuple(itertools.accumulate(gap / rate for gap, rate in zip(gaps, rates, strict=True)))


def unit_trace(num_requests: int, burstiness: float, seed: int) -> tuple[float, ...]:
    """Times at one request a second: the last of n arrives at n, whatever was drawn."""
    times = list(itertools.accumulate(_unit_gaps(num_requests, burstiness, seed)))
    return tuple(at * num_requests / times[-1] for at in times)


def _unit_gaps(num_requests: int, burstiness: float, seed: int) -> Sequence[float]:
    # RandomState's streams are frozen; those of numpy's generators may change.
    gaps = np.random.RandomState(seed).gamma(burstiness, 1.0 / burstiness, num_requests)
    # Of a very small shape all may round to nothing.
    return [float(gap) for gap in np.maximum(gaps, math.ulp(1.0))]
