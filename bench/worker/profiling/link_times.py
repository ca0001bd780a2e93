"""How long messages take between two workers: round trips over the runtime's own transport, the others idle."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pipetune.bench.profile import LinkProfile
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.loop import Edges
from pipetune.bench.worker.stage_host import StageHost

ROUND_TRIPS = {4 * 2**10: 40, 256 * 2**10: 24, 4 * 2**20: 8}
"""Round trips that are timed, by the message's size in bytes."""
_WARM_UP = 3


def time_links(host: StageHost) -> tuple[LinkProfile, ...]:
    """Times every pair of workers, one pair at a time; every rank calls it, and gets all of them.

    A message is taken for half of a round trip, so both directions of a pair are told alike. Workers that share a GPU
    have one name and no link to themselves, unless there is no other pair.
    """
    found: dict[tuple[str, str], LinkProfile] = {}
    for one, other in itertools.combinations(range(len(host.devices)), 2):
        pair = host.devices[one], host.devices[other]
        if pair in found:
            continue
        seconds = _round_trips(host, (one, other))
        latency_s, bytes_per_s = fit(host.control.gather(seconds)[one])
        for source, target in dict.fromkeys((pair, pair[::-1])):
            found[source, target] = LinkProfile(
                source=source, target=target, latency_s=latency_s, bytes_per_s=bytes_per_s
            )
    return tuple(found.values())


def fit(seconds: Mapping[int, float] | Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency and bandwidth of `latency + bytes / bandwidth` through the times of messages of some sizes.

    Least squares of the relative errors, so that small messages count as much as large ones; neither is below 0.

    Args:
        seconds: by size in bytes.

    Returns:
        Seconds, and bytes a second.
    """
    pairs = [(float(size), time_s) for size, time_s in dict(seconds).items()]
    sizes, times = np.array(pairs).T
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    (latency_s, per_byte_s), *_ = np.linalg.lstsq(design, np.ones_like(times), rcond=None)
    if latency_s < 0:
        latency_s, per_byte_s = 0.0, float(np.sum(sizes / times) / np.sum((sizes / times) ** 2))
    # Where larger messages took no longer, all that can be said is that the bandwidth is at least this.
    floor_s = 1e-3 * float(np.min(times / sizes))
    return round(float(latency_s), 9), round(1 / max(float(per_byte_s), floor_s), 3)


def _round_trips(host: StageHost, ranks: tuple[int, int]) -> list[tuple[int, float]]:
    """Size in bytes and seconds of one way, on the first of two ranks; empty on all others."""
    dtype = host.stage.message_dtype
    largest = max(ROUND_TRIPS) // dtype.itemsize
    # Every rank takes part in opening both, as NCCL wants it.
    there, back = (
        host.links.edges(pair, hidden_numel=largest, hidden_dtype=dtype, tokens_numel=1, tokens_depth=1)
        for pair in (ranks, ranks[::-1])
    )
    host.control.barrier()
    measured = []
    if there is not None and back is not None:
        # So that the driver sees it if a message never comes.
        host.status.activity = "receive"
        for size, count in ROUND_TRIPS.items():
            times = []
            for _ in range(_WARM_UP + count):
                numel = size // dtype.itemsize
                if host.rank == ranks[0]:
                    times.append(_call(there, back, numel, host.device, dtype))
                else:
                    _answer(there, back, numel)
                host.status.tasks_done += 1
            if times:
                measured.append((size, statistics.median(times[_WARM_UP:]) / 2))
        host.device.synchronize()
        host.status.activity = "idle"
    host.control.barrier()
    return measured


def _call(there: Edges, back: Edges, numel: int, device: DeviceContext, dtype: torch.dtype) -> float:
    assert there.hidden_out is not None
    assert back.hidden_in is not None
    message = torch.zeros((1, 1, numel), dtype=dtype, device=device.torch_device)
    # Not once the receive is posted: that ends only when its message comes, which is the answer to what is sent here.
    device.synchronize()
    back.hidden_in.post((1, 1, numel))
    began = time.perf_counter()
    there.hidden_out.send(message)
    back.hidden_in.take()
    back.hidden_in.consumed()
    device.synchronize()
    took_s = time.perf_counter() - began
    there.hidden_out.drain()
    return took_s


def _answer(there: Edges, back: Edges, numel: int) -> None:
    assert there.hidden_in is not None
    assert back.hidden_out is not None
    there.hidden_in.post((1, 1, numel))
    back.hidden_out.send(there.hidden_in.take())
    there.hidden_in.consumed()
    back.hidden_out.drain()
