"""Telemetry of a run: its devices before and after, what ran over them meanwhile, and whether it was disturbed."""

import time
from collections.abc import Sequence
from pathlib import Path

from pipetune.bench.machine.sensors import CpuSensors, NvmlSensors, Reading, Sensors, family
from pipetune.bench.record import DeviceState, Telemetry
from pipetune.bench.spec import device_kind

DISTURBING_CORES = 0.5
"""A run is doubtful when others took more than this many cores while it lasted."""
_DISTURBING = ("hardware slowdown", "thermal limit (software)", "thermal limit (hardware)", "power brake")
"""A power cap is not among them: many GPUs live under theirs, under every plan alike."""


def sensors_for(devices: Sequence[str]) -> Sensors:
    """The sensors of these devices, which are of one kind."""
    return NvmlSensors(devices) if device_kind(devices[0]) == "cuda" else CpuSensors(devices)


def load_now(devices: Sequence[str], look_s: float = 0.5) -> tuple[str, ...]:
    """What others take of these devices, or of the CPUs that feed them, for so long from now; empty where little."""
    gpus = sensors_for(cuda).state() if (cuda := [one for one in devices if device_kind(one) == "cuda"]) else ()
    watch = CpuSensors(())
    watch.start(family(below=True))
    time.sleep(look_s)
    return judge(gpus, gpus, watch.stop()).disturbances


def read_telemetry(sensors: Sensors, before: tuple[DeviceState, ...]) -> Telemetry:
    """Stops the sensors and sums up; `before` is what their `state` gave before they were started."""
    reading = sensors.stop()
    return judge(before, sensors.state(), reading)


def judge(before: Sequence[DeviceState], after: Sequence[DeviceState], reading: Reading) -> Telemetry:
    """Telemetry of one run, with what makes it doubtful in words. Pure."""
    disturbances = []
    for one, other in zip(before, after, strict=True):
        seen = {*reading.throttled.get(one.device, ()), *one.throttle_reasons, *other.throttle_reasons}
        disturbances += [f"{one.device} was slowed down: {reason}" for reason in _DISTURBING if reason in seen]
        if device_kind(one.device) == "cuda" and (names := sorted({*one.foreign_processes, *other.foreign_processes})):
            disturbances.append(f"{one.device} was shared with {', '.join(names)}")
        if one.ecc_errors is not None and other.ecc_errors is not None and other.ecc_errors > one.ecc_errors:
            disturbances.append(f"{one.device} had {other.ecc_errors - one.ecc_errors} uncorrected ECC errors")
    if reading.foreign_cores > DISTURBING_CORES:
        names_text = ", ".join(reading.foreign_names) or "many small ones"
        disturbances.append(f"other processes took {reading.foreign_cores:.1f} CPU cores: {names_text}")
    if reading.stolen_cores > DISTURBING_CORES:
        disturbances.append(f"the hypervisor took {reading.stolen_cores:.1f} CPU cores away")
    return Telemetry(
        before=tuple(before),
        after=tuple(after),
        energy_j=reading.energy_j,
        gpu_utilization=reading.gpu_utilization,
        disturbances=tuple(disturbances),
    )


def reset_peak_rss() -> bool:
    """Makes `peak_rss_bytes` start anew from what is resident now; False where the kernel or a container forbids it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int:
    """Largest resident set of this process since the last reset, or since it began (`VmHWM`)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024


def merge_telemetry(parts: Sequence[Telemetry]) -> Telemetry:
    """One telemetry over the stages' devices: states in a row, energies added, utilisation averaged."""
    energies = [part.energy_j for part in parts if part.energy_j is not None]
    utilizations = [part.gpu_utilization for part in parts if part.gpu_utilization is not None]
    return Telemetry(
        before=tuple(state for part in parts for state in part.before),
        after=tuple(state for part in parts for state in part.after),
        energy_j=sum(energies) if len(energies) == len(parts) else None,
        gpu_utilization=sum(utilizations) / len(utilizations) if utilizations else None,
        disturbances=tuple(dict.fromkeys(text for part in parts for text in part.disturbances)),
    )
