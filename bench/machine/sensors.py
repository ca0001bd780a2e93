"""Sensors of CPUs and GPUs: the state of a device now, and what happened to it between two moments."""

import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil
import pynvml

from pipetune.bench.machine.nvml import read, visible_gpus
from pipetune.bench.record import DeviceState
from pipetune.bench.spec import device_index

FOREIGN_SHARE = 0.10
"""A process of others is named when it takes more than this share of a core."""
_LOOK_S = 0.2
_SAMPLE_PERIOD_S = 0.1

_THROTTLE = {
    pynvml.nvmlClocksEventReasonGpuIdle: "idle",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "application clocks",
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync boost",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display clocks",
    pynvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal limit (software)",
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "thermal limit (hardware)",
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the sensors gathered between `start` and `stop`; absent where there is no sensor."""

    energy_j: float | None = None
    gpu_utilization: float | None = None
    """Mean over time and devices, 0–1."""
    throttled: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    """Per device, the reasons that were seen."""
    foreign_cores: float = 0.0
    """CPU cores that processes of others took on average."""
    foreign_names: tuple[str, ...] = ()
    """The largest of them first."""
    stolen_cores: float = 0.0
    """CPU cores that the hypervisor gave to other guests."""


def family(*, below: bool = False) -> frozenset[int]:
    """This process, the one that started it, and all that those started: a fleet's driver and its workers.

    `below` leaves the one above out, which is a shell where this is the driver.
    Whom the system's first process adopted has no family above itself.
    """
    me = psutil.Process()
    members = {me.pid, *(child.pid for child in me.children(recursive=True))}
    parent = None if below else me.parent()
    if parent is not None and parent.cmdline() == me.cmdline():
        # It forked this worker for the driver.
        parent = parent.parent()
    if parent is not None and parent.pid != 1:
        members |= {parent.pid, *(child.pid for child in parent.children(recursive=True))}
    return frozenset(members)


class CpuSensors:
    """CPU workers: what the kernel says of the host and of everyone's processes on it."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = tuple(devices)
        self._own: Collection[int] = ()
        self._began: _CpuLook | None = None

    def state(self) -> tuple[DeviceState, ...]:
        """The devices as they are now; takes a fifth of a second. Processes of `family` are no disturbance."""
        own = family()
        first = _CpuLook.take()
        time.sleep(_LOOK_S)
        last = _CpuLook.take()
        frequency = psutil.cpu_freq()
        busy = [row for row in last.foreign_since(first, own) if row[2] > FOREIGN_SHARE]
        host = {
            "clock_mhz": frequency.current if frequency is not None and frequency.current > 0 else None,
            "utilization": last.utilization_since(first),
            "memory_used_bytes": psutil.virtual_memory().used,
            "foreign_processes": tuple(f"{name} (pid {pid}, {cores:.0%} of a core)" for pid, name, cores in busy),
            "load_average": os.getloadavg()[0],
        }
        return tuple(DeviceState.model_validate({"device": device, **host}) for device in self._devices)

    def start(self, own: Collection[int] | None = None) -> None:
        """Begins to watch; processes of `own`, by default of `family`, are no disturbance."""
        self._own = family() if own is None else own
        self._began = _CpuLook.take()

    def stop(self) -> Reading:
        """What was seen since `start`."""
        began, self._began = self._began, None
        assert began is not None, "stop without start"
        now = _CpuLook.take()
        foreign = now.foreign_since(began, self._own)
        return Reading(
            foreign_cores=sum(cores for _, _, cores in foreign),
            foreign_names=tuple(f"{name} (pid {pid})" for pid, name, cores in foreign if cores > FOREIGN_SHARE),
            stolen_cores=now.stolen_since(began),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _CpuLook:
    """Clocks of one moment: every visible process's CPU time, and the host's."""

    at_s: float
    processes: Mapping[tuple[int, float], tuple[str, float]]
    """By pid and time of creation, since pids are used again: name and CPU seconds."""
    host: Any

    @classmethod
    def take(cls) -> Self:
        processes = {}
        for process in psutil.process_iter(["pid", "create_time", "name", "cpu_times"]):
            if (times := process.info["cpu_times"]) is not None:
                key = (process.info["pid"], process.info["create_time"])
                processes[key] = (process.info["name"], times.user + times.system)
        return cls(at_s=time.monotonic(), processes=processes, host=psutil.cpu_times())

    def foreign_since(self, earlier: Self, own: Collection[int]) -> list[tuple[int, str, float]]:
        """Pid, name and cores taken on average, of all but `own`; the largest first."""
        span_s = max(self.at_s - earlier.at_s, 1e-9)
        rows = []
        for key, (name, cpu_s) in self.processes.items():
            spent_s = cpu_s - earlier.processes.get(key, (name, 0.0))[1]
            if key[0] not in own and spent_s > 0:
                rows.append((key[0], name, spent_s / span_s))
        return sorted(rows, key=lambda row: -row[2])

    def stolen_since(self, earlier: Self) -> float:
        return max(0.0, float(self.host.steal - earlier.host.steal) / max(self.at_s - earlier.at_s, 1e-9))

    def utilization_since(self, earlier: Self) -> float | None:
        spent = [now - then for now, then in zip(self.host, earlier.host, strict=True)]
        idle = self.host.idle - earlier.host.idle + self.host.iowait - earlier.host.iowait
        # Guest time is part of user time and would count twice.
        total = sum(spent) - (self.host.guest - earlier.host.guest) - (self.host.guest_nice - earlier.host.guest_nice)
        return min(1.0, max(0.0, 1.0 - idle / total)) if total > 0 else None


class NvmlSensors:
    """GPUs: what NVML says; a thread takes samples between `start` and `stop`."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = tuple(devices)
        self._samples: dict[str, _GpuSamples] = {}
        self._energy_start_j: dict[str, float | None] = {}
        self._began_s = 0.0
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None

    def state(self) -> tuple[DeviceState, ...]:
        """The devices as they are now; processes of `family` are no disturbance."""
        own = family()
        with self._handles() as gpus:
            states = {device: _gpu_state(device, gpu, own) for device, gpu in gpus.items()}
        return tuple(states.get(device, DeviceState(device=device)) for device in self._devices)

    def start(self) -> None:
        """Begins to watch."""
        self._halt.clear()
        self._samples = {device: _GpuSamples() for device in self._devices}
        self._began_s = time.monotonic()
        with self._handles() as handles:
            self._energy_start_j = {device: _energy_j(handle) for device, handle in handles.items()}
        self._thread = threading.Thread(target=self._sample, name="pipetune-nvml", daemon=True)
        self._thread.start()

    def stop(self) -> Reading:
        """What was seen since `start`."""
        assert self._thread is not None, "stop without start"
        self._halt.set()
        self._thread.join()
        self._thread = None
        span_s = time.monotonic() - self._began_s
        energies: list[float | None] = []
        with self._handles() as handles:
            for device in self._devices:
                first = self._energy_start_j.get(device)
                last = _energy_j(handles[device]) if device in handles else None
                if first is not None and last is not None:
                    energies.append(last - first)
                else:
                    watts = self._samples[device].power_w
                    energies.append(statistics.fmean(watts) * span_s if watts else None)
        busy = [share for samples in self._samples.values() for share in samples.utilization]
        known = [energy for energy in energies if energy is not None]
        return Reading(
            energy_j=sum(known) if len(known) == len(energies) and known else None,
            gpu_utilization=statistics.fmean(busy) if busy else None,
            throttled={device: frozenset(samples.throttled) for device, samples in self._samples.items()},
        )

    @contextmanager
    def _handles(self) -> Iterator[dict[str, Any]]:
        with visible_gpus() as gpus:
            yield {device: gpus[device_index(device)] for device in self._devices if device_index(device) in gpus}

    def _sample(self) -> None:
        with self._handles() as handles:
            while handles:
                for device, handle in handles.items():
                    self._samples[device].take(handle)
                if self._halt.wait(_SAMPLE_PERIOD_S):
                    return


Sensors = CpuSensors | NvmlSensors
"""Watches some devices. Not for several threads."""


class _GpuSamples:
    """What one GPU's sampling gathered."""

    def __init__(self) -> None:
        self.utilization: list[float] = []
        self.power_w: list[float] = []
        self.throttled: set[str] = set()

    def take(self, handle: Any) -> None:
        if (rates := read(pynvml.nvmlDeviceGetUtilizationRates, handle)) is not None:
            self.utilization.append(rates.gpu / 100)
        if (power_mw := read(pynvml.nvmlDeviceGetPowerUsage, handle)) is not None:
            self.power_w.append(power_mw / 1e3)
        self.throttled.update(_throttle_reasons(handle))


def _gpu_state(device: str, handle: Any, own: Collection[int]) -> DeviceState:
    def scaled(scale: float, function: Callable[..., Any], *args: Any) -> float | None:
        value = read(function, handle, *args)
        return None if value is None else value * scale

    rates = read(pynvml.nvmlDeviceGetUtilizationRates, handle)
    memory = read(pynvml.nvmlDeviceGetMemoryInfo, handle)
    errors = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    # Those that only draw are left out: every desktop has some.
    computing = read(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    return DeviceState(
        device=device,
        clock_mhz=scaled(1.0, pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        temperature_c=scaled(1.0, pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        power_w=scaled(1e-3, pynvml.nvmlDeviceGetPowerUsage),
        utilization=None if rates is None else rates.gpu / 100,
        memory_used_bytes=None if memory is None else int(memory.used),
        throttle_reasons=_throttle_reasons(handle),
        ecc_errors=read(pynvml.nvmlDeviceGetTotalEccErrors, handle, *errors),
        foreign_processes=foreign_gpu_processes({int(one.pid) for one in computing}, own),
    )


def foreign_gpu_processes(pids: Collection[int], own: Collection[int], proc: Path = Path("/proc")) -> tuple[str, ...]:
    """Which of a GPU's processes are others', in words. In a container NVML may give the pids of the host, where our
    own cannot be told: if none of the pids is ours, one that `/proc` does not show is taken for our own."""
    strangers = sorted(set(pids) - set(own))
    hidden = [pid for pid in strangers if not (proc / str(pid)).exists()]
    if hidden and not set(pids) & set(own):
        strangers.remove(hidden[0])
    words = []
    for pid in strangers:
        try:
            words.append(f"{(proc / str(pid) / 'comm').read_text().strip()} (pid {pid})")
        except OSError:
            words.append(f"a process out of sight (pid {pid})")
    return tuple(words)


def _throttle_reasons(handle: Any) -> tuple[str, ...]:
    # Drivers before 535 know the older of the two names.
    mask = read(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if mask is None:
        mask = read(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    return tuple(word for bit, word in _THROTTLE.items() if mask & bit)


def _energy_j(handle: Any) -> float | None:
    millijoules = read(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    return None if millijoules is None else millijoules / 1e3
