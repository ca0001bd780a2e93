"""GPUs as CUDA numbers them."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.errors import ConfigError
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.machine import hardware, nvml
from pipetune.bench.machine.nvml import visible_gpus, visible_indices
from pipetune.bench.machine.sensors import NvmlSensors
from pipetune.bench.machine.telemetry import judge
from pipetune.bench.record import DeviceState
from pipetune.bench.spec import ModelSpec
from tests.nvml_stub import BLIND, SPLIT, WHOLE, Device, install

UUIDS = ("GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (0, 1, 2, 3)),
        ("", ()),
        ("2,0", (2, 0)),
        (" 1 , 3 ", (1, 3)),
        ("0,-1,1", (0,)),
        ("0,9,1", (0,)),
        ("GPU-bb,GPU-aa22", (2, 1)),
        ("GPU-aa", ()),
        ("GPU-zz", ()),
        ("1,GPU-aa22", ()),
        ("none", ()),
        ("-1", ()),
        ("1gpu2,2ampere", (1, 2)),
        ("+1", (1,)),
        ("NoDevFiles", ()),
        ("MIG-zz", ()),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(visible: str | None, expected: tuple[int, ...]) -> None:
    assert visible_indices(visible, UUIDS) == expected


@given(st.permutations(range(len(UUIDS))), st.integers(0, len(UUIDS)))
def test_visible_devices_by_index_and_by_uuid_agree(order: list[int], count: int) -> None:
    chosen = order[:count]
    by_index = visible_indices(",".join(map(str, chosen)), UUIDS)
    assert by_index == tuple(chosen) == visible_indices(",".join(UUIDS[index] for index in chosen), UUIDS)


LEFT, RIGHT = SPLIT.instances
SECOND = Device("GPU-dd44")


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        ((WHOLE, SECOND), None, (WHOLE, SECOND)),
        ((WHOLE, SECOND), "GPU-dd,0", (SECOND, WHOLE)),
        # Of a split GPU CUDA shows one instance, the first unless one is named, and no other GPU beside it.
        ((SPLIT,), None, (LEFT,)),
        ((WHOLE, SPLIT), None, (LEFT,)),
        ((WHOLE, SPLIT), "0", (WHOLE,)),
        ((WHOLE, SPLIT), "1", (LEFT,)),
        ((WHOLE, SPLIT), "GPU-bb22", (LEFT,)),
        ((WHOLE, SPLIT), "MIG-5c02", (RIGHT,)),
        ((WHOLE, SPLIT), "MIG-5c02,MIG-5c01", (RIGHT,)),
        ((WHOLE, SPLIT), "MIG-GPU-bb22/7/0", (RIGHT,)),
        ((WHOLE, SPLIT), "MIG-GPU-bb22/2/0", (LEFT,)),
        ((WHOLE, SPLIT), "", ()),
        ((WHOLE, SPLIT), "-1", ()),
        # All instances are known, and it is none of them.
        ((WHOLE, SPLIT), "MIG-ffff", ()),
        ((WHOLE,), "MIG-ffff", ()),
        ((WHOLE,), "GPU-ffff", ()),
        # It may be one that NVML does not list.
        ((BLIND,), "MIG-5c01", (None,)),
        ((BLIND,), "MIG-5c01,MIG-5c02", (None,)),
        ((BLIND,), "MIG-GPU-cc33/7/0", (None,)),
        ((BLIND,), "GPU-ffff", ()),
        ((Device("GPU-ee55", slots=7),), "MIG-5c01", (None,)),
        ((Device(""), WHOLE), "GPU-ee55,GPU-aa11", (None, WHOLE)),
        ((), "MIG-5c01", ()),
    ],
)
def test_gpus_that_cuda_shows(
    gpus: tuple[Device, ...],
    visible: str | None,
    expected: tuple[Device | None, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(gpus, monkeypatch.setattr)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with visible_gpus() as shown:
        assert shown == dict(enumerate(expected))


def test_a_mig_instance_is_a_gpu_of_its_own_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    install([WHOLE, SPLIT], monkeypatch.setattr)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-bb22/7/0")
    assert hardware.available_devices() == ("cuda:0",)
    assert hardware.device_bytes(["cuda:0", "cuda:0"]) == {"cuda:0": 5 * 2**29}
    (gpu,) = hardware.read_machine().hardware.gpus
    assert (gpu.name, gpu.memory_bytes, gpu.uuid) == (RIGHT.name, 5 * 2**30, "MIG-5c02")
    (state,) = NvmlSensors(["cuda:0"]).state()
    assert state.memory_used_bytes == 2**30


def test_a_gpu_that_nvml_does_not_tell_of_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    install([BLIND, WHOLE], monkeypatch.setattr)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5c01")
    assert hardware.available_devices() == ("cuda:0",)
    (gpu,) = hardware.read_machine().hardware.gpus
    assert (gpu.name, gpu.memory_bytes, gpu.uuid) == ("not known", None, "")
    with pytest.raises(ValueError, match="the memory of cuda:0 is not known"):
        hardware.device_bytes(["cuda:0"])
    sensors = NvmlSensors(["cuda:0"])
    before = sensors.state()
    assert before == (DeviceState(device="cuda:0"),)
    sensors.start()
    reading = sensors.stop()
    assert (reading.energy_j, reading.gpu_utilization) == (None, None)
    assert judge(before, sensors.state(), reading).disturbances == ()


def test_gpus_without_nvml_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    monkeypatch.setattr(nvml, "_DEV", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert set(hardware.available_devices()) <= {"cpu:0", "cpu:1"}
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert hardware.available_devices() == ("cuda:0", "cuda:1")
    machine = hardware.read_machine().hardware
    assert [gpu.name for gpu in machine.gpus] == ["not known"] * 2
    assert machine.links == ("0-1:not known",)
    for visible, count in (("1", 1), ("GPU-aa11", 1), ("GPU-aa11,GPU-bb22", 2), ("MIG-5c01", 1), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with visible_gpus() as gpus:
            assert gpus == dict.fromkeys(range(count))


def test_a_gpu_that_cannot_be_opened_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(index: int) -> Device:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return WHOLE

    install([SECOND, WHOLE], monkeypatch.setattr)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lost)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.name for gpu in hardware.read_machine().hardware.gpus] == ["not known", WHOLE.name]


def test_a_gpu_that_cuda_hides_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install([WHOLE, SECOND], monkeypatch.setattr)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ConfigError, match="cuda:1 is not on this machine; there are cuda:0"):
        Fleet.start(ModelSpec(name="tiny"), ("cuda:0", "cuda:1"))
