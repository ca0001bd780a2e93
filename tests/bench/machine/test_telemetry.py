"""Sensors must see what disturbs a run, and must not take the fleet itself for a disturbance."""

from __future__ import annotations

import mmap

from pipetune.bench.machine.sensors import Reading
from pipetune.bench.machine.telemetry import judge, peak_rss_bytes, read_telemetry, reset_peak_rss, sensors_for
from pipetune.bench.record import DeviceState

CPU = (DeviceState(device="cpu:0"),)
GPU = (DeviceState(device="cuda:0", ecc_errors=2),)


def test_telemetry_of_a_cpu_run_holds_both_moments() -> None:
    sensors = sensors_for(["cpu:0"])
    before = sensors.state()
    sensors.start()
    telemetry = read_telemetry(sensors, before)
    assert telemetry.before == before
    assert [state.device for state in telemetry.after] == ["cpu:0"]
    assert telemetry.energy_j is None
    assert telemetry.gpu_utilization is None


def test_a_quiet_run_is_undisturbed() -> None:
    assert judge(CPU, CPU, Reading(foreign_cores=0.4, stolen_cores=0.1)).disturbances == ()


def test_load_by_others_is_told_with_names() -> None:
    telemetry = judge(CPU, CPU, Reading(foreign_cores=0.84, foreign_names=("make (pid 5)",)))
    assert telemetry.disturbances == ("other processes took 0.8 CPU cores: make (pid 5)",)


def test_a_greedy_hypervisor_is_told() -> None:
    assert judge(CPU, CPU, Reading(stolen_cores=0.75)).disturbances == ("the hypervisor took 0.8 CPU cores away",)


def test_throttling_is_told_but_idling_and_power_caps_are_not() -> None:
    reasons = frozenset({"idle", "power cap", "thermal limit (hardware)"})
    telemetry = judge(GPU, GPU, Reading(throttled={"cuda:0": reasons}, energy_j=5.0, gpu_utilization=0.5))
    assert telemetry.disturbances == ("cuda:0 was slowed down: thermal limit (hardware)",)
    assert (telemetry.energy_j, telemetry.gpu_utilization) == (5.0, 0.5)


def test_throttling_before_or_after_a_run_is_told_as_well() -> None:
    slowed = DeviceState(device="cuda:0", throttle_reasons=("power brake", "idle"))
    told = ("cuda:0 was slowed down: power brake",)
    assert judge((slowed,), GPU, Reading()).disturbances == told
    assert judge(GPU, (slowed,), Reading()).disturbances == told


def test_new_ecc_errors_and_company_on_the_gpu_are_told() -> None:
    after = DeviceState(device="cuda:0", ecc_errors=3, foreign_processes=("python (pid 7)",))
    assert judge(GPU, (after,), Reading()).disturbances == (
        "cuda:0 was shared with python (pid 7)",
        "cuda:0 had 1 uncorrected ECC errors",
    )


def test_peak_memory_is_really_reset() -> None:
    size = 200 * 2**20
    reset_peak_rss()
    before = peak_rss_bytes()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for offset in range(0, size, mmap.PAGESIZE):
            block[offset] = 1
        assert peak_rss_bytes() >= before + size * 0.9
    # Freed by now, and still remembered until the reset.
    assert peak_rss_bytes() >= before + size * 0.9
    reset_peak_rss()
    assert peak_rss_bytes() <= before + size * 0.1
