"""The device of one worker: where tensors live, how many threads compute, how spans are timed."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from pipetune.bench.runtime import allocator
from pipetune.bench.spec import device_index, device_kind

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ANCHOR_TRIES = 5
Stamp = Any
"""A moment on the device's own timeline, known only once the device got there; what it is, only its clock knows."""


class Clock(Protocol):
    """Takes stamps without stalling the device, and resolves them to monotonic seconds afterwards."""

    def stamp(self) -> Stamp:
        """Marks this moment in the order of the work issued so far."""

    def resolve(self, stamps: list[Stamp]) -> list[float]:
        """Seconds of `DeviceContext.now` for each stamp; waits for the device."""


class HostClock:
    """CPU: work is done when the call returns, so the host's monotonic clock tells the time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now

    def stamp(self) -> float:
        """This moment."""
        return self._now()

    def resolve(self, stamps: list[Stamp]) -> list[float]:
        """Nothing to wait for."""
        return stamps


class CudaClock:
    """GPU: events on the compute stream, tied to the host's clock by one anchor taken while the device was idle."""

    def __init__(self, device: torch.device, now: Callable[[], float]) -> None:
        self._device, self._now = device, now
        self._anchor_event, self._anchor_s = self._anchor()

    def _anchor(self) -> tuple[torch.cuda.Event, float]:
        torch.cuda.synchronize(self._device)
        tries = []
        for _ in range(ANCHOR_TRIES):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            before = self._now()
            event.record(torch.cuda.current_stream(self._device))
            event.synchronize()
            after = self._now()
            tries.append((after - before, (before + after) / 2, event))
        # The quickest round trip leaves the least doubt about when, between its ends, the event was.
        _, middle_s, event = min(tries, key=lambda one: one[0])
        return event, middle_s

    def stamp(self) -> torch.cuda.Event:
        """Records an event on the current stream; where a graph is captured, each of its replays records it anew."""
        event = torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def resolve(self, stamps: list[Stamp]) -> list[float]:
        """Waits for the device; the anchor is taken anew, since event times lose precision over long spans."""
        torch.cuda.synchronize(self._device)
        times = [self._anchor_s + self._anchor_event.elapsed_time(event) / 1e3 for event in stamps]
        self._anchor_event, self._anchor_s = self._anchor()
        return times


class DeviceContext:
    """What a worker knows of its own device."""

    def __init__(self, name: str, *, num_threads: int) -> None:
        """Claims the device, `cpu:N` or `cuda:N`; `num_threads` is this worker's share of the cores."""
        self.name = name
        self.clock_ahead_s, self.clock_error_s = 0.0, 0.0
        """How far this host's monotonic clock is ahead of that of rank 0's host, and how far off that may be."""
        self.is_cuda = device_kind(name) == "cuda"
        torch.set_num_threads(max(1, num_threads))
        if self.is_cuda:
            self.torch_device = torch.device("cuda", device_index(name))
            torch.cuda.set_device(self.torch_device)
        else:
            self.torch_device = torch.device("cpu")
            allocator.set_up()

    def clock(self) -> Clock:
        """A clock that times work on this device."""
        return CudaClock(self.torch_device, self.now) if self.is_cuda else HostClock(self.now)

    def now(self) -> float:
        """Seconds of the monotonic clock of rank 0's host."""
        return time.monotonic() - self.clock_ahead_s

    def synchronize(self) -> None:
        """Waits until everything issued so far is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def cap_memory(self, limit_bytes: int | None) -> None:
        """CUDA: makes this process's allocator refuse what lies above a limit; None lifts it."""
        if self.is_cuda:
            total = torch.cuda.get_device_properties(self.torch_device).total_memory
            share = 1.0 if limit_bytes is None else min(1.0, limit_bytes / total)
            torch.cuda.set_per_process_memory_fraction(share, self.torch_device)

    def available_bytes(self, nominal_bytes: int | None, workers: int) -> int:
        """Memory that tensors of this worker may take: its share of the host's, which is None for a GPU, whose workers
        share evenly what contexts and others leave of it."""
        if nominal_bytes is not None:
            return nominal_bytes
        torch.zeros(1, device=self.torch_device)
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return int(free + torch.cuda.memory_reserved(self.torch_device)) // workers

    def lasting(self) -> contextlib.AbstractContextManager[None]:
        """Within it weights are loaded: what is allocated lives long."""
        return contextlib.nullcontext() if self.is_cuda else allocator.lasting()

    def touch_libraries(self, dtype: torch.dtype) -> None:
        """CPU: brings into memory what every model needs of the libraries, so that no plan is charged with it."""
        if not self.is_cuda:
            allocator.touch_libraries(dtype)

    def free_cached(self) -> None:
        """Gives unused memory back, so that the next plan's peak is its own."""
        if self.is_cuda:
            torch.cuda.empty_cache()
        else:
            allocator.trim()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Collects garbage beforehand, so that no collection falls into the pass."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
