"""Device maps: a plan as names of modules and devices, in the form of transformers and in one with ranges, and back.

The form of transformers names every module; ours may give layers as ranges:

    {"model.embed_tokens": "cuda:0", "model.layers.0-15": "cuda:0", "model.layers.16-31": "cuda:1", "lm_head": "cuda:1"}
"""

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipetune.bench.errors import ConfigError, PlanError
from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import Plan, StagePlan

DeviceMap = dict[str, str]

_LAYER = re.compile(r"(?P<prefix>.+)\.(?P<first>\d+)(?:-(?P<last>\d+))?")
_DEVICE = re.compile(r"(cpu|cuda)(?::([0-9]+))?|([0-9]+)")


def stage_names(plan: Plan, device_names: Sequence[str] = ()) -> tuple[str, ...]:
    """What each stage's device is called in a map: as given, else by its own name; ConfigError for too few names."""
    if not device_names:
        return tuple(stage.device for stage in plan.stages)
    if len(device_names) < len(plan.stages):
        raise ConfigError(
            f"device_names: the plan has {len(plan.stages)} stages and {len(device_names)} names are given: "
            f"{', '.join(device_names)}; name each stage's device"
        )
    return tuple(device_names[: len(plan.stages)])


def hf_map(shape: ModelShape, plan: Plan, device_names: Sequence[str] = ()) -> DeviceMap:
    """The complete map that `from_pretrained(device_map=…)` takes. CPU workers become `cpu`, since transformers refuses
    `cpu:0`. A head that shares the embedding's weights goes to the embedding's device: accelerate makes the two one
    tensor again after it has moved them, and a head elsewhere would meet its input on the wrong device."""
    names = ["cpu" if name.startswith("cpu") else name for name in stage_names(plan, device_names)]
    device_map = dict.fromkeys(shape.first_modules, names[0])
    for name, stage in zip(names, plan.stages, strict=True):
        for layer in range(stage.first_layer, stage.end_layer):
            device_map[f"{shape.layers_prefix}.{layer}"] = name
    return device_map | {last: names[0] if last in _tied_heads(shape) else names[-1] for last in shape.last_modules}


def ranges_map(shape: ModelShape, plan: Plan, device_names: Sequence[str] = ()) -> DeviceMap:
    """The map with ranges; devices keep their names, so that it reads back as the same stages."""
    names = stage_names(plan, device_names)
    device_map = dict.fromkeys(shape.first_modules, names[0])
    for name, stage in zip(names, plan.stages, strict=True):
        device_map[f"{shape.layers_prefix}.{ranges_of(range(stage.first_layer, stage.end_layer))}"] = name
    return device_map | dict.fromkeys(shape.last_modules, names[-1])


def _tied_heads(shape: ModelShape) -> tuple[str, ...]:
    """Modules beside the decoder that share the embedding's weights: `lm_head`, where it does."""
    root = shape.layers_prefix.partition(".")[0]
    return tuple(name for name in shape.last_modules if shape.tied and name.partition(".")[0] != root)


def read_device_map(path: Path) -> dict[str, Any]:
    """Reads a map from a JSON file; PlanError where it cannot be read or holds none, or a key is given twice."""

    def refuse_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if doubled := sorted({key for key in keys if keys.count(key) > 1}):
            raise PlanError(f"{path}: {', '.join(doubled)} is given twice; keep one")
        return dict(pairs)

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_doubled)
    except OSError as error:
        raise PlanError(f"{path}: cannot read the device map: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: the device map is not JSON: {error}") from None
    if not isinstance(value, dict) or not value:
        raise PlanError(
            f'{path}: a device map is a JSON object of module names and devices, as {{"lm_head": "cuda:0"}}'
        )
    return value


def plan_from_map(
    device_map: Mapping[str, Any], shape: ModelShape, *, micro_batch_size: int, place: str = "device map"
) -> Plan:
    """The plan that a map describes, in either form.

    The longest name that covers a module decides, as in transformers. Every layer must be covered, in stages of
    neighbouring layers; embedding, norm and head may be left out, and go with the first and the last layer. PlanError,
    whose message begins with `place`, for layers missing or doubled, unknown names or devices, or what is no pipeline.
    """
    devices = {name: device_of(value, name, place) for name, value in device_map.items()}
    devices = _by_own_names(devices, shape, place)
    exact, covering = _expand(devices, shape, place)
    layers = [f"{shape.layers_prefix}.{index}" for index in range(shape.num_layers)]
    placed = {name: _lookup(name, exact, covering) for name in (*shape.first_modules, *layers, *shape.last_modules)}
    if missing := [index for index, name in enumerate(layers) if placed[name] is None]:
        raise PlanError(
            f"{place}: layer {ranges_of(missing)} is missing ({shape.layers_prefix} has 0-{shape.num_layers - 1})"
        )
    stages: list[StagePlan] = []
    for device, group in itertools.groupby(range(shape.num_layers), key=lambda index: placed[layers[index]]):
        own = list(group)
        assert device is not None
        if any(stage.device == device for stage in stages):
            raise PlanError(
                f"{place}: {device} holds layers that are not neighbours: {ranges_of(own)} come back to it; "
                "a stage is one run of layers"
            )
        stages.append(StagePlan(device=device, first_layer=own[0], end_layer=own[-1] + 1))
    _check_ends(placed, shape, stages, place)
    try:
        return Plan(stages=tuple(stages), micro_batch_size=micro_batch_size)
    except ValueError as error:
        raise PlanError(f"{place}: {error}") from None


def _by_own_names(devices: dict[str, str], shape: ModelShape, place: str) -> dict[str, str]:
    """The map by the model's own names: older transformers and wrappers put others before them, and end them alike."""
    layers, ending = shape.layers_prefix, re.compile(r"[^.]*$")
    prefixes = dict.fromkeys(match["prefix"] for name in devices if (match := _LAYER.fullmatch(name)))
    if not prefixes or layers in prefixes:
        return devices
    alike = [prefix for prefix in prefixes if ending.findall(prefix)[0] == ending.findall(layers)[0]]
    if len(alike) != 1:
        theirs = ", ".join(f"{prefix}.N" for prefix in [*prefixes][:3])
        raise PlanError(
            f"{place}: its layers are {theirs}, unknown to {shape.architecture}; did you mean {layers}.N, or is it "
            "another model's map?"
        )
    own = {ending.findall(module)[0]: module for module in (*shape.first_modules, *shape.last_modules)}
    return {
        f"{layers}{name.removeprefix(alike[0])}"
        if name.startswith(f"{alike[0]}.")
        else own.get(ending.findall(name)[0], name): device
        for name, device in devices.items()
    }


def _expand(devices: Mapping[str, str], shape: ModelShape, place: str) -> tuple[dict[str, str], dict[str, str]]:
    """Splits names into modules placed by name, ranges written out, and wider names that cover several modules."""
    exact: dict[str, str] = {}
    covering: dict[str, str] = {}
    others = (*shape.first_modules, *shape.last_modules)
    unknown, doubled = [], []
    for name, device in devices.items():
        if (match := _LAYER.fullmatch(name)) and match["prefix"] == shape.layers_prefix:
            first, last = int(match["first"]), int(match["last"] or match["first"])
            if last < first:
                raise PlanError(f"{place}: {name!r} runs backwards; write {shape.layers_prefix}.{last}-{first}")
            if last >= shape.num_layers:
                unknown.append(f"{name!r} ({shape.layers_prefix} has 0-{shape.num_layers - 1})")
                continue
            for index in range(first, last + 1):
                layer = f"{shape.layers_prefix}.{index}"
                if layer in exact:
                    doubled.append(index)
                exact[layer] = device
        elif name in others:
            exact[name] = device
        elif name == "" or any(module.startswith(f"{name}.") for module in (*others, f"{shape.layers_prefix}.0")):
            covering[name] = device
        elif name.startswith(f"{shape.layers_prefix}."):
            raise PlanError(f"{place}: {name!r} lies inside a layer; layers are placed whole")
        elif not any(name.startswith(f"{module}.") for module in others):
            near = difflib.get_close_matches(name, [*others, f"{shape.layers_prefix}.0"], n=1, cutoff=0.4)
            unknown.append(repr(name) + (f" (did you mean {near[0]!r}?)" if near else ""))
    problems = []
    if doubled:
        problems.append(f"layer {ranges_of(doubled)} is given twice")
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        problems.append(f"unknown to {shape.architecture}: {', '.join(unknown[:3])}{more}")
    if problems:
        raise PlanError(f"{place}: {'; '.join(problems)}")
    return exact, covering


def _lookup(name: str, exact: Mapping[str, str], covering: Mapping[str, str]) -> str | None:
    if name in exact:
        return exact[name]
    wider = [key for key in covering if key == "" or name == key or name.startswith(f"{key}.")]
    return covering[max(wider, key=len)] if wider else None


def _check_ends(placed: Mapping[str, str | None], shape: ModelShape, stages: Sequence[StagePlan], place: str) -> None:
    """The embedding lies with the first layer, norm and head with the last; a tied head may lie with the embedding."""
    first, last = stages[0].device, stages[-1].device
    for module in shape.first_modules:
        # Rotary tables hold no weights, and every stage has its own.
        if placed[module] not in (None, first) and "rotary" not in module:
            raise PlanError(f"{place}: {module} is on {placed[module]}, and must be where layer 0 is, on {first}")
    for module in shape.last_modules:
        allowed = (None, last, first) if module in _tied_heads(shape) else (None, last)
        if placed[module] not in allowed and "rotary" not in module:
            raise PlanError(
                f"{place}: {module} is on {placed[module]}, and must be where layer {shape.num_layers - 1} is, "
                f"on {last}"
            )


def device_of(value: Any, name: str, place: str) -> str:
    """A map's value as a device: `0`, `"0"`, `"cuda"` and `"cuda:0"` are one; PlanError for what no stage runs on."""
    match = None if isinstance(value, bool) else _DEVICE.fullmatch(str(value))
    if not match:
        raise PlanError(
            f"{place}: {name!r} is on {value!r}; a stage runs on cpu:N or cuda:N, weights are not left elsewhere"
        )
    return f"{match[1] or 'cuda'}:{int(match[2] or match[3] or 0)}"


def ranges_of(indices: Iterable[int]) -> str:
    """`0-3, 7`."""
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(set(indices))), key=lambda entry: entry[1] - entry[0]):
        run = [index for _, index in group]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(parts)
