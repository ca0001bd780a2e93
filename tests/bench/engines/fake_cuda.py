"""Stands in for torch in SGLang's schedulers: events of the clock of all processes, and an allocator's peak."""

from __future__ import annotations

import time

PEAK_BYTES = 2**30


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at_s = 0.0

    def record(self) -> None:
        self.at_s = time.monotonic()

    def synchronize(self) -> None:
        assert self.at_s

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at_s - self.at_s)


class cuda:  # noqa: N801
    Event = Event
    peak_bytes = 0

    @staticmethod
    def synchronize() -> None: ...

    @classmethod
    def reset_peak_memory_stats(cls) -> None:
        cls.peak_bytes = PEAK_BYTES

    @classmethod
    def max_memory_allocated(cls) -> int:
        return cls.peak_bytes
