"""Sensors must see what disturbs a run, and must not take the fleet itself for a disturbance."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipetune.bench.machine.sensors import CpuSensors, NvmlSensors, family, foreign_gpu_processes
from pipetune.bench.machine.telemetry import judge, sensors_for
from pipetune.bench.record import DeviceState


@pytest.fixture
def busy_process() -> Iterator[psutil.Process]:
    """A process that burns a core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def let_it_burn(process: psutil.Process, cpu_s: float) -> None:
    goal = process.cpu_times().user + cpu_s
    deadline = time.monotonic() + 60
    while process.cpu_times().user < goal:
        assert time.monotonic() < deadline, "the busy process gets no CPU"
        time.sleep(0.02)


def test_a_process_of_others_is_seen(busy_process: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    sensors = CpuSensors(["cpu:0"])
    own = [os.getpid()]
    monkeypatch.setattr("pipetune.bench.machine.sensors.family", lambda: frozenset(own))
    sensors.start()
    let_it_burn(busy_process, 0.3)
    reading = sensors.stop()
    assert reading.foreign_cores > 0
    own.append(busy_process.pid)
    (state,) = sensors.state()
    assert not [name for name in state.foreign_processes if f"pid {busy_process.pid}," in name]


def test_children_and_siblings_are_our_own(busy_process: psutil.Process) -> None:
    assert {os.getpid(), os.getppid(), busy_process.pid} <= family()
    sensors = CpuSensors(["cpu:0"])
    sensors.start()
    let_it_burn(busy_process, 0.1)
    assert not [name for name in sensors.stop().foreign_names if f"(pid {busy_process.pid})" in name]


def test_cpu_state_tells_load_and_memory_per_device() -> None:
    states = sensors_for(["cpu:0", "cpu:1"]).state()
    assert [state.device for state in states] == ["cpu:0", "cpu:1"]
    for state in states:
        assert state.load_average is not None
        assert state.memory_used_bytes is not None
        assert state.utilization is not None
        assert 0 <= state.utilization <= 1


def test_a_gpu_that_is_not_there_has_empty_readings() -> None:
    sensors = NvmlSensors(["cuda:99"])
    before = sensors.state()
    assert before == (DeviceState(device="cuda:99"),)
    sensors.start()
    reading = sensors.stop()
    assert reading.energy_j is None
    assert reading.gpu_utilization is None
    assert judge(before, sensors.state(), reading).disturbances == ()


@pytest.mark.gpu
def test_gpu_sensors_read_something() -> None:
    sensors = sensors_for(["cuda:0"])
    (before,) = sensors.state()
    assert before.memory_used_bytes is not None
    assert before.temperature_c is not None
    sensors.start()
    time.sleep(0.5)
    reading = sensors.stop()
    assert reading.gpu_utilization is not None
    assert reading.energy_j is not None
    assert reading.energy_j > 0


def fake_proc(folder: Path, **names: str) -> Path:
    for pid, name in names.items():
        (folder / pid.lstrip("p")).mkdir()
        (folder / pid.lstrip("p") / "comm").write_text(f"{name}\n")
    return folder


def test_gpu_processes_of_others_are_named(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, p10="python", p20="train")
    assert foreign_gpu_processes([10, 20], [10, 11], proc) == ("train (pid 20)",)
    assert foreign_gpu_processes([10], [10, 11], proc) == ()
    assert foreign_gpu_processes([], [10], proc) == ()


def test_one_pid_of_another_namespace_is_taken_for_our_own(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, p10="python")
    assert foreign_gpu_processes([70010], [10], proc) == ()
    assert foreign_gpu_processes([70010, 70020], [10], proc) == ("a process out of sight (pid 70020)",)
    assert foreign_gpu_processes([10, 70020], [10], proc) == ("a process out of sight (pid 70020)",)
