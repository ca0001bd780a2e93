"""What planning must know of a model, read from its modules on the meta device: no weights are touched."""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipetune.bench.cuts import embeds_in_layers, forbidden_cuts
from pipetune.bench.errors import ModelError
from pipetune.bench.memory import LayerShape, ModelShape
from pipetune.bench.models.attention import check_attention
from pipetune.bench.models.hf_private import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    attends_by_registry,
    family_of,
    kernel_of,
)
from pipetune.bench.models.layers import cache_name, check_family, check_splittable, find_layers, is_recurrent
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.models.torch_private import tensors_in, tensors_of
from pipetune.bench.spec import DTYPE_BYTES

_BEHIND = re.compile(
    r"(.*_)?head|(final_?|output_?)?(layer_?norm|norm|ln)(_f|_out)?|final_.*|output.*|proj(ect)?_out|embed_out"
    r"|embedding_norm|cls|pooler|pred_layer|generator_.*|decoder|logit.*|.*unembed.*",
    re.IGNORECASE,
)
"""Names of what runs behind the layers; everything else runs before them or is used by all."""
_INTERMEDIATE_SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim")
_STATE_TOKENS = 8
_LATENT = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")
_APART = frozenset({*_LATENT, "diffllama", "gemma4_unified", "jetmoe", "llama4", "llama4_text"})
"""Families, by `model_type`, that compute with what is cached before they attend (multi-head latent attention among
them), or whose masks look at the padding of a batch's rows."""
_DISTANCES = frozenset({"bloom", "mpt"})
"""Families without positions, but with distances between them (ALiBi), by `model_type`."""


def build_on_meta(resolved: ResolvedModel) -> PreTrainedModel:
    """The model that `AutoModelForCausalLM` would build, without memory; what is untied in its checkpoint, is.

    ModelError where no causal LM class goes with the config, the config is inconsistent, or the family has not the
    attention kernel asked for.
    """
    spec = resolved.spec
    untyped: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(resolved.folder, trust_remote_code=spec.trust_remote_code)
        if (family := family_of(config)) is not None:
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
    for name in resolved.untied:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(torch.empty_like(model.get_parameter(name))))
        model.all_tied_weights_keys.pop(name)
    return model  # type: ignore[no-any-return]


def describe_model(resolved: ResolvedModel) -> ModelShape:
    """Builds the model on the meta device and reads off sizes, layers and where it may be cut, or raises ModelError."""
    check_family(resolved.model_type)
    model = build_on_meta(resolved)
    find_layers(model)
    check_splittable(model)
    spec = resolved.spec
    return read_shape(model, DTYPE_BYTES[spec.dtype]).model_copy(
        update={
            "architecture": resolved.architecture,
            "storage_bytes": None if spec.kept_dtype == spec.dtype else DTYPE_BYTES[spec.kept_dtype],
            "checkpoint_bytes": resolved.checkpoint_bytes,
        }
    )


def read_shape(model: Any, dtype_bytes: int) -> ModelShape:
    """Sizes, layers and where it may be cut, of a causal LM at hand, which may be on the meta device. Numbers that are
    computed with and cached have `dtype_bytes`. ModelError where its layers are not found."""
    prefix, layers = find_layers(model)
    config = model.config.get_text_config(decoder=True)
    # Configs differ where a family's layers do.
    layer_configs = _per_layer(config, "per_layer_config", len(layers), config)
    kinds = _per_layer(config, "layer_types", len(layers), "full_attention")
    cached = DynamicCache(config=config).layers
    # Some layers are several attention layers, each with keys and values of its own.
    entries = max(len(cached) // len(layers), 1)
    # Not recurrent ones, not those without attention or with another's keys.
    kept = [not isinstance(entry, DummyLayer | LinearAttentionLayer) for entry in cached]
    # Caches of transformers 5.17 leave out layers that use others' keys, which are the last.
    kept += [False] * (getattr(config, "num_kv_shared_layers", None) or 0) if len(kept) < len(layers) else []
    if len(kept) != len(layers):
        kept = [True] * len(layers)
    if cache_name(model) != "past_key_values":
        # What takes no keys and values by their name keeps states alone.
        kept = [False] * len(layers)
    recurrent = is_recurrent(model)
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    is_movable = not recurrent and all(type(entry) in plain for entry in cached)
    states = _state_bytes(model, len(layers)) if recurrent else (0,) * len(layers)
    shapes = tuple(
        LayerShape(
            weight_bytes=_bytes(_tensors(layer)),
            active_params=_active_params(layer, layer_config),
            kv_bytes_per_token=_kv_values(layer, layer_config) * entries * dtype_bytes if keeps else 0,
            state_bytes=state,
            kind=str(kind),
        )
        for layer, layer_config, kind, keeps, state in zip(layers, layer_configs, kinds, kept, states, strict=True)
    )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding_bytes = _bytes(_tensors(embedding))
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", embedding)
    head_bytes = 0 if head is None else _bytes(_only_in(head, model))
    first, last = _outer_modules(model, prefix)
    hidden_size = _largest(layer_configs, "hidden_size")
    return ModelShape(
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers_prefix=prefix,
        first_modules=first,
        last_modules=last,
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        other_bytes=_bytes(_tensors(model)) - embedding_bytes - head_bytes - _bytes(_tensors(layers)),
        tied=tied,
        hidden_size=hidden_size,
        intermediate_size=_largest(layer_configs, *_INTERMEDIATE_SIZES) or 4 * hidden_size,
        num_attention_heads=_largest(layer_configs, "num_attention_heads") or 1,
        vocab_size=config.vocab_size,
        dtype_bytes=dtype_bytes,
        layers=shapes,
        forbidden_cuts=forbidden_cuts(model.config),
        recurrent=recurrent,
        joins=is_movable and takes_positions and _joins(model),
        whole_slots=not is_movable or not (takes_positions or model.config.model_type in _DISTANCES),
        embedding_on_every_stage=embeds_in_layers(model.config),
        eager_attention=kernel_of(config) == "eager",
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _joins(model: Any) -> bool:
    """Whether tokens of unlike requests may stand in one row, where keys and values alone are kept and positions are
    those given: all that looks beyond its own token is attention by transformers' registries. Known of its own
    families."""
    is_known = type(model).__module__.startswith("transformers.") and model.config.model_type not in _APART
    return is_known and attends_by_registry(model)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, shared ones once."""
    yield from module.parameters()
    yield from module.buffers()


def _only_in(part: nn.Module, model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors of a part that nothing else in the model shares."""
    inside = {id(module) for module in part.modules()}
    others = (module for module in model.modules() if id(module) not in inside)
    shared = {id(tensor) for module in others for own in tensors_of(module) for tensor in own.values()}
    return (tensor for tensor in _tensors(part) if id(tensor) not in shared)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _per_layer(config: Any, name: str, num_layers: int, default: Any) -> list[Any]:
    values = getattr(config, name, None)
    return [default] * num_layers if values is None or len(values) != num_layers else list(values)


def _largest(configs: list[Any], *names: str) -> int:
    """The largest value over the layers; some families give a list."""
    return max(_first_int(config, *names) for config in configs)


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


def _state_bytes(model: Any, num_layers: int) -> tuple[int, ...]:
    """Bytes of the recurrent states that each layer keeps for one row, whatever its length; without keys and values.

    Found by a run on the meta device, after which the model is of no use; zeros where it cannot be run there, as with
    caches of a family's own.
    """
    name = cache_name(model)
    assert name is not None
    try:
        # Grouped matrix products have no meta form.
        model.set_experts_implementation("batched_mm")
        few, more = _kept_bytes(model, name, _STATE_TOKENS), _kept_bytes(model, name, 2 * _STATE_TOKENS)
    # Families fail in every way there is where they look into numbers.
    except Exception:
        return (0,) * num_layers
    # What grows with the tokens are keys and values.
    entries = [2 * one - other for one, other in zip(few, more, strict=True)]
    each = max(len(entries) // num_layers, 1)
    states = [sum(entries[index * each : (index + 1) * each]) for index in range(num_layers)]
    return tuple(max(size, 0) for size in states)


def _kept_bytes(model: Any, name: str, tokens: int) -> list[int]:
    """Bytes that each entry of the cache holds after a prompt of one row."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{name: cache})
    return [_bytes(tensors_in(vars(layer))) for layer in cache.layers]
