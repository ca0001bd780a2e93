"""What a shared study asks: whatever must be equal between processes whose measurements are to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Hardware, Machine
from pipetune.bench.spec import ModelSpec, Protocol, Value, Workload, device_index, device_kind
from pipetune.tuner.config.schema import Constraint, SpaceConfig, TuneConfig
from pipetune.tuner.study.diff import differences


class StudyKey(Value):
    """A study's settings without those that each process may choose; devices by their places, without their names."""

    schema_version: int = 1
    model: ModelSpec
    workload: Workload
    protocol: Protocol
    objectives: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    space: SpaceConfig
    devices: tuple[str, ...]
    """Kind of each place's device, and the first place that the same device has."""
    links: tuple[str, ...]
    """`0-1:NV18`: what lies between two places."""
    hardware: Hardware
    """Hardware of the whole machine, without UUIDs."""

    @classmethod
    def of(cls, config: TuneConfig, machine: Machine) -> Self:
        """The key of a process.

        Args:
            config: with its devices and the checkpoint's revision resolved.
        """
        devices = config.concrete_devices
        hardware = machine.hardware
        gpus = tuple(gpu.model_copy(update={"uuid": ""}) for gpu in hardware.gpus)
        return cls(
            model=config.model,
            workload=config.workload,
            protocol=config.protocol,
            objectives=config.objectives,
            constraints=config.constraints,
            space=config.space,
            devices=tuple(f"{_kind(device, hardware)} ({devices.index(device)})" for device in devices),
            links=tuple(_links(devices, hardware)),
            hardware=hardware.model_copy(update={"gpus": gpus}),
        )

    def require(self, wanted: StudyKey, *, study: str) -> None:
        """Refuses a process that asks something else.

        Raises:
            StudyError: says what differs.
        """
        if self.digest() == wanted.digest():
            return
        lines = differences(self, wanted)
        if self.hardware != wanted.hardware:
            lines = [line for line in lines if line.startswith("hardware.")]
            why, remedy = "runs on other hardware", "give a --shared-study of its own to this kind of machine"
        else:
            why, remedy = "asks something else", "give the same settings, or another name with --shared-study"
        raise StudyError(
            f"shared study {study} {why}, and its measurements would not compare:\n  "
            + "\n  ".join(lines)
            + f"\n{remedy}"
        )


def _kind(device: str, hardware: Hardware) -> str:
    if device_kind(device) == "cpu" or device_index(device) >= len(hardware.gpus):
        return device_kind(device)
    return hardware.gpus[device_index(device)].name


def _links(devices: Sequence[str], hardware: Hardware) -> list[str]:
    """Links between the GPUs in use, by the places of these."""
    places = {device_index(name): place for place, name in enumerate(devices) if device_kind(name) == "cuda"}
    found = []
    for link in hardware.links:
        pair, _, kind = link.partition(":")
        ends = [places.get(int(end)) for end in pair.split("-") if end.isdecimal()]
        if len(ends) == 2 and None not in ends:
            low, high = sorted(end for end in ends if end is not None)
            found.append(f"{low}-{high}:{kind}")
    return sorted(found)
