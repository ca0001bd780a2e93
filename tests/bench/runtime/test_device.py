"""One worker's device: its clock, and passes that no collection of garbage falls into."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from pipetune.bench.runtime.device import DeviceContext, HostClock, undisturbed


def test_the_clock_of_a_cpu_is_the_hosts() -> None:
    device = DeviceContext("cpu:0", num_threads=1)
    clock = device.clock()
    assert isinstance(clock, HostClock)
    before = time.monotonic()
    (stamp,) = clock.resolve([clock.stamp()])
    assert before <= stamp <= time.monotonic()
    assert (device.is_cuda, device.available_bytes(77, 2)) == (False, 77)


def test_no_garbage_is_collected_during_a_pass() -> None:
    assert gc.isenabled()
    with undisturbed():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.gpu
def test_the_clock_of_a_gpu_is_tied_to_the_hosts() -> None:
    device = DeviceContext("cuda:0", num_threads=1)
    clock = device.clock()
    before = time.monotonic()
    stamps = [clock.stamp()]
    torch.zeros(1 << 20, device="cuda:0").sum()
    stamps.append(clock.stamp())
    first, second = clock.resolve(stamps)
    assert before - 1e-3 <= first <= second <= time.monotonic() + 1e-3
