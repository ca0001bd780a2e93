"""Devices described in a file: GPUs that are not here, other counts of them, unlike ones, and the links between them.

    devices:
      - {name: cuda:0-1, memory_gib: 80, tflops: 312, memory_gb_per_s: 2039, layer_overhead_us: 150}
      - {name: cuda:2-3, like: cuda:0, speed: 0.4, memory_gib: 24}
      - {name: cpu:0, like: {profile: profile.json, device: cpu:0}, speed: 1.5}
    links:
      - {between: [cuda:0-1], gb_per_s: 300, latency_us: 8}
      - {between: any, gb_per_s: 25, latency_us: 15}

Rates are those of one device in the model's dtype. `like` takes over what a device named earlier in the file, or one
of a measured profile, has; `speed` makes everything on it so many times as fast. Of the links that cover a pair, the
first one counts; two devices of one profile have the link that was measured there, unless the file says otherwise.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from pipetune.bench.errors import ConfigError
from pipetune.bench.memory import ModelShape
from pipetune.bench.profile import Profile, TaskKind
from pipetune.bench.spec import Device, Value, device_kind, parse_devices
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.nominal import RATES, NominalCosts, Rates
from pipetune.tuner.planning.costs.profiled import ProfiledCosts

_GIB, _GB, _TERA, _MICRO = 2**30, 1e9, 1e12, 1e-6


class LikeProfiled(Value):
    """A device of a measured profile."""

    profile: str
    """Path, from the folder of the file that names it."""
    device: Device


class DeviceEntry(Value):
    """One device, or a range of equal ones."""

    name: str
    """`cuda:0`, or `cuda:0-3` for four of them."""
    memory_gib: float | None = Field(default=None, gt=0)
    tflops: float | None = Field(default=None, gt=0)
    """10¹² floating-point operations a second, in the model's dtype."""
    memory_gb_per_s: float | None = Field(default=None, gt=0)
    """10⁹ bytes of weights and KV cache read a second."""
    layer_overhead_us: float | None = Field(default=None, ge=0)
    """What a layer takes however little it has to do; None: as is usual for its kind of device."""
    like: Device | LikeProfiled | None = None
    speed: float = Field(default=1.0, gt=0)


class LinkEntry(Value):
    """Messages within one group of devices, or between several groups, in either direction."""

    between: Literal["any"] | tuple[str, ...]
    """Devices or ranges: of one entry, all pairs within it; of several, all pairs across them."""
    gb_per_s: float = Field(gt=0)
    """10⁹ bytes a second, in one direction."""
    latency_us: float = Field(ge=0)

    @field_validator("between")
    @classmethod
    def _not_empty(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("names no device; write [cuda:0-3], [cuda:0-3, cuda:4-7] or any")
        return value


class DevicesEntry(Value):
    """The file."""

    schema_version: Literal[1] = 1
    about: str | None = None
    """Whose numbers these are, for people."""
    devices: tuple[DeviceEntry, ...] = Field(min_length=1)
    links: tuple[LinkEntry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DescribedDevice:
    """One device: what it holds, and what tasks take on it."""

    name: str
    memory_bytes: int
    speed: float
    rates: Rates | None
    """None where a profile says it."""
    profile: Profile | None = None
    profiled_as: str | None = None
    """Which of the profile's devices it is like."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """`latency_s + bytes / bytes_per_s`."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class DescribedDevices:
    """What a file says, taken apart."""

    place: str
    about: str | None
    devices: tuple[DescribedDevice, ...]
    links: Mapping[tuple[str, str], Link]
    """Every ordered pair."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the devices described, in their order."""
        return tuple(device.name for device in self.devices)

    def device_bytes(self, names: Sequence[str]) -> dict[str, int]:
        """Memory of these devices.

        Raises:
            ConfigError: one of them is not described.
        """
        sizes = {device.name: device.memory_bytes for device in self.devices}
        for name in names:
            if name not in sizes:
                raise ConfigError(
                    f"devices: {name} is not described in {self.place}, which has {', '.join(sizes)}; leave --devices "
                    "out to use all of them, or describe it there"
                )
        return {name: sizes[name] for name in names}

    def costs(self, shape: ModelShape, *, scores: bool = False) -> DescribedCosts:
        """What tasks of a model take on these devices.

        Raises:
            ConfigError: a device is like one of another model's profile.
        """
        for device in self.devices:
            if device.profile is not None and device.profile.shape != shape:
                raise ConfigError(
                    f"{self.place}: {device.name} is like {device.profiled_as} of a profile of "
                    f"{device.profile.model.name} in {device.profile.model.dtype}, and another model is planned for; "
                    "give its own profile (pipetune profile), or tflops and memory_gb_per_s"
                )
        return DescribedCosts(self, shape, scores=scores)


class DescribedCosts:
    """Costs on described devices: each device's own source, at its speed, and the file's links."""

    def __init__(self, described: DescribedDevices, shape: ModelShape, *, scores: bool) -> None:
        rates = {device.name: device.rates for device in described.devices if device.rates is not None}
        nominal = NominalCosts(shape, rates, scores)
        self._links = described.links
        self._sources: dict[str, tuple[Costs, str, float]] = {}
        for device in described.devices:
            if device.profile is None:
                self._sources[device.name] = (nominal, device.name, device.speed)
            else:
                assert device.profiled_as is not None
                self._sources[device.name] = (ProfiledCosts(device.profile), device.profiled_as, device.speed)

    def layers_s(self, device: str, kind: TaskKind) -> npt.NDArray[np.float64]:
        """See `Costs`."""
        costs, known_as, speed = self._sources[device]
        return costs.layers_s(known_as, kind) / speed

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        """See `Costs`."""
        costs, known_as, speed = self._sources[device]
        return costs.ends_s(known_as, kind, is_first=is_first, is_last=is_last) / speed

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        """See `Costs`."""
        if source == target:
            return 0.0
        link = self._links[source, target]
        return link.latency_s + num_bytes / link.bytes_per_s


def read_devices(path: Path) -> DescribedDevices:
    """Reads a file of devices.

    Raises:
        ConfigError: the file cannot be read, has an unknown key, a value out of range, a device that is described by
            halves or twice, or lacks a link; names file, key and way out.
    """
    entry = _parse(path)
    devices: dict[str, DescribedDevice] = {}
    profiles: dict[Path, Profile] = {}
    for index, one in enumerate(entry.devices):
        place = f"{path}: devices[{index}]"
        for name in _names(one.name, f"{place}.name"):
            if name in devices:
                raise ConfigError(f"{place}.name: {name} is described twice; keep one")
            devices[name] = _device(name, one, devices, profiles, place, path.parent)
    return DescribedDevices(
        place=str(path),
        about=entry.about,
        devices=tuple(devices.values()),
        links=_links(entry.links, devices, path),
    )


def _device(
    name: str,
    entry: DeviceEntry,
    known: Mapping[str, DescribedDevice],
    profiles: dict[Path, Profile],
    place: str,
    folder: Path,
) -> DescribedDevice:
    if isinstance(entry.like, LikeProfiled):
        base = _like_profiled(name, entry.like, profiles, place, folder)
    elif entry.like is not None:
        if entry.like not in known:
            above = f"there are {', '.join(known)} above it" if known else "it is the first"
            raise ConfigError(f"{place}.like: {entry.like} is not described above; {above}")
        base = replace(known[entry.like], name=name)
    else:
        lacking = [key for key in ("memory_gib", "tflops", "memory_gb_per_s") if getattr(entry, key) is None]
        if lacking:
            raise ConfigError(f"{place}: {name} has no {' and no '.join(lacking)}; give it, or like: another device")
        usual = RATES[device_kind(name)]
        base = DescribedDevice(name=name, memory_bytes=0, speed=1.0, rates=usual)
    if base.profile is not None:
        given = [key for key in ("tflops", "memory_gb_per_s", "layer_overhead_us") if getattr(entry, key) is not None]
        if given:
            raise ConfigError(f"{place}.{given[0]}: {name} takes its times from a profile; scale them by speed instead")
    memory = base.memory_bytes if entry.memory_gib is None else int(entry.memory_gib * _GIB)
    return replace(
        base,
        memory_bytes=memory,
        speed=base.speed * entry.speed,
        rates=None if base.rates is None else _changed(base.rates, entry),
    )


def _like_profiled(
    name: str, like: LikeProfiled, profiles: dict[Path, Profile], place: str, folder: Path
) -> DescribedDevice:
    path = folder / like.profile
    if path not in profiles:
        try:
            profiles[path] = Profile.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no profile"
            raise ConfigError(
                f"{place}.like.profile: cannot read {path}: {why}; pipetune profile -o FILE writes one"
            ) from None
    profile = profiles[path]
    there = [one.device for one in profile.devices]
    if like.device not in there:
        raise ConfigError(f"{place}.like.device: {like.device} is not in {path}, which has {', '.join(there)}")
    return DescribedDevice(
        name=name,
        memory_bytes=profile.device_bytes[like.device],
        speed=1.0,
        rates=None,
        profile=profile,
        profiled_as=like.device,
    )


def _changed(rates: Rates, entry: DeviceEntry) -> Rates:
    """Rates with what an entry says instead."""
    changes: dict[str, float] = {}
    if entry.tflops is not None:
        changes["flops_per_s"] = entry.tflops * _TERA
    if entry.memory_gb_per_s is not None:
        changes |= dict.fromkeys(("bytes_per_s", "head_bytes_per_s"), entry.memory_gb_per_s * _GB)
    if entry.layer_overhead_us is not None:
        changes["layer_overhead_s"] = entry.layer_overhead_us * _MICRO
    return replace(rates, **changes)


def _links(
    entries: Sequence[LinkEntry], devices: Mapping[str, DescribedDevice], path: Path
) -> dict[tuple[str, str], Link]:
    links: dict[tuple[str, str], Link] = {}
    for index, entry in enumerate(entries):
        link = Link(latency_s=entry.latency_us * _MICRO, bytes_per_s=entry.gb_per_s * _GB)
        for pair in _pairs(entry, devices, f"{path}: links[{index}].between"):
            links.setdefault(pair, link)
    for source, target in itertools.permutations(devices, 2):
        if (source, target) not in links:
            links[source, target] = _measured(devices[source], devices[target]) or _lacking(source, target, path)
    return links


def _pairs(entry: LinkEntry, devices: Mapping[str, DescribedDevice], place: str) -> Iterator[tuple[str, str]]:
    if entry.between == "any":
        yield from itertools.permutations(devices, 2)
        return
    groups = [_names(text, place) for text in entry.between]
    for name in itertools.chain.from_iterable(groups):
        if name not in devices:
            raise ConfigError(f"{place}: {name} is not among the devices {', '.join(devices)}")
    if len(groups) == 1:
        yield from itertools.permutations(groups[0], 2)
        return
    for one, other in itertools.permutations(groups, 2):
        yield from ((a, b) for a in one for b in other if a != b)


def _measured(source: DescribedDevice, target: DescribedDevice) -> Link | None:
    """The link that a profile of both devices has."""
    if source.profile is None or source.profile is not target.profile:
        return None
    for link in source.profile.links:
        if (link.source, link.target) == (source.profiled_as, target.profiled_as):
            return Link(latency_s=link.latency_s, bytes_per_s=link.bytes_per_s)
    return None


def _lacking(source: str, target: str, path: Path) -> Link:
    raise ConfigError(
        f"{path}: links: nothing says what lies between {source} and {target}; add "
        f"{{between: [{source}, {target}], gb_per_s: …, latency_us: …}}, or one with between: any"
    )


def _names(text: str, place: str) -> tuple[str, ...]:
    try:
        names = parse_devices(text)
    except ValueError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix('devices: ')}") from None
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"{place}: {doubled[0]} is named twice")
    return names


def _parse(path: Path) -> DevicesEntry:
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the devices: {why}") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{place}: malformed YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping with devices: and links:, not {values!r}")
    try:
        return DevicesEntry.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(f"{path}: {_problem(dict(one))}" for one in error.errors(include_url=False))
        raise ConfigError("\n".join(itertools.islice(lines, 5))) from None


def _problem(problem: Mapping[str, Any]) -> str:
    """`devices[1].tflops: Input should be greater than 0 (given: -3)`."""
    key = ""
    fields: type[BaseModel] | None = DevicesEntry
    keys: list[str] = []
    for part in problem["loc"]:
        if isinstance(part, int):
            key += f"[{part}]"
        elif part in _BRANCHES:
            # A branch of a union, which is no key.
            fields = LikeProfiled if part == "LikeProfiled" else fields
        else:
            keys = list(fields.model_fields) if fields is not None else []
            key += f".{part}" if key else str(part)
            fields = _SECTIONS.get(str(part), fields)
    if problem["type"] == "extra_forbidden":
        last = str(problem["loc"][-1])
        near = difflib.get_close_matches(last, keys, n=1, cutoff=0.5)
        return f"{key}: unknown key; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(keys)}")
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key}: it is missing"
    given = problem["input"]
    return f"{key}: {message}" + (f" (given: {given})" if isinstance(given, str | int | float) else "")


_SECTIONS: dict[str, type[BaseModel]] = {"devices": DeviceEntry, "links": LinkEntry}
_BRANCHES = {"LikeProfiled", "tuple[str, ...]", *(f"literal['{word}']" for word in get_args(Literal["any"]))}
