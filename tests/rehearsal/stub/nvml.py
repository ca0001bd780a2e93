"""What NVML says of the stubbed GPUs."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.rehearsal.stub.machine import GIB, StubGpu, StubMachine

WATTS = 350.0
Handle = int | tuple[int, int]
"""Of a GPU, or of an instance on it."""


def functions(pynvml: Any) -> dict[str, Callable[..., Any]]:
    """Stand-ins by name, for the module or for a monkeypatch of it."""
    began = time.monotonic()

    def gpu(handle: Handle) -> StubGpu:
        if isinstance(handle, tuple):
            return gpu(handle[0]).instance(handle[1])
        found = StubMachine.read().gpus[handle]
        if found.is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return found

    def by_index(index: int) -> int:
        if not 0 <= index < len(StubMachine.read().gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def ecc_errors(handle: Handle, kind: int, counter: int) -> int:
        found = gpu(handle).ecc_errors
        if found is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return found

    def mig_device(handle: int, index: int) -> tuple[int, int]:
        if index >= len(gpu(handle).mig_uuids):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return handle, index

    def processes(handle: Handle) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in (os.getpid(), *gpu(handle).foreign_pids)]

    def memory(handle: Handle) -> SimpleNamespace:
        total = gpu(handle).memory_bytes
        return SimpleNamespace(total=total, used=GIB, free=total - GIB)

    def energy(handle: Handle) -> int:
        whole(handle)
        return int((time.monotonic() - began) * WATTS * 1e3)

    def whole(handle: Handle) -> None:
        gpu(handle)
        if isinstance(handle, tuple):
            # No instance has sensors of its own.
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def parent(handle: Handle) -> int:
        if not isinstance(handle, tuple):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return handle[0]

    def pci_info(handle: Handle) -> SimpleNamespace:
        whole(handle)
        return SimpleNamespace(busId=f"00000000:{handle:02X}:00.0")

    def always(answer: Any, asked: Callable[[Handle], Any] = gpu) -> Callable[..., Any]:
        return functools.partial(lambda answer, handle, *args: (asked(handle), answer)[1], answer)

    return {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.0",
        "nvmlDeviceGetCount": lambda: len(StubMachine.read().gpus),
        "nvmlDeviceGetHandleByIndex": by_index,
        "nvmlDeviceGetUUID": lambda handle: gpu(handle).uuid,
        "nvmlDeviceGetName": lambda handle: gpu(handle).name,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetMigMode": lambda handle: (int(bool(gpu(handle).mig_uuids)),) * 2,
        "nvmlDeviceGetMaxMigDeviceCount": lambda handle: len(gpu(handle).mig_uuids),
        "nvmlDeviceGetMigDeviceHandleByIndex": mig_device,
        "nvmlDeviceGetGpuInstanceId": lambda handle: handle[1] + 1,
        "nvmlDeviceGetComputeInstanceId": lambda handle: 0,
        "nvmlDeviceGetCudaComputeCapability": always((9, 0)),
        "nvmlDeviceGetUtilizationRates": always(SimpleNamespace(gpu=50, memory=10), whole),
        "nvmlDeviceGetPowerUsage": always(int(WATTS * 1e3), whole),
        "nvmlDeviceGetClockInfo": always(1980),
        "nvmlDeviceGetTemperature": always(45),
        "nvmlDeviceGetTotalEnergyConsumption": energy,
        "nvmlDeviceGetTotalEccErrors": ecc_errors,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: gpu(handle).throttle_mask,
        "nvmlDeviceGetComputeRunningProcesses": processes,
        "nvmlDeviceGetP2PStatus": always(pynvml.NVML_P2P_STATUS_OK),
        "nvmlDeviceGetTopologyCommonAncestor": always(pynvml.NVML_TOPOLOGY_NODE),
        "nvmlDeviceGetNvLinkState": always(0),
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": parent,
        "nvmlDeviceGetPciInfo": pci_info,
    }


def install(pynvml: Any) -> None:
    """Puts the stand-ins into the module."""
    for name, function in functions(pynvml).items():
        setattr(pynvml, name, function)
