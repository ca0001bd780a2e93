"""What a smaller fleet tells of a larger one: what its devices take, and how far predictions made so may be off."""

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence

from scipy.special import stdtrit

from pipetune.bench.errors import ConfigError
from pipetune.bench.memory import ModelShape
from pipetune.bench.profile import LayerTimes, LinkProfile, Profile
from pipetune.bench.spec import ModelSpec, device_kind
from pipetune.tuner.planning.calibration.observation import Observation
from pipetune.tuner.planning.costs.described import DescribedDevice, DescribedDevices
from pipetune.tuner.planning.costs.nominal import RATES

LEVEL = 0.95
PRIOR_SD, PRIOR_STEPS = 0.15, 3.0
"""Log deviation of a prediction for a larger fleet before any was tried, and what that counts in steps; chosen."""
FEWER_LAYERS_SD = 2 * PRIOR_SD
"""The same where the smaller fleet ran a model of fewer layers: no run of it corrects the others; chosen."""
_OF_DEPTH = {"num_parameters", "layers", "forbidden_cuts", "task_bytes", "max_positions", "checkpoint_bytes"}
"""What models of one kind may differ in when one has fewer layers."""
_HIDDEN_STATES_BYTES = 1 << 20
"""A message by which links are told slow from fast."""


def deepened(profile: Profile, model: ModelSpec, shape: ModelShape) -> Profile:
    """A profile of a model with fewer layers as one of the whole: each layer takes what one of its sizes and kind took;
    ConfigError where they differ in more than the number of layers."""
    small = profile.shape
    like = {layer: place for place, layer in reversed(list(enumerate(small.layers)))}
    one, other = (shown.model_dump(exclude=_OF_DEPTH) for shown in (small, shape))
    differing = [f"{name} {one[name]} and {other[name]}" for name in one if one[name] != other[name]]
    differing += [f"no layer like its layer {place}" for place, layer in enumerate(shape.layers) if layer not in like]
    if differing:
        raise ConfigError(
            f"--first-model: {profile.model.name} is not {model.name} with fewer layers: {differing[0]}; lower the "
            "number of layers in a copy of its config.json alone, and keep a layer of each kind"
        )
    places = [like[layer] for layer in shape.layers]
    devices = []
    for device in profile.devices:
        groups = ((tuple(n for n, at in enumerate(places) if at in one.layers), one.times) for one in device.layers)
        layers = tuple(LayerTimes(layers=chosen, times=times) for chosen, times in groups if chosen)
        devices.append(device.model_copy(update={"layers": layers}))
    return profile.model_copy(update={"model": model, "shape": shape, "devices": tuple(devices)})


def larger_fleet(
    profile: Profile | None, smaller: Sequence[str], larger: Mapping[str, int], *, cores: int
) -> DescribedDevices:
    """Devices that each are like the one of their name, or else of their kind, in a smaller fleet of that profile;
    without one, at nominal rates. `larger` holds bytes of memory by name.

    CPU workers share the machine's cores: among more of them each has less of these, and is as much slower. A link that
    was not timed is as slow as the slowest that was; where none was, it is nominal. ConfigError where a kind of device
    is not in the smaller fleet.
    """
    devices = []
    for name, size in larger.items():
        if not (alike := [one for one in smaller if device_kind(one) == device_kind(name)]):
            raise ConfigError(
                f"fleet {','.join(larger)}: {name} is like none of the smaller fleet {','.join(smaller)}; begin with a "
                "fleet that has a device of each kind"
            )
        on_cpu = device_kind(name) == "cpu"
        devices.append(
            DescribedDevice(
                name=name,
                memory_bytes=size,
                speed=_cores_each(larger, cores) / _cores_each(smaller, cores) if on_cpu else 1.0,
                rates=RATES[device_kind(name)] if profile is None else None,
                profile=profile,
                profiled_as=name if name in alike else alike[0],
            )
        )
    timed = {(link.source, link.target): link for link in profile.links} if profile is not None else {}
    slowest = max(timed.values(), key=lambda link: link.seconds(_HIDDEN_STATES_BYTES), default=None)
    links = {}
    for source, target in itertools.permutations(larger, 2):
        rates = RATES[device_kind(target)]
        links[source, target] = timed.get((source, target)) or LinkProfile(
            source=source,
            target=target,
            latency_s=slowest.latency_s if slowest else rates.hop_latency_s,
            bytes_per_s=slowest.bytes_per_s if slowest else rates.hop_bytes_per_s,
        )
    about = "nominal rates" if profile is None else f"the profile of {','.join(smaller)}, {profile.measured_at}"
    about += "".join(f", doubtful: {text}" for text in (profile.disturbances if profile is not None else ()))
    if len(larger) > len(smaller) and (slower := min(one.speed for one in devices)) < 1:
        about += f", each CPU worker {slower:.2g} times as fast: {len(larger)} of them share {cores} cores"
    return DescribedDevices(place=f"what {','.join(smaller)} showed", about=about, devices=tuple(devices), links=links)


def slowed(
    observations: Sequence[Observation], smaller: Sequence[str], larger: Sequence[str], *, cores: int
) -> list[Observation]:
    """What a smaller fleet's runs would have shown with the cores that each CPU worker has in a larger one: its tasks
    and gaps, and not what it came to."""
    times = _cores_each(smaller, cores) / _cores_each(larger, cores)
    found = []
    for one in observations:
        on_cpu = [device_kind(device) == "cpu" for device in one.effective.plan.devices]
        tasks = (
            task.model_copy(update={"seconds": task.seconds * times}) if on_cpu[task.stage] else task
            for task in one.tasks
        )
        gaps = (gap and gap * times if slow else gap for gap, slow in zip(one.gap_s, on_cpu, strict=True))
        found.append(one.model_copy(update={"tasks": tuple(tasks), "gap_s": tuple(gaps)}))
    return found


def _cores_each(fleet: Collection[str], cores: int) -> float:
    """Cores that each of so many workers computes with while all do: a whole number, but where there are fewer."""
    workers = len(fleet)
    return float(cores // workers) if workers <= cores else cores / workers


def half_width(steps: Sequence[Sequence[float]], prior_sd: float = PRIOR_SD) -> float:
    """Half of the interval, in logarithms, that holds a measured value around its prediction in 95 of 100 fleets.

    By Student's t with the variance of what was missed so far, over a scaled inverse chi-squared prior (Gelman et al.
    2013, Bayesian Data Analysis, section 2.6). `steps` has the logarithms of measured over predicted of the plans of
    each larger fleet tried, at least one.
    """
    between = PRIOR_STEPS * prior_sd**2 + sum(statistics.fmean(misses) ** 2 for misses in steps)
    within = [miss - statistics.fmean(misses) for misses in steps for miss in misses]
    freedom = PRIOR_STEPS + len(steps)
    variance = between / freedom + (statistics.fmean(one**2 for one in within) if within else 0.0)
    return float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(variance)
