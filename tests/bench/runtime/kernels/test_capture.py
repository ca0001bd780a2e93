"""Memory outside of the allocator; capturing itself is tested with the steps that are captured."""

from __future__ import annotations

from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.kernels.capture import OutsideBytes


def test_on_a_cpu_nothing_grows() -> None:
    assert OutsideBytes(DeviceContext("cpu:0", num_threads=1)).grown() == 0
