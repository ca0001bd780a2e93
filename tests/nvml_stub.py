"""NVML of machines that are not at hand: its functions, answered from a table of GPUs and their MIG instances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml


@dataclass(frozen=True)
class Device:
    """A GPU or a MIG instance, which is its own handle."""

    uuid: str
    name: str = "NVIDIA A100-SXM4-40GB"
    gib: int = 40
    ids: tuple[int, int] = (0, 0)
    """Of a MIG instance: its GPU instance and compute instance."""
    slots: int | None = 0
    """How many MIG instances the GPU may have; None where NVML does not say."""
    instances: tuple[Device, ...] = field(default=(), repr=False)
    bus_id: str = ""


def install(gpus: Sequence[Device], put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Makes `pynvml` speak of these GPUs; what is not answered here has no answer."""

    def answer(value: Any) -> Any:
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def slot(gpu: Device, index: int) -> Any:
        # Slots may be empty, the first ones among them.
        place = index - (gpu.slots or 0) + len(gpu.instances)
        return answer(gpu.instances[place] if place >= 0 else None)

    answers: dict[str, Callable[..., Any]] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": lambda index: gpus[index],
        "nvmlDeviceGetUUID": lambda device: answer(device.uuid or None),
        "nvmlDeviceGetName": lambda device: device.name,
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(total=device.gib * 2**30, used=2**30),
        "nvmlDeviceGetMaxMigDeviceCount": lambda gpu: answer(gpu.slots),
        "nvmlDeviceGetMigDeviceHandleByIndex": slot,
        "nvmlDeviceGetPciInfo": lambda device: SimpleNamespace(busId=answer(device.bus_id or None)),
        "nvmlDeviceGetGpuInstanceId": lambda device: device.ids[0],
        "nvmlDeviceGetComputeInstanceId": lambda device: device.ids[1],
    }
    for name, function in answers.items():
        put(pynvml, name, function)


WHOLE = Device("GPU-aa11")
SPLIT = Device(
    "GPU-bb22",
    slots=7,
    instances=(
        Device("MIG-5c01", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20, ids=(2, 0)),
        Device("MIG-5c02", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5, ids=(7, 0)),
    ),
)
BLIND = Device("GPU-cc33", slots=None)
