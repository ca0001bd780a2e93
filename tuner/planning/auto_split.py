"""`auto_split_model`: a balanced device map for a model at hand, read off its modules without importing torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.errors import ModelError, PlanError
from bench.memory import LayerShape, ModelShape
from bench.spec import Plan, device_kind
from tuner.planning.cost import CostModel
from tuner.planning.device_map import DeviceMap, seed_map
from tuner.planning.partition import Partition, best_partitions

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
    names, sizes = _devices(num_devices, devices, device_bytes)
    caps = [int(max_per_device_memory * size) for size in sizes]
    cost = CostModel(
        shape=shape,
        num_prompts=_MICRO_BATCH * 2 * num_devices,
        prompt_len=_PROMPT_TOKENS,
        output_len=_OUTPUT_TOKENS,
    )

    def seconds(partition: Partition) -> float:
        over = _overrun(shape, partition, caps)
        if over > 0:
            return 1e12 * (1.0 + over)
        plan = Plan.from_layer_counts(partition, names, _MICRO_BATCH)
        return cost.duration_s(plan)

    best = best_partitions(
        shape.num_layers,
        seconds,
        min_stages=num_devices,
        max_stages=num_devices,
        forbidden_cuts=shape.forbidden_cuts,
        limit=1,
    )
    if not best or _overrun(shape, best[0], caps) > 0:
        needed = sum(_weights(shape, best[0])) if best else 0
        raise PlanError(
            f"max_per_device_memory={max_per_device_memory}: the weights take {needed / 2**20:.0f} MiB, and no split "
            f"over {num_devices} devices stays below their caps of "
            f"{', '.join(f'{cap / 2**20:.0f}' for cap in caps)} MiB; take more devices or a smaller dtype"
        )
    return seed_map(shape, Plan.from_layer_counts(best[0], names, _MICRO_BATCH))


def read_shape(model: Any) -> ModelShape:
    """What planning must know of a model, from `named_modules()`, `parameters()` and `config` alone.

    Raises:
        ModelError: there is no list of as many layers as the config says.
    """
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    modules = dict(model.named_modules())
    prefix = _find_layers(modules, getattr(config, "num_hidden_layers", None), type(model).__name__)
    layers = list(modules[prefix])
    first, last = _outer_modules(modules, prefix)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding_bytes = _bytes(_tensors([embedding]))
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    hidden = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    dtype_bytes = next(iter(layers[0].parameters())).element_size()
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv = 2 * (getattr(config, "num_key_value_heads", None) or heads) * int(head_dim) * dtype_bytes
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
        intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        num_attention_heads=heads,
        vocab_size=int(config.vocab_size),
        dtype_bytes=dtype_bytes,
        layers=tuple(
            LayerShape(
                weight_bytes=_bytes(_tensors([layer])),
                active_params=_active_params(layer, config),
                kv_bytes_per_token=kv,
            )
            for layer in layers
        ),
        forbidden_cuts=_forbidden_cuts(config),
    )


def _forbidden_cuts(config: Any) -> tuple[int, ...]:
    """Cuts between a layer that stores keys and values and the later ones of its kind that use them again."""
    stored: dict[str, int] = {}
    forbidden: set[int] = set()
    modes = getattr(config, "kv_sharing_modes", None) or ()
    for index, (mode, kind) in enumerate(zip(modes, getattr(config, "layer_types", ()), strict=False)):
        if mode == "store":
            stored[kind] = index
        elif mode == "reuse":
            forbidden |= set(range(stored[kind] + 1, index + 1))
    return tuple(sorted(forbidden))


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


def _weights(shape: ModelShape, partition: Partition) -> list[int]:
    """Bytes of weights of each stage, a tied embedding on both ends."""
    first = 0
    weights = []
    for index, count in enumerate(partition):
        own = shape.other_bytes + sum(layer.weight_bytes for layer in shape.layers[first : first + count])
        is_first, is_last = index == 0, index == len(partition) - 1
        own += shape.embedding_bytes if is_first or (is_last and shape.tied) else 0
        weights.append(own + (shape.head_bytes if is_last else 0))
        first += count
    return weights


def _overrun(shape: ModelShape, partition: Partition, caps: Sequence[int]) -> float:
    """The largest share by which a stage's weights exceed its cap; zero or less when all fit."""
    return max(weights / cap - 1.0 for weights, cap in zip(_weights(shape, partition), caps, strict=True))


def _devices(
    count: int, devices: Sequence[str] | None, device_bytes: Sequence[int] | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if devices is None:
        from bench.launch import available_devices

        kind = device_kind(available_devices()[0])
        devices = [f"{kind}:{index}" for index in range(count)]
    if device_bytes is None:
        from bench.launch import device_bytes as bytes_of

        try:
            sizes = bytes_of(devices)
        except ValueError as error:
            raise PlanError(f"{error}; give device_bytes to split for other machines") from None
        device_bytes = [sizes[device] for device in devices]
    if len(devices) < count or len(device_bytes) < count:
        raise PlanError(f"num_devices={count}: as many devices and sizes are needed, not {len(devices)}")
    return tuple(devices[:count]), tuple(device_bytes[:count])
