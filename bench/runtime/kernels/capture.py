"""Capturing work on a GPU as a CUDA graph: the dangers, and what the memory comes to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipetune.bench.runtime.device import DeviceContext


class Pool:
    """Memory for graphs that run one after the other on one stream.

    What one graph computes on the way lies where another's does too, and so does its output unless somebody holds it
    while the next one is captured; but even a held output may lie where an earlier graph computes. So an output must be
    read, or copied, before another graph of the pool runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handle: Any = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Runs some work twice beside the compute stream, then captures it there.

        The first run may compile, load kernels and make workspaces. What asks the host in the second would break the
        capture, and with it more than itself, so that it is refused before. Capture happens on the stream of these
        runs, since cuBLAS keeps a workspace for each stream: made here, outside of the pool, it outlives every graph.
        Only this thread's calls can break it: NCCL's watchdog queries events from another.

        Returns:
            The graph and what it writes.

        Raises:
            RuntimeError: the work waits for the device, or memory ran out.
        """
        side, current = _side_stream(self._device), torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                work()
                with _no_waiting_for_the_device():
                    work()
                # Waits for the whole device, which is why no message may be under way.
                with torch.cuda.graph(graph, pool=self._handle, stream=side, capture_error_mode="thread_local"):
                    output = work()
        except Exception:
            self._end_allocation()
            raise
        finally:
            current.wait_stream(side)
        return graph, output

    def bytes(self) -> tuple[int, int]:
        """Reserved by the pool, and counted as allocated: what is freed when a capture ends is used by each run."""
        snapshot: Any = torch.cuda.memory_snapshot
        segments = [row for row in snapshot() if tuple(row.get("segment_pool_id", ())) == tuple(self._handle)]
        return sum(row["total_size"] for row in segments), sum(row["allocated_size"] for row in segments)

    def _end_allocation(self) -> None:
        """Tells the allocator that a capture is over which ended in an error before it could say so itself.

        Else it would refuse ever after to give memory back. Where the capture did end in order, the first call is an
        error to ignore, and the second, which lets go of the pool once more, is not reached.
        """
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._handle)
            torch._C._cuda_releasePool(self._device.index, self._handle)


class OutsideBytes:
    """Bytes of a device that are in use and not this process's allocator's."""

    def __init__(self, device: DeviceContext) -> None:
        self._device = device
        self._before = self._now()

    def grown(self) -> int:
        """How much more there are now than at first; other processes on the device blur it."""
        return max(0, self._now() - self._before)

    def _now(self) -> int:
        if not self._device.is_cuda:
            return 0
        self._device.synchronize()
        self._device.free_cached()
        free, total = torch.cuda.mem_get_info(self._device.torch_device)
        return int(total - free - torch.cuda.memory_reserved(self._device.torch_device))


@contextlib.contextmanager
def _no_waiting_for_the_device() -> Iterator[None]:
    """Turns what makes the host wait for the GPU into an error that says where it happened."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the life of the process: cuBLAS never gives back the workspace that it makes for a stream."""
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _side_streams[device]
