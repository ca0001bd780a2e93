"""`auto_split_model`: a balanced device map for a model at hand, read off its modules without importing torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pipetune.bench.cuts import embeds_in_layers, forbidden_cuts
from pipetune.bench.errors import ModelError, PlanError
from pipetune.bench.memory import LayerShape, ModelShape
from pipetune.bench.spec import Plan, Workload, device_kind
from pipetune.tuner.planning.partition.device_map import DeviceMap, seed_map
from pipetune.tuner.planning.partition.in_order import near_best
from pipetune.tuner.planning.partition.splits import best_partitions
from pipetune.tuner.planning.partition.stage_table import Matrix
from pipetune.tuner.planning.simulation.model import CostModel

_FIRST = re.compile(r"emb|wte|wpe|rotary|project_in|drop|per_layer")
"""Modules inside the decoder that run before the layers, by name; all others run behind them."""
_PROMPT_TOKENS, _OUTPUT_TOKENS, _MICRO_BATCH = 512, 128, 8
"""The workload that stages are balanced for when none is given: prefill and decode weigh about the same."""


def auto_split_model(
    model: Any,
    num_devices: int,
    max_per_device_memory: float = 0.8,
    *,
    devices: Sequence[str] | None = None,
    device_bytes: Sequence[int] | None = None,
) -> DeviceMap:
    """Splits a model over devices, balanced by predicted time under a memory cap.

    Args:
        model: a Hugging Face causal LM; on the meta device is enough.
        num_devices: how many stages to make.
        max_per_device_memory: share of each device's memory that weights may take, up to 1.0.
        devices: names to use; by default the machine's devices in order, as `bench` names them.
        device_bytes: memory of each device; by default what the machine has.

    Returns:
        A map with ranges: `{"model.embed_tokens": "cuda:0", "model.layers.0-15": "cuda:0", …, "lm_head": "cuda:1"}`.

    Raises:
        ModelError: the model's layers are not found.
        PlanError: more devices than layers, or no split keeps the cap; says what is missing.
    """
    if not 0.0 < max_per_device_memory <= 1.0:
        raise PlanError(f"max_per_device_memory={max_per_device_memory}: must be a share above 0 and up to 1")
    shape = read_shape(model)
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
    found = near_best(cost, kinds, names, fill)
    if not found:
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
    return seed_map(shape, best)


def read_shape(model: Any) -> ModelShape:
    """What planning must know of a model, from `named_modules()`, `parameters()` and `config` alone.

    Raises:
        ModelError: there is no list of as many layers as the config says.
    """
    config = model.config.get_text_config(decoder=True)
    modules = dict(model.named_modules())
    prefix = _find_layers(modules, getattr(config, "num_hidden_layers", None), type(model).__name__)
    layers = list(modules[prefix])
    first, last = _outer_modules(modules, prefix)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding_bytes = _bytes(_tensors([embedding]))
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    # Configs of families whose layers differ give their sizes layer by layer.
    per_layer = getattr(config, "per_layer_config", None)
    configs = list(per_layer) if per_layer is not None and len(per_layer) == len(layers) else [config] * len(layers)
    hidden = int(config.hidden_size)
    dtype_bytes = next(iter(layers[0].parameters())).element_size()
    head_bytes = 0 if head is None or tied else _bytes(_tensors([head]))
    return ModelShape(
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in _tensors([model], buffers=False)),
        layers_prefix=prefix,
        first_modules=first,
        last_modules=last,
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        other_bytes=_bytes(_tensors([model])) - embedding_bytes - head_bytes - _bytes(_tensors(layers)),
        tied=tied,
        hidden_size=hidden,
        intermediate_size=max(_largest(getattr(own, "intermediate_size", None)) for own in configs) or 4 * hidden,
        num_attention_heads=max(_largest(getattr(own, "num_attention_heads", None)) for own in configs) or 1,
        vocab_size=int(config.vocab_size),
        dtype_bytes=dtype_bytes,
        layers=tuple(
            LayerShape(
                weight_bytes=_bytes(_tensors([layer])),
                active_params=_active_params(layer, own),
                kv_bytes_per_token=_kv_values(own) * dtype_bytes,
            )
            for layer, own in zip(layers, configs, strict=True)
        ),
        forbidden_cuts=forbidden_cuts(model.config),
        embedding_on_every_stage=embeds_in_layers(model.config),
    )


def _kv_values(config: Any) -> int:
    """Numbers that one token leaves in the cache of a layer."""
    heads = _largest(getattr(config, "num_attention_heads", None)) or 1
    head_dim = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return 2 * (_largest(getattr(config, "num_key_value_heads", None)) or heads) * int(head_dim)


def _largest(value: int | Sequence[int] | None) -> int:
    """Some configs give a size for each layer."""
    return int(max(value) if isinstance(value, Sequence) else value or 0)


def _find_layers(modules: dict[str, Any], num_layers: int | None, architecture: str) -> str:
    """The shallowest module list of `num_hidden_layers` entries."""
    lists = [
        name
        for name, module in modules.items()
        if any(kind.__name__ == "ModuleList" for kind in type(module).__mro__) and len(module) == num_layers
    ]
    if not lists:
        raise ModelError(f"{architecture}: no list of {num_layers} layers was found in it")
    return min(lists, key=lambda name: name.count("."))


def _outer_modules(modules: dict[str, Any], prefix: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The largest modules that hold none of the layers, by whether they run before or behind them."""
    above = {prefix.rsplit(".", depth)[0] for depth in range(prefix.count(".") + 1)} | {""}
    outer = [name for name in modules if name and name not in above and (name.rpartition(".")[0] in above - {prefix})]
    root = prefix.partition(".")[0]
    first = tuple(name for name in outer if name.partition(".")[0] == root and _FIRST.search(name.rpartition(".")[2]))
    return first, tuple(name for name in outer if name not in first)


def _tensors(modules: Iterable[Any], *, buffers: bool = True) -> Iterator[Any]:
    """Parameters and buffers, shared ones once."""
    seen: set[int] = set()
    for module in modules:
        for tensor in (*module.parameters(), *(module.buffers() if buffers else ())):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _active_params(layer: Any, config: Any) -> int:
    """Parameters that one token meets; of routed experts as many as are chosen."""
    total = max((getattr(config, name, None) or 0) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    chosen = getattr(config, "num_experts_per_tok", None) or total
    active = 0.0
    for name, parameter in layer.named_parameters():
        routed = ".experts." in f".{name}." and total > 0
        active += parameter.numel() * (chosen / total if routed else 1.0)
    return int(active)


def _weights(shape: ModelShape) -> Matrix:
    """`[first, end]`: bytes of weights of a stage of these layers, a tied embedding on both ends."""
    before = np.concatenate([[0.0], np.cumsum([layer.weight_bytes for layer in shape.layers])])
    weights: Matrix = before[np.newaxis, :] - before[:, np.newaxis] + shape.other_bytes
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
        from pipetune.bench.fleet.fleet import available_devices

        kind = device_kind(available_devices()[0])
        devices = [f"{kind}:{index}" for index in range(count)]
    if device_bytes is None:
        from pipetune.bench.fleet.fleet import device_bytes as bytes_of

        try:
            sizes = bytes_of(devices)
        except ValueError as error:
            raise PlanError(f"{error}; give device_bytes to split for other machines") from None
        device_bytes = [sizes[device] for device in devices]
    if len(devices) < count or len(device_bytes) < count:
        raise PlanError(f"num_devices={count}: as many devices and sizes are needed, not {len(devices)}")
    return tuple(devices[:count]), tuple(device_bytes[:count])
