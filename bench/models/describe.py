"""What planning must know of a model, read from its modules on the meta device: no weights are touched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionLayer
from transformers.models.auto.auto_factory import _get_model_class

from pipetune.bench.cuts import embeds_in_layers, forbidden_cuts
from pipetune.bench.errors import ModelError
from pipetune.bench.memory import LayerShape, ModelShape
from pipetune.bench.models.attention import check_attention
from pipetune.bench.models.cache_kinds import DummyLayer
from pipetune.bench.models.layers import cache_name, check_family, check_splittable, find_layers, is_recurrent
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.models.states import state_bytes
from pipetune.bench.spec import DTYPE_BYTES

_BEHIND = re.compile(
    r"(.*_)?head|(final_?|output_?)?(layer_?norm|norm|ln)(_f|_out)?|final_.*|output.*|proj(ect)?_out|embed_out"
    r"|embedding_norm|cls|pooler|pred_layer|generator_.*|decoder|logit.*|.*unembed.*",
    re.IGNORECASE,
)
"""Names of what runs behind the layers; everything else runs before them or is used by all."""


def build_on_meta(resolved: ResolvedModel) -> PreTrainedModel:
    """The model that `AutoModelForCausalLM` would build, without memory.

    Raises:
        ModelError: no causal LM class goes with the config, the config is inconsistent, or the family has not the
            attention kernel asked for.
    """
    spec = resolved.spec
    untyped: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(resolved.folder, trust_remote_code=spec.trust_remote_code)
        if type(config) in untyped._model_mapping:
            family = _get_model_class(config, untyped._model_mapping)  # type: ignore[no-untyped-call]
            check_attention(spec, family)
        with torch.device("meta"):
            model = untyped.from_config(
                config,
                dtype=getattr(torch, spec.kept_dtype),
                attn_implementation=spec.attn_implementation,
                trust_remote_code=spec.trust_remote_code,
            )
    except ModelError:
        raise
    # Configs come from anywhere, and families fail on wrong ones in every way there is.
    except Exception as error:
        raise ModelError(f"model.name: {spec.name!r}: no model can be built from its config.json: {error}") from error
    built: PreTrainedModel = model
    return built


def describe_model(resolved: ResolvedModel) -> ModelShape:
    """Builds the model on the meta device and reads off sizes, layers and where it may be cut.

    Raises:
        ModelError: the model cannot be built from its config, or cannot be split.
    """
    check_family(resolved.model_type)
    model = build_on_meta(resolved)
    find_layers(model)
    check_splittable(model)
    spec = resolved.spec
    shape = read_shape(model, DTYPE_BYTES[spec.dtype])
    return shape.model_copy(
        update={
            "architecture": resolved.architecture,
            "storage_bytes": None if spec.kept_dtype == spec.dtype else DTYPE_BYTES[spec.kept_dtype],
            "checkpoint_bytes": resolved.checkpoint_bytes,
        }
    )


def read_shape(model: Any, dtype_bytes: int) -> ModelShape:
    """Sizes, layers and where it may be cut, of a model at hand.

    Args:
        model: a causal LM of transformers; on the meta device is enough.
        dtype_bytes: bytes of a number that is computed with and cached.

    Raises:
        ModelError: the model's layers are not found.
    """
    prefix, layers = find_layers(model)
    config = model.config.get_text_config(decoder=True)
    layer_configs = _layer_configs(config, len(layers))
    kinds = _layer_kinds(config, len(layers))
    # What takes no keys and values by their name keeps states alone.
    kept = _keeps_kv(config, len(layers)) if cache_name(model) == "past_key_values" else [False] * len(layers)
    # Some layers are several attention layers, each with keys and values of its own.
    entries = max(len(DynamicCache(config=config).layers) // len(layers), 1)
    recurrent = is_recurrent(model)
    states = state_bytes(model, len(layers)) if recurrent else (0,) * len(layers)
    shapes = tuple(
        LayerShape(
            weight_bytes=_bytes(_tensors(layer)),
            active_params=_active_params(layer, layer_config),
            kv_bytes_per_token=_kv_values(layer, layer_config) * entries * dtype_bytes if keeps else 0,
            state_bytes=state,
            kind=kind,
        )
        for layer, layer_config, kind, keeps, state in zip(layers, layer_configs, kinds, kept, states, strict=True)
    )
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    embedding_bytes = _bytes(_tensors(embedding))
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", embedding)
    head_bytes = 0 if head is None else _bytes(_only_in(head, model))
    total = _bytes(_tensors(model))
    first, last = _outer_modules(model, prefix)
    return ModelShape(
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers_prefix=prefix,
        first_modules=first,
        last_modules=last,
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        other_bytes=total - embedding_bytes - head_bytes - _bytes(_tensors(layers)),
        tied=tied,
        hidden_size=_number(layer_configs, "hidden_size"),
        intermediate_size=_intermediate_size(layer_configs),
        num_attention_heads=_number(layer_configs, "num_attention_heads", default=1),
        vocab_size=config.vocab_size,
        dtype_bytes=dtype_bytes,
        layers=shapes,
        forbidden_cuts=forbidden_cuts(model.config),
        recurrent=recurrent,
        embedding_on_every_stage=embeds_in_layers(model.config),
        eager_attention=getattr(config, "_attn_implementation", None) == "eager",
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, shared ones once."""
    yield from module.parameters()
    yield from module.buffers()


def _only_in(part: nn.Module, model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors of a part that nothing else in the model shares."""
    inside = {id(module) for module in part.modules()}
    others = (module for module in model.modules() if id(module) not in inside)
    shared = {id(tensor) for module in others for tensor in (*module._parameters.values(), *module._buffers.values())}
    return (tensor for tensor in _tensors(part) if id(tensor) not in shared)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _layer_configs(config: Any, num_layers: int) -> list[Any]:
    """One config per layer: they differ where a family's layers do."""
    per_layer = getattr(config, "per_layer_config", None)
    if per_layer is None or len(per_layer) != num_layers:
        return [config] * num_layers
    return list(per_layer)


def _number(configs: list[Any], name: str, default: int = 0) -> int:
    """The largest value over the layers; some families give a list."""
    values = [getattr(config, name, None) or default for config in configs]
    return int(max(max(value) if isinstance(value, list | tuple) else value for value in values))


def _intermediate_size(configs: list[Any]) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"):
        size = _number(configs, name)
        if size:
            return size
    return 4 * _number(configs, "hidden_size")


def _layer_kinds(config: Any, num_layers: int) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None or len(kinds) != num_layers:
        return ["full_attention"] * num_layers
    return [str(kind) for kind in kinds]


def _keeps_kv(config: Any, num_layers: int) -> list[bool]:
    """Which layers keep keys and values: not recurrent ones, not those without attention or with another's keys."""
    layers = DynamicCache(config=config).layers
    if len(layers) != num_layers:
        return [True] * num_layers
    return [not isinstance(layer, DummyLayer | LinearAttentionLayer) for layer in layers]


def _kv_values(layer: nn.Module, config: Any) -> int:
    """Numbers that one token leaves in the cache of this layer.

    Read from the projections, which know best where layers differ: keys and values, or the one latent of multi-head
    latent attention, which transformers caches as it is. Where they are fused with the queries, from the config.
    """
    widths: dict[str, int] = {}
    for name, module in layer.named_modules():
        path = name.split(".")
        if any("cross" in part or part == "encoder_attn" for part in path):
            continue
        width = getattr(module, "out_features", None)
        if isinstance(width, int):
            widths.setdefault(path[-1], width)
    indexed = any("indexer" in name.split(".") for name, _ in layer.named_modules())
    index_keys = _first_int(config, "index_head_dim") if indexed else 0
    if "kv_a_proj_with_mqa" in widths:
        return widths["kv_a_proj_with_mqa"] + index_keys
    for keys, values in (("k_proj", "v_proj"), ("key", "value")):
        if keys in widths and values in widths:
            return widths[keys] + widths[values] + index_keys
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    num_heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return 2 * int(heads or num_heads) * int(head_dim)


def _active_params(layer: nn.Module, config: Any) -> int:
    """Parameters that one token meets: of routed experts only as many as are chosen."""
    num_experts = _first_int(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = _first_int(config, "num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts") or num_experts
    total = 0
    for owner_name, owner in layer.named_modules():
        path = owner_name.split(".")
        routed = "experts" in path or type(owner).__name__.endswith("Experts")
        for parameter in owner.parameters(recurse=False):
            # Experts are stacked in one tensor, or numbered modules; a router beside them is neither.
            stacked = parameter.shape[:1] == (num_experts,) or any(part.isdecimal() for part in path)
            if num_experts and routed and stacked and "shared_experts" not in path:
                total += parameter.numel() * chosen // num_experts
            else:
                total += parameter.numel()
    return total


def _first_int(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple):
            value = max(value, default=None)
        if value:
            return int(value)
    return 0


def _outer_modules(model: PreTrainedModel, layers_prefix: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Everything beside the layers, for the first and for the last device of a device map, in the model's order.

    These are the children of every module on the way down to the layers, and parameters and buffers owned by those
    modules themselves: with the layers they cover the model, each part once.
    """
    first: list[str] = []
    last: list[str] = []

    def sort_children(holder: nn.Module, prefix: str, path: list[str]) -> None:
        owned = (*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False))
        for name, child in (*owned, *holder.named_children()):
            if name != path[0]:
                (last if _BEHIND.fullmatch(name) else first).append(prefix + name)
            elif len(path) > 1:
                assert isinstance(child, nn.Module)
                sort_children(child, f"{prefix}{name}.", path[1:])

    sort_children(model, "", layers_prefix.split("."))
    return tuple(first), tuple(last)
