"""Devices described in a file: GPUs that are not here, other counts of them, unlike ones, and the links between them.

    devices:
      - {name: cuda:0-1, memory_gib: 80, tflops: 312, memory_gb_per_s: 2039, layer_overhead_us: 150}
      - {name: cuda:2-3, like: cuda:0, speed: 0.4, memory_gib: 24}
      - {name: cpu:0, like: {profile: profile.json, device: cpu:0}, speed: 1.5}
    links:
      - {between: [cuda:0-1], gb_per_s: 300, latency_us: 8}
      - {between: any, gb_per_s: 25, latency_us: 15}

`card: H100`, instead of these rates, takes them from `cards.yaml`; `2xH100,2xA10` in place of a file describes such
cards, over NVLink where neighbours of one name have it, else over PCIe 4.0.

Rates are those of one device in the model's dtype. `like` takes over what a device named earlier in the file, or one
of a measured profile, has; `speed` makes everything on it so many times as fast. Of the links that cover a pair, the
first one counts; two devices of one profile have the link that was measured there, unless the file says otherwise.
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from pipetune.bench.errors import ConfigError
from pipetune.bench.memory import ModelShape, TaskBytes
from pipetune.bench.profile import LinkProfile, Profile, TaskKind
from pipetune.bench.spec import Device, Value, device_kind, parse_devices
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.nominal import RATES, NominalCosts, Rates
from pipetune.tuner.planning.costs.profile_cache import read_profile
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
    card: str | None = None
    """Name in `cards.yaml`, for what is not said here."""
    memory_gib: float | None = Field(default=None, gt=0, le=1e9)
    tflops: float | None = Field(default=None, gt=0, le=1e9)
    """10¹² floating-point operations a second, in the model's dtype."""
    memory_gb_per_s: float | None = Field(default=None, gt=0, le=1e9)
    """10⁹ bytes of weights and KV cache read a second."""
    layer_overhead_us: float | None = Field(default=None, ge=0, le=1e9)
    """What a layer takes however little it has to do; None: as is usual for its kind of device."""
    like: Device | LikeProfiled | None = None
    speed: float = Field(default=1.0, gt=0, le=1e9)


class LinkEntry(Value):
    """Messages within one group of devices, or between several groups, in either direction."""

    between: Literal["any"] | tuple[str, ...]
    """Devices or ranges: of one entry, all pairs within it; of several, all pairs across them."""
    gb_per_s: float = Field(gt=0, le=1e9)
    """10⁹ bytes a second, in one direction."""
    latency_us: float = Field(ge=0, le=1e9)

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
    profiled_as: str = ""
    """Which of the profile's devices it is like."""


@dataclass(frozen=True, kw_only=True)
class DescribedDevices:
    """What a file says, taken apart."""

    place: str
    about: str | None
    devices: tuple[DescribedDevice, ...]
    links: Mapping[tuple[str, str], LinkProfile]
    """Every ordered pair."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the devices described, in their order."""
        return tuple(device.name for device in self.devices)

    @property
    def task_bytes(self) -> TaskBytes | None:
        """What tasks were seen to take on a GPU, by a profile that some device is like."""
        profiles = (device.profile for device in self.devices if device.profile is not None)
        return next((one.shape.task_bytes for one in profiles if one.shape.task_bytes is not None), None)

    def device_bytes(self, names: Sequence[str]) -> dict[str, int]:
        """Memory of these devices; ConfigError where one of them is not described."""
        sizes = {device.name: device.memory_bytes for device in self.devices}
        for name in names:
            if name not in sizes:
                raise ConfigError(
                    f"devices: {name} is not described in {self.place}, which has {', '.join(sizes)}; leave --devices "
                    "out to use all of them, or describe it there"
                )
        return {name: sizes[name] for name in names}

    def costs(self, shape: ModelShape, *, scores: bool = False) -> "DescribedCosts":
        """What tasks of a model take on these devices; ConfigError where one is like one of another model's profile."""
        nominal = NominalCosts(shape, {one.name: one.rates for one in self.devices if one.rates is not None}, scores)
        sources: dict[str, tuple[Costs, str, float]] = {}
        for device in self.devices:
            if device.profile is None:
                sources[device.name] = (nominal, device.name, device.speed)
                continue
            if not device.profile.shape.is_alike(shape):
                raise ConfigError(
                    f"{self.place}: {device.name} is like {device.profiled_as} of a profile of "
                    f"{device.profile.model.name} in {device.profile.model.dtype}, and another model is planned for; "
                    "give its own profile (pipetune profile), or tflops and memory_gb_per_s"
                )
            sources[device.name] = (ProfiledCosts(device.profile), device.profiled_as, device.speed)
        return DescribedCosts(sources, self.links)


@dataclass(frozen=True)
class DescribedCosts:
    """Costs on described devices: each device's own costs, its name there and its speed, and the file's links."""

    sources: Mapping[str, tuple[Costs, str, float]]
    links: Mapping[tuple[str, str], LinkProfile]

    def layers_s(self, device: str, kind: TaskKind) -> Floats:
        """See `Costs`."""
        costs, known_as, speed = self.sources[device]
        return costs.layers_s(known_as, kind) / speed

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        """See `Costs`."""
        costs, known_as, speed = self.sources[device]
        return costs.ends_s(known_as, kind, is_first=is_first, is_last=is_last) / speed

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        """See `Costs`."""
        return 0.0 if source == target else self.links[source, target].seconds(num_bytes)


def read_devices(path: Path) -> DescribedDevices:
    """Reads a file of devices, or its stead: `2xH100,2xA10`. ConfigError names file, key and way out of what cannot be
    read, an unknown key, a value out of range, a device that is described by halves or twice, and a link that is
    lacking."""
    entry = _parse(path) if path.exists() or not _CARDS.fullmatch(str(path)) else _of_cards(str(path))
    devices: dict[str, DescribedDevice] = {}
    profiles: dict[Path, Profile] = {}
    for index, one in enumerate(entry.devices):
        place = f"{path}: devices[{index}]"
        for name in _names(one.name, f"{place}.name"):
            if name in devices:
                raise ConfigError(f"{place}.name: {name} is described twice; keep one")
            devices[name] = _device(name, one, devices, profiles, place, path.parent)
    return DescribedDevices(
        place=str(path), about=entry.about, devices=tuple(devices.values()), links=_links(entry.links, devices, path)
    )


_CARDS = re.compile(r"\d+x[^,/]+(,\d+x[^,/]+)*")
_PCIE = {"gb_per_s": 31.5, "latency_us": 20}


def _card(name: str, place: str) -> dict[str, float]:
    """What is kept of a card, by its name."""
    known = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))
    if name not in known:
        raise ConfigError(f"{place}: {name!r} is no card that is known here; there are {', '.join(known)}")
    return dict(known[name])


def _of_cards(text: str) -> DevicesEntry:
    """Cards by name, `2xH100,2xA10`: over NVLink within a name that has it, else over PCIe 4.0 x16."""
    devices, links, first = [], [], 0
    for count, card in (part.split("x", 1) for part in text.split(",")):
        end = first + int(count)
        devices.append({"name": f"cuda:{first}-{end - 1}", "card": card})
        if (rate := _card(card, text).get("nvlink_gb_per_s")) and end - first > 1:
            links.append({"between": [f"cuda:{first}-{end - 1}"], "gb_per_s": rate, "latency_us": 10})
        first = end
    links.append({"between": "any", **_PCIE})
    return DevicesEntry.model_validate({"about": "nominal peaks of datasheets", "devices": devices, "links": links})


def _device(
    name: str,
    entry: DeviceEntry,
    known: Mapping[str, DescribedDevice],
    profiles: dict[Path, Profile],
    place: str,
    folder: Path,
) -> DescribedDevice:
    if entry.card is not None:
        usual = _card(entry.card, f"{place}.card")
        open_keys = [key for key in usual if key in DeviceEntry.model_fields and getattr(entry, key) is None]
        entry = entry.model_copy(update={key: usual[key] for key in open_keys})
    if isinstance(entry.like, LikeProfiled):
        base = _like_profiled(name, entry.like, profiles, place, folder)
    elif entry.like is not None:
        if entry.like not in known:
            above = f"there are {', '.join(known)} above it" if known else "it is the first"
            raise ConfigError(f"{place}.like: {entry.like} is not described above; {above}")
        base = replace(known[entry.like], name=name)
    else:
        if lacking := [key for key in ("memory_gib", "tflops", "memory_gb_per_s") if getattr(entry, key) is None]:
            raise ConfigError(f"{place}: {name} has no {' and no '.join(lacking)}; give it, or like: another device")
        base = DescribedDevice(name=name, memory_bytes=0, speed=1.0, rates=RATES[device_kind(name)])
    if base.profile is not None:
        given = [key for key in ("tflops", "memory_gb_per_s", "layer_overhead_us") if getattr(entry, key) is not None]
        if given:
            raise ConfigError(f"{place}.{given[0]}: {name} takes its times from a profile; scale them by speed instead")
    return replace(
        base,
        memory_bytes=base.memory_bytes if entry.memory_gib is None else int(entry.memory_gib * _GIB),
        speed=base.speed * entry.speed,
        rates=None if base.rates is None else _changed(base.rates, entry),
    )


def _like_profiled(
    name: str, like: LikeProfiled, profiles: dict[Path, Profile], place: str, folder: Path
) -> DescribedDevice:
    path = folder / like.profile
    if path not in profiles:
        try:
            profiles[path] = read_profile(path)
        except ConfigError as error:
            raise ConfigError(f"{place}.like.profile: {error}") from None
    profile = profiles[path]
    there = [one.device for one in profile.devices]
    if like.device not in there:
        raise ConfigError(f"{place}.like.device: {like.device} is not in {path}, which has {', '.join(there)}")
    memory, own = profile.device_bytes[like.device], like.device
    return DescribedDevice(name=name, memory_bytes=memory, speed=1.0, rates=None, profile=profile, profiled_as=own)


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
) -> dict[tuple[str, str], LinkProfile]:
    links: dict[tuple[str, str], LinkProfile] = {}
    for index, entry in enumerate(entries):
        rates = {"latency_s": entry.latency_us * _MICRO, "bytes_per_s": entry.gb_per_s * _GB}
        for source, target in _pairs(entry, devices, f"{path}: links[{index}].between"):
            links.setdefault((source, target), LinkProfile(source=source, target=target, **rates))
    for source, target in itertools.permutations(devices, 2):
        if (link := links.get((source, target)) or _measured(devices[source], devices[target])) is None:
            raise ConfigError(
                f"{path}: links: nothing says what lies between {source} and {target}; add "
                f"{{between: [{source}, {target}], gb_per_s: …, latency_us: …}}, or one with between: any"
            )
        links[source, target] = link
    return links


def _pairs(entry: LinkEntry, devices: Mapping[str, DescribedDevice], place: str) -> Iterator[tuple[str, str]]:
    groups = [tuple(devices)] if entry.between == "any" else [_names(text, place) for text in entry.between]
    for name in itertools.chain.from_iterable(groups):
        if name not in devices:
            raise ConfigError(f"{place}: {name} is not among the devices {', '.join(devices)}")
    if len(groups) == 1:
        yield from itertools.permutations(groups[0], 2)
        return
    for one, other in itertools.permutations(groups, 2):
        yield from ((a, b) for a in one for b in other if a != b)


def _measured(source: DescribedDevice, target: DescribedDevice) -> LinkProfile | None:
    """The link that a profile of both devices has."""
    if source.profile is None or source.profile is not target.profile:
        return None
    ends = (source.profiled_as, target.profiled_as)
    return next((link for link in source.profile.links if (link.source, link.target) == ends), None)


def _names(text: str, place: str) -> tuple[str, ...]:
    try:
        names = parse_devices(text)
    except ValueError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix('devices: ')}") from None
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{place}: {doubled[0]} is named twice")
    return names


def _parse(path: Path) -> DevicesEntry:
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the devices: {why}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
    # A branch of a union is no key.
    parts = [part for part in problem["loc"] if part not in _BRANCHES]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    if problem["type"] == "missing":
        return f"{key}: it is missing"
    if problem["type"] == "extra_forbidden":
        section = "like" if "LikeProfiled" in problem["loc"] else str(parts[0]) if len(parts) > 1 else ""
        keys = list(_SECTIONS[section].model_fields)
        near = difflib.get_close_matches(str(parts[-1]), keys, n=1, cutoff=0.5)
        return f"{key}: unknown key; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(keys)}")
    message, given = str(problem["msg"]).removeprefix("Value error, "), problem["input"]
    return f"{key}: {message}" + (f" (given: {given})" if isinstance(given, str | int | float) else "")


_SECTIONS: dict[str, type[BaseModel]] = {
    "": DevicesEntry,
    "devices": DeviceEntry,
    "links": LinkEntry,
    "like": LikeProfiled,
}
_BRANCHES = {"LikeProfiled", "tuple[str, ...]", *(f"literal['{word}']" for word in get_args(Literal["any"]))}
