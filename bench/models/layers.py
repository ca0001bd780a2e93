"""Where a model can be cut: the module list of its decoder layers, and what may not be cut at all."""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipetune.bench.errors import ModelError
from pipetune.bench.models import hf_private as hf

UNSPLITTABLE: dict[str, str] = {
    "hrm_text": "it runs the same layers several times in one forward pass",
    "inkling2_text": "its layers read the hidden states of every block before them",
    "openai-gpt": "it has no KV cache",
    "prophetnet": "it predicts several tokens at a time, and its layers work on all of them side by side",
    "rwkv": "its layers share one recurrent state, and its weights are changed by the first forward pass",
    "xlm": "it has no KV cache, and its layers lie in several lists",
    "cpmant": "it puts tokens of its own before the prompt",
}
"""Families, by `model_type`, that come out wrong when they are cut, and why."""

CARRIED: dict[str, dict[str, str]] = {"zaya": {"prev_router_hidden_states": "router_hidden_size"}}
"""Families whose layers hand on more than hidden states: the further arguments of a layer, and the config's name for
the width of each."""

_LAYER_COUNTS = ("num_layers", "num_decoder_layers", "decoder_layers", "num_hidden_layers")
"""The config's names for the number of layers; the last may count an encoder's, or several to a layer."""
_ENCODERS = ("bert-generation", *hf.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
_CACHE_NAMES = ("past_key_values", "cache_params")
_PROMPTS_AT_ONCE = ("doge", "git", "moshi")
"""Families that mask otherwise once something is cached: Doge by the number of keys, GIT as if an image went before,
Moshi by a window that it does not heed in a prompt given at once."""
_KEPT_BY_ROW = (hf.DynamicLayer, hf.DynamicSlidingWindowLayer, hf.DynamicIndexedLayer, hf.DummyLayer)
"""Kinds of cache layer, exactly these classes, that hold every row and position for itself."""


def check_family(model_type: str) -> None:
    """Refuses, by a ModelError, a family of `UNSPLITTABLE`, known to come out wrong when it is cut."""
    if model_type in UNSPLITTABLE:
        raise _refusal(model_type, UNSPLITTABLE[model_type])


def check_splittable(model: PreTrainedModel) -> None:
    """Refuses, by a ModelError, a model whose family, config or cache says that it comes out wrong when it is cut."""
    config = model.config.get_text_config(decoder=True)
    for model_type in (model.config.model_type, config.model_type):
        check_family(model_type)
    # Some decoders carry the mark as well, and mean nothing by it.
    if config.model_type in _ENCODERS and getattr(config, "is_decoder", None) is False:
        raise _refusal(config.model_type, "it is an encoder (is_decoder is false in its config)")
    if cache_name(model) is None:
        raise _refusal(config.model_type, f"its forward pass takes none of {', '.join(_CACHE_NAMES)}")
    try:
        hf.DynamicCache(config=config)
    # As with models: families fail on wrong configs in every way there is.
    except Exception as error:
        raise ModelError(f"model_type {config.model_type!r}: no cache can be built from its config: {error}") from error


def _refusal(model_type: str, reason: str) -> ModelError:
    return ModelError(f"model_type {model_type!r} cannot be split over devices: {reason}; choose another model")


def cache_name(model: PreTrainedModel | type[PreTrainedModel]) -> str | None:
    """The argument by which the model's forward pass takes its cache."""
    family = model if isinstance(model, type) else type(model)
    accepted = inspect.signature(family.forward).parameters
    return next((name for name in _CACHE_NAMES if name in accepted), None)


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether prefill cannot be cut by rows or tokens, as where a state of the model covers a whole micro-batch."""
    untyped: Any = model
    if untyped.config.get_text_config(decoder=True).model_type in _PROMPTS_AT_ONCE:
        return True
    kinds = {type(layer) for layer in hf.DynamicCache(config=untyped.config).layers}
    return bool(hf.is_stateful(model)) or not kinds <= set(_KEPT_BY_ROW)


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """What layers that are made alike have in common: classes and windows of their modules, shapes of parameters."""
    named = layer.named_modules()
    modules = tuple((name, type(one).__qualname__, getattr(one, "sliding_window", None)) for name, one in named)
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers, the shallowest module list with as many entries as the config has, and its qualified name.

    Works on a pruned model too, as long as its foreign layers were replaced and not removed. ModelError without such a
    list.
    """
    config = model.config.get_text_config(decoder=True)
    num_layers = next((getattr(config, name) for name in _LAYER_COUNTS if hasattr(config, name)), None)
    untyped: Any = model
    for root in (untyped.get_decoder(), model):
        lists = [
            (name.count("."), name, module)
            for name, module in root.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == num_layers
        ]
        if not lists:
            continue
        # Modules of equal depth stay in the order of the model.
        _, name, layers = min(lists, key=lambda entry: entry[0])
        prefix = next(prefix for prefix, module in model.named_modules() if module is root)
        return f"{prefix}.{name}".strip("."), layers
    raise ModelError(
        f"{type(model).__name__} ({config.model_type}): no list of {num_layers} layers was found in it; "
        "pipetune can only cut models that keep their layers in one nn.ModuleList"
    )
