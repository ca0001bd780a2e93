"""What a model consists of, where it can be cut, and what of it would fit: all from its shape, nothing is run."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from pipetune.bench.memory import LayerShape, ModelShape, resolve, stage_bytes
from pipetune.bench.record import Failure
from pipetune.bench.spec import EffectivePlan, Plan, Value, Workload, device_kind
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.partition.device_map import ranges_of
from pipetune.tuner.planning.partition.splits import Partition, Table, best_partitions
from pipetune.tuner.planning.partition.stage_table import near_best, stage_needs
from pipetune.tuner.planning.simulation.model import CostModel


class LayerGroup(Value):
    """Layers that cost the same."""

    indices: tuple[int, ...]
    kind: str
    weight_bytes: int
    """Bytes of weights of each layer; the other fields too are of one layer."""
    active_params: int
    kv_bytes_per_token: int
    state_bytes: int = 0


class StageNeed(Value):
    """What one stage takes, and what its device has."""

    device: str
    first_layer: int
    end_layer: int
    weight_bytes: int
    kv_bytes_per_micro_batch: int
    activation_bytes: int
    cap_bytes: int
    in_flight: int | None
    """Micro-batches that the cap has room for, 0 if none; None where a micro-batch takes no room."""


class Fit(Value):
    """A split over the devices given, and what of the workload it can hold at once."""

    layer_counts: tuple[int, ...]
    micro_batch_size: int
    whole_size: int
    """What was wanted of `micro_batch_size`, which is less where that does not fit."""
    memory_fraction: float
    max_memory_bytes: int | None = None
    prompt_len: int
    """Longest prompt, tokens."""
    output_len: int
    num_micro_batches: int
    in_flight: int
    """Micro-batches resident at once that the memory caps allow; 0 where not even one fits."""
    stages: tuple[StageNeed, ...]


class ModelFit(Value):
    """All that `doctor` says of a model."""

    shape: ModelShape
    groups: tuple[LayerGroup, ...]
    cuts: tuple[int, ...]
    """Layers before which it may be cut."""
    fit: Fit
    refused: tuple[str, ...]
    """What `tune` and `bench` would refuse of this model, and why."""
    remedy: str | None = Field(serialization_alias="way_out")
    """Where not even one micro-batch fits: what would help."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """A workload on devices; `prompt_lens` in tokens."""

    workload: Workload
    prompt_lens: tuple[int, ...]
    devices: tuple[str, ...]
    device_bytes: dict[str, int]
    micro_batch_size: int | None = None
    """None takes as many micro-batches as there are stages, or smaller ones if those do not fit."""
    memory_fraction: float = 0.9
    max_memory_bytes: int | None = None
    costs: Costs | None = None
    """None takes nominal ones."""

    @property
    def caps(self) -> dict[str, Any]:
        """What a stage may take of its device, as plans take it."""
        return {"memory_fraction": self.memory_fraction, "max_memory_bytes": self.max_memory_bytes}

    @property
    def lens(self) -> dict[str, int]:
        """What the size of a stage depends on, as `stage_bytes` takes it."""
        return {"prompt_len": max(self.prompt_lens), "output_len": self.workload.generated_len}

    def resolve(self, shape: ModelShape, plan: Plan) -> EffectivePlan | Failure:
        """The plan with its micro-batches in flight, or why it cannot run."""
        return resolve(shape, plan, num_prompts=self.workload.num_prompts, **self.lens, device_bytes=self.device_bytes)


def fit_model(shape: ModelShape, wanted: Wanted) -> ModelFit:
    """Describes a model and what of it would fit."""
    cuts = tuple(sorted(set(range(1, shape.num_layers)) - set(shape.forbidden_cuts)))
    fit = _fit(shape, wanted, min(len(wanted.devices), len(cuts) + 1))
    return ModelFit(
        shape=shape,
        groups=group_layers(shape.layers),
        cuts=cuts,
        fit=fit,
        refused=tuple(_refusals(shape, wanted, cuts)),
        remedy=None if fit.in_flight else _remedy(shape, wanted, cuts, fit),
    )


def group_layers(layers: Sequence[LayerShape]) -> tuple[LayerGroup, ...]:
    """Equal layers together, in the order of their first ones."""
    members: dict[LayerShape, list[int]] = {}
    for index, layer in enumerate(layers):
        members.setdefault(layer, []).append(index)
    return tuple(LayerGroup(indices=tuple(indices), **layer.model_dump()) for layer, indices in members.items())


def ranges_text(indices: Sequence[int]) -> str:
    """`0-4, 6-10, 12`; with one step between all of them `1, 3 … 41`."""
    steps = {later - earlier for earlier, later in itertools.pairwise(indices)}
    if len(steps) == 1 and steps != {1} and len(indices) > 2:
        return f"{indices[0]}, {indices[1]} … {indices[-1]}"
    return ranges_of(indices)


def _fit(shape: ModelShape, wanted: Wanted, num_stages: int) -> Fit:
    """The best split by predicted time, at the micro-batch size asked for or else at the largest that fits."""
    whole = size = wanted.micro_batch_size or math.ceil(wanted.workload.num_prompts / num_stages)
    fit = _fit_at(shape, wanted, num_stages, size)
    while not fit.in_flight and wanted.micro_batch_size is None and size > 1:
        size //= 2
        fit = _fit_at(shape, wanted, num_stages, size)
    return fit.model_copy(update={"whole_size": whole})


def _fit_at(shape: ModelShape, wanted: Wanted, num_stages: int, size: int) -> Fit:
    cost = CostModel.of_workload(shape, wanted.workload, wanted.prompt_lens, wanted.costs)

    def plan_of(partition: Partition) -> Plan:
        return Plan.from_layer_counts(partition, wanted.devices, size, **wanted.caps)

    def duration_s(plan: Plan) -> float:
        resolved = wanted.resolve(shape, plan)
        return cost.predict(plan, resolved.in_flight).duration_s if isinstance(resolved, EffectivePlan) else math.inf

    whole = plan_of((shape.num_layers,))
    devices = wanted.devices[:num_stages]
    fill = _fill(shape, wanted, devices, whole)
    found = near_best(cost, cost.kinds(whole), devices, fill)
    # What leaves most room lets most micro-batches be in flight, and comes nearest where nothing fits.
    plan = min(map(plan_of, (*found, *best_partitions(fill, shape.forbidden_cuts))), key=duration_s)
    resolved = wanted.resolve(shape, plan)
    return Fit(
        layer_counts=plan.layer_counts,
        micro_batch_size=size,
        whole_size=size,
        **wanted.caps,
        **wanted.lens,
        num_micro_batches=math.ceil(wanted.workload.num_prompts / size),
        in_flight=resolved.in_flight if isinstance(resolved, EffectivePlan) else 0,
        stages=tuple(_stage_need(shape, plan, index, wanted) for index in range(len(plan.stages))),
    )


def _fill(shape: ModelShape, wanted: Wanted, devices: Sequence[str], whole: Plan) -> Table:
    """`[device, first, end]`, share of its cap that a stage takes with one micro-batch in flight."""
    needs = {
        kind: stage_needs(shape, whole, f"{kind}:0", **wanted.lens) for kind in dict.fromkeys(map(device_kind, devices))
    }
    caps = [max(1, whole.stages[0].cap_bytes(wanted.device_bytes[device])) for device in devices]
    return np.array([needs[device_kind(device)] / cap for device, cap in zip(devices, caps, strict=True)])


def _stage_need(shape: ModelShape, plan: Plan, index: int, wanted: Wanted) -> StageNeed:
    stage = plan.stages[index]
    need = stage_bytes(shape, plan, index, **wanted.lens)
    cap = stage.cap_bytes(wanted.device_bytes[stage.device])
    room = cap - need.weights - need.activations
    in_flight = max(0, room // need.kv_per_slot) if need.kv_per_slot else (None if room >= 0 else 0)
    return StageNeed(
        device=stage.device,
        first_layer=stage.first_layer,
        end_layer=stage.end_layer,
        weight_bytes=need.weights,
        kv_bytes_per_micro_batch=need.kv_per_slot,
        activation_bytes=need.activations,
        cap_bytes=cap,
        in_flight=in_flight,
    )


def _refusals(shape: ModelShape, wanted: Wanted, cuts: tuple[int, ...]) -> list[str]:
    refused = []
    if shape.forbidden_cuts:
        refused.append(
            f"cuts before layers {ranges_text(sorted(set(shape.forbidden_cuts)))}: "
            "there a layer uses again what an earlier one stored"
        )
    if shape.recurrent:
        refused.append(
            "prefill in smaller pieces or chunks than a micro-batch: layers keep a state for whole micro-batches"
        )
    if len(wanted.devices) > len(cuts) + 1:
        refused.append(f"more than {len(cuts) + 1} stages: there are no more places to cut")
    return refused


def _remedy(shape: ModelShape, wanted: Wanted, cuts: tuple[int, ...], fit: Fit) -> str:
    """What would let it fit: the first of smaller micro-batches, half precision and more devices that does."""
    size = fit.micro_batch_size
    while size > 1:
        size //= 2
        if _fit_at(shape, wanted, len(fit.stages), size).in_flight:
            return f"micro-batches of {size} would fit"
    helps = []
    if shape.dtype_bytes == 4:
        half = _fit_at(_halved(shape), wanted, len(fit.stages), 1)
        verb = "would fit" if half.in_flight else "is not enough, though it halves the need"
        helps.append(f"--dtype bfloat16 {verb}")
    # The largest device is what one would get more of.
    largest = max(wanted.device_bytes.values())
    if (count := _fewest_devices(shape, wanted, cuts, largest)) is None:
        helps.append("it needs larger devices: not even a layer on each of them would fit")
    else:
        helps.append(f"{count} devices of {largest / 2**30:.1f} GiB would hold it")
    return "; ".join(helps)


def _fewest_devices(shape: ModelShape, wanted: Wanted, cuts: tuple[int, ...], device_bytes: int) -> int | None:
    """How many equal devices hold the model with micro-batches of one row: each takes as many layers as it can."""
    device = wanted.devices[0]
    plan = Plan.from_layer_counts((shape.num_layers,), (device,), 1, **wanted.caps)
    cap_bytes = plan.stages[0].cap_bytes(device_bytes)
    needs = stage_needs(shape, plan, device, **wanted.lens)
    count = first = 0
    while first < shape.num_layers:
        fitting = [end for end in (*cuts, shape.num_layers) if end > first and needs[first, end] <= cap_bytes]
        if not fitting:
            return None
        count, first = count + 1, fitting[-1]
    return count


def _halved(shape: ModelShape) -> ModelShape:
    """The shape in a dtype of half the bytes."""
    layers = tuple(
        layer.model_copy(
            update={"weight_bytes": layer.weight_bytes // 2, "kv_bytes_per_token": layer.kv_bytes_per_token // 2}
        )
        for layer in shape.layers
    )
    sizes = ("embedding_bytes", "head_bytes", "other_bytes", "dtype_bytes")
    return shape.model_copy(update={"layers": layers} | {name: getattr(shape, name) // 2 for name in sizes})
