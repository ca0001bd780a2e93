"""`auto_split_model`: a balanced device map for a model at hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipetune.bench.errors import PlanError
from pipetune.bench.fleet import fleet
from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import Plan, Workload, device_kind
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.partition.device_map import DeviceMap, hf_map, ranges_map
from pipetune.tuner.planning.partition.splits import best_partitions
from pipetune.tuner.planning.partition.stage_table import near_best
from pipetune.tuner.planning.simulation.model import CostModel

_PROMPT_TOKENS, _OUTPUT_TOKENS, _MICRO_BATCH = 512, 128, 8
"""The workload that stages are balanced for when none is given: prefill and decode weigh about the same."""


def auto_split_model(
    model: Any,
    num_devices: int,
    max_per_device_memory: float = 0.8,
    *,
    devices: Sequence[str] | None = None,
    device_bytes: Sequence[int] | None = None,
    ranges: bool = False,
) -> DeviceMap:
    """Splits a model over devices, balanced by predicted time under a memory cap.

    Args:
        model: a Hugging Face causal LM; on the meta device is enough.
        num_devices: how many stages to make.
        max_per_device_memory: share of each device's memory that weights may take, up to 1.0.
        devices: names to use; by default the machine's devices in order, as `bench` names them.
        device_bytes: memory of each device; by default what the machine has.
        ranges: name layers as `model.layers.0-15`, and keep names such as `cpu:1`, which transformers takes neither of.

    Returns:
        A map that `from_pretrained(device_map=…)` takes.

    Raises:
        ModelError: the model's layers are not found.
        PlanError: more devices than layers, or no split keeps the cap; says what is missing.
    """
    if not 0.0 < max_per_device_memory <= 1.0:
        raise PlanError(f"max_per_device_memory={max_per_device_memory}: must be a share above 0 and up to 1")
    # Whoever holds a model has loaded torch; planning by itself does not.
    from pipetune.bench.models.describe import read_shape

    shape = read_shape(model, next(model.parameters()).element_size())
    if not 1 <= num_devices <= shape.num_layers:
        raise PlanError(f"num_devices={num_devices}: {shape.architecture} has {shape.num_layers} layers to give away")
    most = shape.num_layers - len(shape.forbidden_cuts)
    if num_devices > most:
        raise PlanError(f"num_devices={num_devices}: {shape.architecture} can be cut into {most} stages at most")
    names, sizes = _devices(num_devices, devices, device_bytes)
    caps = [int(max_per_device_memory * size) for size in sizes]
    weights = _weights(shape)
    fill = np.array([weights / max(cap, 1) for cap in caps])

    lens = [_PROMPT_TOKENS] * (_MICRO_BATCH * 2 * num_devices)
    workload = Workload(num_prompts=len(lens), input_len=_PROMPT_TOKENS, output_len=_OUTPUT_TOKENS)
    cost = CostModel.of_workload(shape, workload, lens)
    kinds = cost.kinds(Plan.from_layer_counts((shape.num_layers,), names, _MICRO_BATCH))
    if not (found := near_best(cost, kinds, names, fill)):
        nearest = best_partitions(fill, shape.forbidden_cuts)[0]
        ends = list(itertools.accumulate(nearest))
        needed = sum(int(weights[end - count, end]) for count, end in zip(nearest, ends, strict=True))
        raise PlanError(
            f"max_per_device_memory={max_per_device_memory}: the weights take {needed / 2**20:.0f} MiB, and no split "
            f"over {num_devices} devices stays below their caps of "
            f"{', '.join(f'{cap / 2**20:.0f}' for cap in caps)} MiB; take more devices or a smaller dtype"
        )
    plans = [Plan.from_layer_counts(partition, names, _MICRO_BATCH) for partition in found]
    predictions = cost.predict_many([(plan, None) for plan in plans])
    best, _ = min(zip(plans, predictions, strict=True), key=lambda entry: entry[1].duration_s)
    return (ranges_map if ranges else hf_map)(shape, best)


def _weights(shape: ModelShape) -> Floats:
    """`[first, end]`: bytes of weights of a stage of these layers, a tied embedding on both ends."""
    before = np.concatenate([[0.0], np.cumsum([layer.weight_bytes for layer in shape.layers])])
    weights: Floats = before[np.newaxis, :] - before[:, np.newaxis] + shape.other_bytes
    if shape.embedding_on_every_stage:
        weights += shape.embedding_bytes
    else:
        weights[0, :] += shape.embedding_bytes
        weights[1:, -1] += shape.embedding_bytes if shape.tied else 0
    weights[:, -1] += shape.head_bytes
    return weights


def _devices(
    count: int, devices: Sequence[str] | None, device_bytes: Sequence[int] | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if devices is None:
        kind = device_kind(fleet.available_devices()[0])
        devices = [f"{kind}:{index}" for index in range(count)]
    if device_bytes is None:
        try:
            sizes = fleet.device_bytes(devices)
        except ValueError as error:
            raise PlanError(f"{error}; give device_bytes to split for other machines") from None
        device_bytes = [sizes[device] for device in devices]
    if len(devices) < count or len(device_bytes) < count:
        raise PlanError(f"num_devices={count}: as many devices and sizes are needed, not {len(devices)}")
    return tuple(devices[:count]), tuple(device_bytes[:count])
