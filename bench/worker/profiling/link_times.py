"""How long messages take between two workers: round trips over the runtime's own transport, the others idle."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from pipetune.bench.profile import LinkProfile
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.loop import Edges
from pipetune.bench.spec import device_host
from pipetune.bench.worker.stage_host import StageHost

ROUND_TRIPS = {4 * 2**10: 40, 256 * 2**10: 24, 4 * 2**20: 8}
"""Round trips that are timed, by the message's size in bytes."""
PAIR_S = 9.0
"""Seconds for all round trips of a pair, which with all else takes 10: on a slow link they are fewer and smaller."""
_WARM_UP = 3


def time_links(host: StageHost) -> tuple[LinkProfile, ...]:
    """Times every pair of workers, one pair at a time; every rank calls it, and gets all of them.

    A message is taken for half of a round trip, so both directions of a pair are told alike. Workers that share a GPU
    have one name and no link to themselves, unless there is no other pair. Of two hosts one pair is timed for all.
    """
    found: dict[tuple[str, str], LinkProfile] = {}
    timed: dict[frozenset[str], tuple[float, float]] = {}
    for one, other in itertools.combinations(range(len(host.devices)), 2):
        pair = host.devices[one], host.devices[other]
        if pair in found:
            continue
        hosts = frozenset(map(device_host, pair))
        ends = hosts if len(hosts) > 1 else frozenset(pair)
        if ends not in timed:
            timed[ends] = fit(_round_trips(host, (one, other)))
        latency_s, bytes_per_s = timed[ends]
        for key in (pair, pair[::-1]):
            found[key] = LinkProfile(source=key[0], target=key[1], latency_s=latency_s, bytes_per_s=bytes_per_s)
    return tuple(found.values())


def time_sizes(round_trips: Callable[[int, int], Sequence[float]], budget_s: float = PAIR_S) -> dict[int, float]:
    """Seconds of one way by size in bytes, from as many of `ROUND_TRIPS` as there is time for.

    Time is spent on the next trip only if it fits, were it to grow as fast as its size. `round_trips` makes so many of
    a size, and gives the seconds of each.
    """
    found: dict[int, float] = {}
    last, trip_s = min(ROUND_TRIPS), 0.0
    for wanted, count in ROUND_TRIPS.items():
        size = min(wanted, int(last * budget_s / trip_s)) if trip_s else wanted
        if found and size <= last:
            break
        longest_s = trip_s * size / last
        times = list(round_trips(size, max(1, min(_WARM_UP, int(budget_s / 2 / longest_s))) if trip_s else _WARM_UP))
        budget_s, last, trip_s = budget_s - sum(times), size, min(times)
        # Half of what is left is for larger messages.
        if (more := min(count, int(budget_s / 2 / trip_s))) > 0:
            times = list(round_trips(size, more))
            budget_s, trip_s = budget_s - sum(times), statistics.median(times)
        found[size] = statistics.median(times) / 2
    return found


def fit(seconds: Mapping[int, float] | Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency, s, and bandwidth, bytes/s, of `latency + bytes / bandwidth` through times of messages by size in bytes.
    Least squares of the relative errors, so that small messages count as much as large ones; neither is below 0."""
    sizes, times = np.array([(float(size), time_s) for size, time_s in dict(seconds).items()]).T
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    (latency_s, per_byte_s), *_ = np.linalg.lstsq(design, np.ones_like(times), rcond=None)
    if latency_s < 0:
        latency_s, per_byte_s = 0.0, float(np.sum(sizes / times) / np.sum((sizes / times) ** 2))
    # Where larger messages took no longer, all that can be said is that the bandwidth is at least this.
    floor_s = 1e-3 * float(np.min(times / sizes))
    return round(float(latency_s), 9), round(1 / max(float(per_byte_s), floor_s), 3)


def _round_trips(host: StageHost, ranks: tuple[int, int]) -> dict[int, float]:
    """Seconds of one way by size in bytes, on every rank."""
    dtype = host.stage.message_dtype
    largest = max(ROUND_TRIPS) // dtype.itemsize
    # Every rank takes part in opening both, as NCCL wants it.
    there, back = (
        host.links.edges(pair, hidden_numel=largest, hidden_dtype=dtype, tokens_numel=1, tokens_depth=1)
        for pair in (ranks, ranks[::-1])
    )

    def round_trips(size: int, count: int) -> Sequence[float]:
        host.control.barrier()
        times = []
        if there is not None and back is not None:
            # So that the driver sees it if a message never comes.
            host.status.activity = "receive"
            for _ in range(count):
                numel = max(1, size // dtype.itemsize)
                if host.rank == ranks[0]:
                    times.append(_call(there, back, numel, host.device, dtype))
                else:
                    _answer(there, back, numel)
                host.status.tasks_done += 1
            host.device.synchronize()
            host.status.activity = "idle"
        return list(host.control.gather(times)[ranks[0]])

    return time_sizes(round_trips)


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
