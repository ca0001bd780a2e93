"""What a process brings on joining a shared study: a key that must equal the study's, and a name and number."""

import hashlib
import os
import re
import secrets
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Self

from pipetune.bench.errors import StudyError
from pipetune.bench.record import Hardware, Machine
from pipetune.bench.spec import ModelSpec, Protocol, Value, Workload, device_index, device_kind
from pipetune.tuner.config.schema import Constraint, SpaceConfig, TuneConfig
from pipetune.tuner.config.sources import differences
from pipetune.tuner.study.files import StudyFile, read
from pipetune.tuner.study.store import StudyStore


class StudyKey(Value):
    """Whatever must be equal between processes whose measurements are to compare. A study's settings without those that
    each process may choose; devices by their places, without their names."""

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
    """Hardware of the whole machine, without UUIDs and NUMA nodes."""

    @classmethod
    def of(cls, config: TuneConfig, machine: Machine) -> Self:
        """The key of a process whose devices and checkpoint's revision are resolved."""
        devices, hardware = config.concrete_devices, machine.hardware
        gpus = tuple(gpu.model_copy(update={"uuid": "", "numa_node": None}) for gpu in hardware.gpus)
        return cls(
            model=config.model.by_content,
            workload=config.workload,
            protocol=config.protocol,
            objectives=config.objectives,
            constraints=config.constraints,
            space=config.space,
            devices=tuple(f"{_kind(device, hardware)} ({devices.index(device)})" for device in devices),
            links=tuple(_links(devices, hardware)),
            hardware=hardware.model_copy(update={"gpus": gpus}),
        )

    def require(self, wanted: Self, *, study: str) -> None:
        """Raises a StudyError that says what differs, where a process asks something else."""
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


class Membership(Value):
    """Who a folder is in a shared study: `sharing.json`."""

    schema_version: int = 1
    study: str
    process: int
    """Counts from 1 in the order in which the processes joined."""
    name: str
    """Unique: its host, its number and a few random digits."""
    seed: int
    """Seed of this process's own stream of random numbers, from the study's seed and its number."""


def describe_self(store: StudyStore) -> dict[str, Any]:
    """What others may want to know of this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "folder": str(store.folder.resolve()),
        "devices": list(store.config.concrete_devices),
        "cores": sorted(os.sched_getaffinity(0)),
    }


def membership_of(
    store: StudyStore, study: str, me: Mapping[str, Any], members: Mapping[str, Any], gone: Collection[str]
) -> Membership:
    """Who this folder is in the study: who it was, if it took part before, else a new process; StudyError where it is a
    copy of a folder in use. `members` are all that ever joined, by name, `gone` the names of those that are no more."""
    path = store.folder / StudyFile.SHARING
    known = read(path, Membership) if path.exists() else None
    if known is None or known.study != study:
        process = 1 + max((int(member["process"]) for member in members.values()), default=0)
        host = re.sub(r"[^A-Za-z0-9.-]", "-", me["host"])[:40]
        name = f"{host}-{process}-{secrets.token_hex(3)}"
        # No two processes draw the same numbers; the seeds are far enough apart to be counted up from.
        digest = hashlib.sha256(f"{store.config.seed} process {process}".encode()).digest()
        return Membership(study=study, process=process, name=name, seed=int.from_bytes(digest[:4]) >> 1)
    before = members.get(known.name, me)
    if known.name not in gone and before["folder"] != me["folder"]:
        raise StudyError(
            f"{store.folder} takes part in shared study {study} as {known.name}, which works in {before['folder']} on "
            f"{before['host']} right now; a copy cannot join, take a new folder"
        )
    return known


def disturbing_neighbours(me: Mapping[str, Any], others: Collection[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Those on the same cores: CPU workers of two processes take time from each other, and neither would know."""
    for other in others:
        is_neighbour = other["host"] == me["host"] and other["folder"] != me["folder"]
        on_cpu = all(any(device_kind(device) == "cpu" for device in each["devices"]) for each in (me, other))
        if is_neighbour and on_cpu and set(me["cores"]) & set(other["cores"]):
            yield other


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
